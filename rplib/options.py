"""The keywords of the loss, checked on creation."""

from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from rplib.ranks import Group, check_group, picklable

Confidence = Literal["entropy", "max_probability"]
Weighting = Literal["similarity"]
CrossEntropyOn = Literal["logits", "probabilities"]
Implementation = Literal["auto", "triton", "torch", "naive"]
Prototypes = Literal["sample", "batch", "average"]
Reduction = Literal["mean", "sum", "none"]

_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "confidence": ("entropy", "max_probability", None),
    "weighting": ("similarity", None),
    "cross_entropy_on": ("logits", "probabilities"),
    "impl": ("auto", "triton", "torch", "naive"),
    "prototypes": ("sample", "batch", "average"),
    "reduction": ("mean", "sum", "none"),
}


@dataclass(frozen=True)
class Options:
    """Keywords of `rplib.functional.reliable_mutual_loss`, where they are documented.

    Raises:
        ValueError: a keyword has an invalid value.
    """

    confidence: Confidence | None = "entropy"
    weighting: Weighting | None = "similarity"
    cross_entropy_on: CrossEntropyOn = "logits"
    eps: float = 1e-6
    impl: Implementation = "auto"
    check_finite: bool = False
    process_group: Group = None
    students: tuple[int, ...] | None = None
    minimum_confidence: float | None = None
    temperature: float = 1.0
    class_weights: tuple[float, ...] | None = None
    prototypes: Prototypes = "sample"
    reduction: Reduction = "mean"
    prototype_decay: float = 0.99  # only for the modules, which keep the averages

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")
        for name, example in (("eps", "1e-6"), ("temperature", "1.0")):
            if not _is_number(value := getattr(self, name)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; expected a positive finite number such as {example}.")
        least = self.minimum_confidence
        if least is not None and (not _is_number(least) or not 0 <= least <= 1):
            raise ValueError(f"minimum_confidence is {least!r}; expected a probability such as 0.95, or None.")
        if not _is_number(self.prototype_decay) or not 0 <= self.prototype_decay < 1:
            raise ValueError(f"prototype_decay is {self.prototype_decay!r}; expected 0 <= prototype_decay < 1, such as 0.99.")
        if not isinstance(self.check_finite, bool):
            raise ValueError(f"check_finite is {self.check_finite!r}; expected True or False.")
        check_group(self.process_group)
        _check_students(self.students)
        _check_class_weights(self.class_weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Options":
        return self  # it is immutable, and a process group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process_group": picklable(self.process_group)}

    def check_sizes(self, networks: int, classes: int) -> None:
        """Reject students and class weights that do not fit K networks of C classes."""
        if self.students is not None and max(self.students) >= networks:
            raise ValueError(f"students is {self.students} but logits has {networks} networks; expected indices below that.")
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(f"class_weights has {len(self.class_weights)} numbers but logits[0] has {classes} classes.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_class_weights(weights: object) -> None:
    if weights is None:
        return
    if not isinstance(weights, tuple) or not weights or not all(_is_number(w) and 0 <= w < float("inf") for w in weights):
        raise ValueError(f"class_weights is {weights!r}; expected a tuple of C numbers >= 0, such as (0.5, 1.0), or None.")


def _check_students(students: object) -> None:
    if students is None:
        return
    given = students if isinstance(students, tuple) else ()
    indices = {k for k in given if isinstance(k, int) and not isinstance(k, bool) and k >= 0}
    if not indices or len(indices) < len(given):
        raise ValueError(
            f"students is {students!r}; expected a tuple of different network indices such as (0,), or None for all networks."
        )
