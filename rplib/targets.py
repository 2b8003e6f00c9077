"""Checks of the target of the supervised term: which samples it belongs to, and whether its values are classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rplib.inputs import looks_allowed, plain

Labelled = int | Sequence[int] | Sequence[bool] | Tensor | None


class Target(NamedTuple):
    """classes: (B_l, *spatial) as given; rows: indices of their samples in the batch, in the same order."""

    classes: Tensor
    rows: list[int]

    @property
    def first(self) -> bool:
        """Whether the labelled samples are the first ones, as the kernels require."""
        return self.rows == list(range(len(self.rows)))

    def samples(self, tensor: Tensor) -> Tensor:
        """The labelled samples of (B, ...): a slice if they are contiguous, else a copy."""
        runs: list[list[int]] = []
        for row in self.rows:
            if runs and row == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([row, row + 1])
        if len(runs) <= 1:
            start, stop = runs[0] if runs else (0, 0)
            return tensor[start:stop]
        return torch.cat([tensor[start:stop] for start, stop in runs])


def check_target(target: Tensor, z: Tensor, labelled: Labelled = None) -> Target:
    """Check a target for logits z (B, C, *spatial).

    Raises:
        TypeError, ValueError: states what was given and what was expected.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target is a {type(target).__name__}; expected a torch.Tensor of class indices.")
    if target.dtype.is_complex:
        raise TypeError(f"target has dtype {target.dtype}; expected class indices as integer, bool or float.")
    target = plain(target)
    spatial = tuple(z.shape[2:])
    if target.ndim == 0 or tuple(target.shape[1:]) not in (spatial, (1, *spatial)):
        raise ValueError(
            f"target has shape {tuple(target.shape)} but logits[0] has {tuple(z.shape)}; expected (B_l, *spatial) "
            f"or (B_l, 1, *spatial) with B_l <= {z.shape[0]}.{_hint(target, z)}"
        )
    if target.device != z.device:
        raise ValueError(f"target is on {target.device} but logits[0] is on {z.device}; expected one device for all.")
    if target.ndim == z.ndim:
        target = target.squeeze(1)
    batch, given = z.shape[0], target.shape[0]
    rows = _rows(labelled, batch, given)
    if given == len(rows):
        return Target(target, rows)
    if given != batch or labelled is None:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, so {given} samples, but the batch of logits[0] has {batch}"
            + ("" if labelled is None else f" of which labelled names {len(rows)}")
            + "; expected one target per labelled sample"
            + ("." if labelled is None else ", or one per sample of the batch.")
        )
    whole = Target(target, rows)  # one target per sample of the batch: those of unlabelled samples are ignored
    return Target(whole.samples(target), rows)


def bad_labels(target: Target, classes: int, ignore_index: int | None, mask: Tensor | None) -> Tensor | None:
    """(B_l, *spatial) bool, True where a label that counts is not a class; None if the dtype rules that out."""
    t = target.classes
    if t.dtype == torch.bool:
        return None
    good = (t >= 0) & (t < classes)
    if t.is_floating_point():
        good &= t == t.floor()
    if ignore_index is not None:
        good |= is_index(t, ignore_index)
    return ~good if mask is None else ~good & target.samples(mask)


def is_index(target: Tensor, index: int) -> Tensor:
    """Where target has this value: False everywhere for a value that its dtype cannot represent (-1 in uint8)."""
    if target.dtype == torch.bool:
        return torch.zeros_like(target) if index not in (0, 1) else target == bool(index)
    if not target.is_floating_point() and not torch.iinfo(target.dtype).min <= index <= torch.iinfo(target.dtype).max:
        return torch.zeros_like(target, dtype=torch.bool)
    return target == index


def check_labels(target: Target, bad: Tensor | None, classes: int, ignore_index: int | None, *, look: bool) -> Tensor | None:
    """Handle labels that are not classes: raise an error if values may be read, else return a number that makes the loss NaN.

    Args:
        look: read values on a GPU too, which waits for the device.

    Returns:
        None if all labels are valid; else, if values may not be read, 0-dim float32: 0, or NaN if a label is invalid.
    """
    if bad is None:
        return None
    device = bad.device
    if type(bad) is not Tensor or not looks_allowed(device) or not (look or device.type == "cpu"):
        return torch.where(bad.any(), float("nan"), 0.0)
    if not bad.any():
        return None
    found = target.classes[bad]
    values = ", ".join(f"{v:g}" for v in found.unique().tolist()[:6])
    known = "" if ignore_index is None else f" or ignore_index={ignore_index}"
    fractions = found.is_floating_point() and bool((found != found.floor()).any())
    advice = (
        "soft targets are not supported: pass class indices, for example soft.argmax(dim=1)"
        if fractions
        else "pass ignore_index= for voxels without a label, and map the labels to 0..C-1 otherwise"
    )
    raise ValueError(
        f"target has {found.numel()} voxels whose values are not classes ({values}); expected 0..{classes - 1}{known}; {advice}."
    )


def _rows(labelled: Labelled, batch: int, given: int) -> list[int]:
    if labelled is None:
        if given > batch:
            raise ValueError(f"target has {given} samples but the batch of logits[0] has {batch}; expected at most {batch}.")
        return list(range(given))
    if isinstance(labelled, Tensor):
        if labelled.ndim > 1 or labelled.dtype.is_floating_point or labelled.dtype.is_complex:
            raise TypeError(
                f"labelled is a tensor of shape {tuple(labelled.shape)} and dtype {labelled.dtype}; "
                "expected a count, indices (B_l,) or a bool mask (B,)."
            )
        labelled = labelled.tolist()  # waits for the device where the tensor is not on the CPU
    if isinstance(labelled, bool) or not isinstance(labelled, (int, list, tuple, range)):
        raise TypeError(f"labelled is {labelled!r}; expected a count, sample indices, or a bool mask (B,).")
    if isinstance(labelled, int):
        if not 0 <= labelled <= batch:
            raise ValueError(f"labelled is {labelled} but the batch of logits[0] has {batch} samples; expected 0..{batch}.")
        return list(range(labelled))
    values = list(labelled)
    if values and all(isinstance(v, bool) for v in values):
        if len(values) != batch:
            raise ValueError(f"labelled is a mask of {len(values)} samples but the batch of logits[0] has {batch}.")
        return [k for k, known in enumerate(values) if known]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"labelled is {labelled!r}; expected sample indices or a bool mask (B,).")
    if len(set(values)) < len(values) or any(not 0 <= v < batch for v in values):
        raise ValueError(f"labelled is {values}; expected different sample indices from 0 to {batch - 1}.")
    return values


def _hint(target: Tensor, z: Tensor) -> str:
    shape, spatial = tuple(target.shape[1:]), tuple(z.shape[2:])
    if shape == (z.shape[1], *spatial):
        return (
            " It has one channel per class: for a one-hot target, pass target.argmax(dim=1); for overlapping regions "
            "(sigmoid outputs), use one binary problem per region, see rplib.regions."
        )
    if shape in (spatial[1:], (1, *spatial[1:])):
        return (
            " The logits have one more axis than the target: a stack of deep supervision outputs (B, outputs, C, *spatial)? "
            "Unpack it with rplib.unstack."
        )
    return ""
