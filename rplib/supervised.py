"""The supervised term: Dice, cross-entropy, or their mean, summed over the networks that learn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rplib import ranks
from rplib.dice import dice_loss
from rplib.inputs import valid_only
from rplib.supervision import Supervision
from rplib.targets import Target, is_index


def supervised_loss(
    logits: Sequence[Tensor], target: Target, supervision: Supervision, mask: Tensor | None, group: ranks.Group
) -> Tensor:
    """The supervised term for logits (B, C, *spatial), 0-dim; without a labelled voxel it is 0, connected to the graph."""
    truth = target.classes
    valid = None if mask is None else target.samples(mask)
    if supervision.ignore_index is not None:
        counted = ~is_index(truth, supervision.ignore_index)
        valid = counted if valid is None else valid & counted
    terms = []
    for z in logits:
        labelled = target.samples(z)
        dice = cross_entropy = None
        if supervision.supervised != "cross_entropy":
            dice = dice_loss(labelled, truth, supervision.dice_classes, group, valid)
        if supervision.supervised != "dice":
            cross_entropy = cross_entropy_loss(labelled, truth, group, valid)
        if dice is not None and cross_entropy is not None:
            terms.append((dice + cross_entropy) / 2)
        else:
            terms.append(cross_entropy if dice is None else dice)  # type: ignore[arg-type]
    return torch.stack(terms).sum()


def cross_entropy_loss(logits: Tensor, target: Tensor, process_group: ranks.Group = None, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of one network, mean over all labelled voxels.

    Args:
        logits: (B, C, *spatial), any floating dtype; computed in float32 or better.
        target: (B, *spatial), class indices.
        process_group: numerator and number of voxels are summed over its ranks; gradients are multiplied by their number.
        valid: (B, *spatial) bool, the voxels that count; None: all.

    Returns:
        0-dim, float32 (float64 for float64 logits); 0 (connected to the graph) where no voxel counts.

    Example:
        >>> cross_entropy_loss(torch.zeros(1, 4, 3), torch.tensor([[0, 1, 3]])).exp().round().item()
        4.0
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = valid_only(logits.to(dtype), None if valid is None else valid.unsqueeze(1))
    log_p = torch.log_softmax(z, dim=1).flatten(2)  # (B, C, V)
    truth = target.flatten(1).unsqueeze(1)  # (B, 1, V)
    # A sum over classes instead of an indexed read: its gradient needs no atomics, and labels outside 0..C-1 are harmless.
    chosen = truth == torch.arange(logits.shape[1], device=logits.device)[:, None]  # (B, C, V)
    if valid is None:
        count = torch.full((), target.numel(), dtype=torch.int64, device=logits.device)
    else:
        chosen, count = chosen & valid.flatten(1).unsqueeze(1), valid.sum()
    local = -torch.where(chosen, log_p, torch.zeros((), dtype=dtype, device=logits.device)).sum()
    numerator = ranks.as_one_process(local, ranks.detached_sum(local, process_group), process_group)
    return numerator / ranks.detached_sum(count, process_group).clamp_min(1)
