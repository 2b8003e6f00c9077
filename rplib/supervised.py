"""The supervised term: Dice, cross-entropy, or their mean, summed over the networks that learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rplib import ranks
from rplib.dice import dice_loss
from rplib.inputs import valid_only
from rplib.targets import Target, check_dice_classes, is_index

Supervised = Literal["dice", "cross_entropy", "dice+cross_entropy"]
MutualOn = Literal["all", "unlabelled"]
_ALLOWED = {"supervised": ("dice", "cross_entropy", "dice+cross_entropy"), "mutual_on": ("all", "unlabelled")}


@dataclass(frozen=True)
class Supervision:
    """Keywords of `rplib.MutualObjective`, where they are documented, that are not the loss's.

    Raises:
        ValueError, TypeError: a keyword has a value that it does not know.
    """

    dice_weight: float = 0.5
    dice_classes: tuple[int, ...] | None = None
    supervised: Supervised = "dice"
    ignore_index: int | None = None
    statistics: bool = False
    mutual_on: MutualOn = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dice_classes", check_dice_classes(self.dice_classes))
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
        if self.ignore_index is not None and (isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int)):
            raise TypeError(f"ignore_index is {self.ignore_index!r}; expected an integer label such as 255, or None.")
        if not isinstance(self.statistics, bool):
            raise TypeError(f"statistics is {self.statistics!r}; expected True or False.")

    def check_classes(self, z: Tensor) -> None:
        """Refuse classes that logits z (B, C, *spatial) do not have."""
        if self.dice_classes is not None and max(self.dice_classes) >= z.shape[1]:
            raise ValueError(f"dice_classes is {self.dice_classes} but logits[0] has {z.shape[1]} classes.")


def supervised_loss(
    logits: Sequence[Tensor], target: Target, supervision: Supervision, mask: Tensor | None, group: ranks.Group
) -> Tensor:
    """The term of networks with logits (B, C, *spatial), a 0-dim tensor; 0, connected to the graph, without a labelled voxel."""
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
    # A sum over classes, not an indexed read: it has a gradient without atomics, and asks for no valid index.
    chosen = truth == torch.arange(logits.shape[1], device=logits.device)[:, None]  # (B, C, V)
    if valid is None:
        count = torch.full((), target.numel(), dtype=torch.int64, device=logits.device)
    else:
        chosen, count = chosen & valid.flatten(1).unsqueeze(1), valid.sum()
    local = -torch.where(chosen, log_p, torch.zeros((), dtype=dtype, device=logits.device)).sum()
    numerator = ranks.as_one_process(local, ranks.detached_sum(local, process_group), process_group)
    return numerator / ranks.detached_sum(count, process_group).clamp_min(1)
