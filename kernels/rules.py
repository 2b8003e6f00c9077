"""The options of a call as one record: a constant of the kernels, and a string for operators, whose schemas have no records."""

from ast import literal_eval
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rplib.options import Options
from rplib.supervision import Supervision


class Rules(NamedTuple):
    """Options of the comparison, the weights and the sums.

    compare: there is a confidence. by_entropy: it is the entropy, else the largest probability. on_logits: cross-entropy on
    logits. detailed: sums for `rplib.ObjectiveStatistics` are kept. dice: the supervised term has Dice, of the ``chosen`` classes
    that are set in ``bits``. entropy: it has cross-entropy; with both it is their mean. masked: some voxels do not count.
    ignoring: nor do those with the label ``ignored`` in the supervised term. learns_a, learns_b: which networks are students.
    unlabelled: samples with a target take no part in the mutual term. summed: it is a sum, not a mean over the voxels taught.
    sample_weighted: every sample has a weight. reordered: the labelled samples are not the first ones. class_weighted: every
    class has one of ``class_weights``. eps: see the method. minimum: least probability of a teacher. temperature: of its
    probabilities in the weight.
    """

    compare: bool = True
    by_entropy: bool = True
    on_logits: bool = True
    detailed: bool = False
    dice: bool = False
    entropy: bool = False
    chosen: int = 1
    bits: int = 0
    masked: bool = False
    ignoring: bool = False
    learns_a: bool = True
    learns_b: bool = True
    unlabelled: bool = False
    summed: bool = False
    sample_weighted: bool = False
    reordered: bool = False
    class_weighted: bool = False
    eps: float = 1e-6
    ignored: float = 0.0
    minimum: float = 0.0
    temperature: float = 1.0
    class_weights: tuple[float, ...] = ()

    @property
    def supervised(self) -> bool:
        """There is a supervised term, and so a target."""
        return self.dice or self.entropy

    @property
    def partial(self) -> bool:
        """Some voxels take no part in the mutual term."""
        return self.masked or self.unlabelled

    @property
    def share(self) -> float:
        """Weight of Dice and of cross-entropy in the supervised term."""
        return 0.5 if self.dice and self.entropy else 1.0


# The last fields: an operator takes them as numbers.
_NUMBERS = ("eps", "ignored", "minimum", "temperature", "class_weights")


def rules_of(
    options: Options,
    supervision: Supervision | None = None,
    classes: int = 0,
    *,
    masked: bool = False,
    sample_weighted: bool = False,
    reordered: bool = False,
) -> Rules:
    """The record of a call with C ``classes``; ``supervision``: the objective's options; None for the loss alone."""
    rules = Rules(
        compare=options.confidence is not None,
        by_entropy=options.confidence == "entropy",
        on_logits=options.cross_entropy_on == "logits",
        masked=masked,
        learns_a=options.students is None or 0 in options.students,
        learns_b=options.students is None or 1 in options.students,
        summed=options.reduction == "sum",
        sample_weighted=sample_weighted,
        reordered=reordered,
        class_weighted=options.class_weights is not None,
        minimum=float(options.minimum_confidence or 0.0),
        temperature=float(options.temperature),
        class_weights=tuple(float(weight) for weight in options.class_weights or ()),
        eps=options.eps,
    )
    if supervision is None:
        return rules
    chosen = range(1, classes) if supervision.dice_classes is None else supervision.dice_classes
    return rules._replace(
        detailed=supervision.statistics,
        dice=supervision.supervised != "cross_entropy",
        entropy=supervision.supervised != "dice",
        chosen=len(chosen),
        bits=sum([1 << c for c in chosen]),
        unlabelled=supervision.mutual_on == "unlabelled",
        ignoring=supervision.ignore_index is not None,
        ignored=0.0 if supervision.ignore_index is None else float(supervision.ignore_index),
    )


class Encoded(NamedTuple):
    """`Rules` as an operator takes them; torch.compile may turn numbers into symbols, but never a string."""

    literal: str
    numbers: list[float]


def encoded(rules: Rules) -> Encoded:
    values = [repr(value) for name, value in zip(rules._fields, rules, strict=True) if name not in _NUMBERS]
    numbers = [rules.eps, rules.ignored, rules.minimum, rules.temperature, *rules.class_weights]
    return Encoded(",".join(values), numbers)


def decoded(literal: str, numbers: Sequence[float] = ()) -> Rules:
    """Inverse of `encoded`. Shapes do not depend on the numbers, so shape functions leave them out."""
    return _decoded(literal, tuple(numbers))


@lru_cache(maxsize=256)
def _decoded(literal: str, numbers: tuple[float, ...]) -> Rules:
    single = len(_NUMBERS) - 1
    return Rules(*literal_eval(literal), *numbers[:single], *([numbers[single:]] if numbers else []))
