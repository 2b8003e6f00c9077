"""The computation of `rplib.MutualObjective`: check the arguments, choose the implementation, compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rplib import dispatch, lean, naive
from rplib.averages import PrototypeAverages
from rplib.functional import prepared, usable_in_autograd
from rplib.options import Options
from rplib.statistics import ObjectiveStatistics
from rplib.supervised import supervised_loss
from rplib.supervision import Supervision
from rplib.targets import Labelled, Target, bad_labels, check_labels, check_target

Terms = tuple[Tensor, Tensor, Tensor, ObjectiveStatistics | None]


def objective_with(
    options: Options,
    supervision: Supervision,
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    target: Tensor,
    consistency_weight: float | Tensor,
    mask: Tensor | None = None,
    labelled: Labelled = None,
    sample_weights: Tensor | Sequence[float] | None = None,
    averages: PrototypeAverages | None = None,
) -> Terms:
    """Total, and its terms (supervised, mutual), detached; statistics or None."""
    z, f, mask, extras = prepared(logits, features, mask, options, sample_weights, averages)
    supervision.check_classes(z[0])
    known = check_target(target, z[0], labelled)
    classes = z[0].shape[1]
    bad = bad_labels(known, classes, supervision.ignore_index, mask)
    spoilt = check_labels(known, bad, classes, supervision.ignore_index, look=options.check_finite)
    weight = check_weight(consistency_weight, z[0])
    taught = mask if supervision.mutual_on == "all" else _unlabelled(known, z[0], mask)
    asked = dispatch.asked_of(options, taught, extras)
    used = {
        "ignore_index": supervision.ignore_index is not None,
        "labelled": not known.first,
    }
    form = dispatch.choose(options.impl, z, f, [*asked, *(name for name, so in used.items() if so)])
    if form == "triton":  # Dice inside the kernels' own passes
        from rplib.kernels.operators import objective

        total, supervised, mutual, statistics = objective(usable_in_autograd(z), f, options, supervision, known.classes, weight)
        if spoilt is not None:
            total, supervised = total + spoilt, supervised + spoilt
        return total, supervised, mutual, statistics
    detailed = supervision.statistics
    if form == "naive":
        mutual, statistics = naive.loss_and_statistics(z, f, options, None, taught, extras, detailed=detailed)
    else:
        mutual, statistics = lean.loss_and_statistics(z, f, options, taught, extras, detailed=detailed)
    learning = z if options.students is None else [z[k] for k in sorted(options.students)]
    supervised = supervised_loss(learning, known, supervision, mask, options.process_group)
    if spoilt is not None:
        supervised = supervised + spoilt
    total = supervision.dice_weight * supervised + weight * mutual
    return total, supervised.detach(), mutual.detach(), statistics


def _unlabelled(target: Target, z: Tensor, mask: Tensor | None) -> Tensor:
    """(B, *spatial) bool: the voxels of ``mask`` in samples without a target."""
    rows = [k not in target.rows for k in range(z.shape[0])]
    samples = torch.tensor(rows, device=z.device).view(-1, *[1] * (z.ndim - 2))
    return samples.expand(z.shape[0], *z.shape[2:]) if mask is None else samples & mask


def check_weight(weight: object, z: Tensor) -> float | Tensor:
    """The weight of the mutual term as a number, or as a 0-dim tensor of the loss's dtype on the logits' device.

    Raises:
        TypeError, ValueError: names ``consistency_weight``.
    """
    if isinstance(weight, (float, int)) and not isinstance(weight, bool):
        return weight
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"consistency_weight has shape {tuple(weight.shape)}; expected a number or a 0-dim tensor.")
        if weight.dtype.is_complex or weight.dtype == torch.bool:
            raise TypeError(f"consistency_weight has dtype {weight.dtype}; expected a real number or a real 0-dim tensor.")
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        return weight.reshape(()).to(device=z.device, dtype=dtype, non_blocking=True)
    if not isinstance(weight, (str, bytes, bool)) and hasattr(weight, "__float__"):
        return float(weight)  # pyright: ignore[reportArgumentType]
    raise TypeError(f"consistency_weight is {weight!r}; expected a number or a 0-dim tensor.")
