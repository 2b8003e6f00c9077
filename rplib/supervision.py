"""The keywords that the objective has in addition to those of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Supervised = Literal["dice", "cross_entropy", "dice+cross_entropy"]
MutualOn = Literal["all", "unlabelled"]
_ALLOWED = {"supervised": ("dice", "cross_entropy", "dice+cross_entropy"), "mutual_on": ("all", "unlabelled")}


@dataclass(frozen=True)
class Supervision:
    """The keywords that `rplib.MutualObjective`, which documents them, has in addition to those of the loss.

    Raises:
        ValueError, TypeError: a keyword has an invalid value.
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
        """Reject classes that logits z (B, C, *spatial) do not have."""
        if self.dice_classes is not None and max(self.dice_classes) >= z.shape[1]:
            raise ValueError(f"dice_classes is {self.dice_classes} but logits[0] has {z.shape[1]} classes.")


def check_dice_classes(dice_classes: Sequence[int] | None) -> tuple[int, ...] | None:
    """Different, non-negative class indices.

    Raises:
        ValueError: states what was given and what was expected.
    """
    if dice_classes is None:
        return None
    classes = tuple(dice_classes)
    if not classes or min(classes) < 0 or len(set(classes)) < len(classes):
        raise ValueError(f"dice_classes is {classes}; expected different class indices such as (1,), or None for 1..C-1.")
    return classes
