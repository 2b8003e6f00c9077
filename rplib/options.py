"""The keywords of the loss, checked once."""

from dataclasses import dataclass
from typing import Any, Literal

from rplib.ranks import Group, check_group, picklable

Confidence = Literal["entropy", "max_probability"]
Weighting = Literal["similarity"]
CrossEntropyOn = Literal["logits", "probabilities"]
Implementation = Literal["auto", "triton", "torch", "naive"]

_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "confidence": ("entropy", "max_probability", None),
    "weighting": ("similarity", None),
    "cross_entropy_on": ("logits", "probabilities"),
    "impl": ("auto", "triton", "torch", "naive"),
}


@dataclass(frozen=True)
class Options:
    """Keywords of `rplib.functional.reliable_mutual_loss`, where they are documented.

    Raises:
        ValueError: a keyword has a value that it does not know.
    """

    confidence: Confidence | None = "entropy"
    weighting: Weighting | None = "similarity"
    cross_entropy_on: CrossEntropyOn = "logits"
    eps: float = 1e-6
    impl: Implementation = "auto"
    check_finite: bool = False
    process_group: Group = None
    students: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 < self.eps < float("inf"):
            raise ValueError(f"eps is {self.eps!r}; expected a positive finite number such as 1e-6.")
        if not isinstance(self.check_finite, bool):
            raise ValueError(f"check_finite is {self.check_finite!r}; expected True or False.")
        check_group(self.process_group)
        _check_students(self.students)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Options":
        return self  # nothing in it changes, and a process group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process_group": picklable(self.process_group)}

    def check_networks(self, networks: int) -> None:
        """Refuse students that ``networks`` networks do not have."""
        if self.students is not None and max(self.students) >= networks:
            raise ValueError(f"students is {self.students} but logits holds {networks} networks, counted from 0.")


def _check_students(students: object) -> None:
    if students is None:
        return
    numbers = isinstance(students, tuple) and all(isinstance(k, int) and not isinstance(k, bool) for k in students)
    if not numbers or not students or min(students) < 0 or len(set(students)) < len(students):
        raise ValueError(
            f"students is {students!r}; expected a tuple of different network indices such as (0,), or None for all networks."
        )
