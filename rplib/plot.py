"""Pictures of what the loss decided. Needs matplotlib: ``pip install "rplib[reference]"``."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rplib.functional import reliability
from rplib.maps import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def reliability_sheet(
    image: Tensor,
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    *,
    file: str | PathLike[str] | None = None,
    sample: int = 0,
    index: int | None = None,
    target: Tensor | None = None,
    **keywords: Any,
) -> "Figure":
    """Draw one slice of one sample: image, entropies, which network teaches where, with what weight, and the pseudo-labels.

    One row per network: its entropy, where it teaches (*which*; any of its students), with what weight (*how*; the largest), and
    its pseudo-labels. The first column shows the image, and the target if given.

    Args:
        image: (B, channels, *spatial); channel 0 is shown.
        logits: K tensors (B, C, *spatial), 2 or 3 spatial axes.
        features: K tensors (B, F, *spatial); not needed with ``weighting=None``.
        file: also write the figure to this file; the suffix selects the format.
        sample: which of the B samples.
        index: slice along the last axis of a volume; None: the slice with the most voxels taught.
        target: (B, *spatial) or (B, 1, *spatial) class indices; drawn below the image.
        **keywords: those of `rplib.reliability`.

    Returns:
        A matplotlib Figure that is not registered with pyplot: it need not be closed, and a notebook shows it as the last value
        of a cell.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: shapes do not fit; in addition, the errors of `rplib.reliability`.

    Example:
        >>> import torch
        >>> import rplib.plot
        >>> logits = [torch.randn(1, 2, 16, 16) for _ in range(2)]
        >>> features = [torch.randn(1, 8, 16, 16) for _ in range(2)]
        >>> figure = rplib.plot.reliability_sheet(torch.randn(1, 1, 16, 16), logits, features)
        >>> len(figure.axes) >= 10
        True
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('rplib.plot needs matplotlib; pip install "rplib[reference]" or pip install matplotlib.') from error
    maps = reliability(logits, features, **keywords)
    z = logits[0]
    if z.ndim not in (4, 5):
        raise ValueError(f"logits[0] has shape {tuple(z.shape)}; a picture needs 2 or 3 spatial axes.")
    _check("image", image, z)
    if not -z.shape[0] <= sample < z.shape[0]:
        raise ValueError(f"sample is {sample} but the batch has {z.shape[0]} samples.")
    if index is None:
        index = _most_taught(maps, sample) if z.ndim == 5 else 0
    elif z.ndim == 5 and not -z.shape[-1] <= index < z.shape[-1]:
        raise ValueError(f"index is {index} but the last axis has {z.shape[-1]} slices.")

    def picture(t: Tensor) -> Any:  # (*spatial) to a numpy array (rows, columns)
        plane = t if t.ndim == 2 else t[..., index]
        return plane.detach().cpu().to(torch.float32).numpy().T

    networks, classes = len(logits), z.shape[1]
    figure = Figure(figsize=(2.4 * 5, 2.3 * networks + 0.4), layout="constrained")
    axes = figure.subplots(networks, 5, squeeze=False)
    _show(axes[0][0], picture(image[sample, 0]), "image", cmap="gray")
    for row in range(1, networks):
        axes[row][0].axis("off")
    if target is not None:
        _check("target", target if target.ndim == z.ndim else target.unsqueeze(1), z, samples=sample % z.shape[0] + 1)
        truth = target[sample, 0] if target.ndim == z.ndim else target[sample]
        _show(axes[1][0], picture(truth), "target", cmap="tab10", vmin=-0.5, vmax=9.5, interpolation="nearest")
    largest = torch.tensor(float(classes)).log().item()
    strongest = max([1.0, *(float(m.weight[sample].max()) for m in maps)])
    for k, own in enumerate(logits):
        p = own[sample].detach().to(torch.float32).softmax(dim=0)
        entropy = -torch.special.xlogy(p, p).sum(dim=0)
        taught = [m for m in maps if m.teacher == k]
        which = torch.stack([m.mask[sample] for m in taught]).any(dim=0) if taught else torch.zeros_like(entropy)
        how = torch.stack([m.weight[sample] for m in taught]).amax(dim=0) if taught else torch.zeros_like(entropy)
        label = own[sample].argmax(dim=0)
        _bar(figure, _show(axes[k][1], picture(entropy), f"entropy of network {k}", cmap="magma", vmin=0, vmax=largest))
        _show(axes[k][2], picture(which), f"which: network {k} teaches", cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _bar(figure, _show(axes[k][3], picture(how), f"how: weight of network {k}", cmap="viridis", vmin=0, vmax=strongest))
        _show(axes[k][4], picture(label), f"pseudo-labels {k}", cmap="tab10", vmin=-0.5, vmax=9.5, interpolation="nearest")
    if z.ndim == 5:
        figure.suptitle(f"sample {sample}, slice {index % z.shape[-1]}", fontsize=9)
    if file is not None:
        figure.savefig(file, dpi=120)
    return figure


def _most_taught(maps: list[Reliability], sample: int) -> int:
    taught = torch.stack([m.mask[sample] for m in maps]).any(dim=0)  # (X, Y, Z)
    return int(taught.sum(dim=(0, 1)).argmax())


def _check(name: str, tensor: Tensor, z: Tensor, samples: int | None = None) -> None:
    wanted = z.shape[0] if samples is None else samples
    if tensor.ndim != z.ndim or tensor.shape[0] < wanted or tensor.shape[2:] != z.shape[2:]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but logits[0] has {tuple(z.shape)}; expected its samples and spatial axes."
        )


def _show(axis: "Axes", values: Any, title: str, **keywords: Any) -> Any:
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(values, origin="lower", **keywords)


def _bar(figure: "Figure", shown: Any) -> None:
    figure.colorbar(shown, ax=shown.axes, shrink=0.8).ax.tick_params(labelsize=6)
