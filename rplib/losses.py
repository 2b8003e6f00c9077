"""The loss and the whole training objective as modules."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from rplib.averages import PrototypeAverages
from rplib.functional import loss_with, reliability_with
from rplib.maps import Reliability
from rplib.objective import objective_with
from rplib.options import Confidence, CrossEntropyOn, Implementation, Options, Prototypes, Reduction, Weighting
from rplib.ranks import Group
from rplib.statistics import ObjectiveStatistics
from rplib.supervision import MutualOn, Supervised, Supervision
from rplib.targets import Labelled


class ReliableMutualLoss(nn.Module):
    """The reliable-pseudo-label loss as a module without parameters.

    Keywords, shapes, errors and source: see `rplib.functional.reliable_mutual_loss`. The module adds two keywords:

    Args:
        prototypes: also ``"average"``: the mean features of a class are averaged over the calls, for batches with few voxels
            of a class or none. The means are summed over ``process_group``, saved in ``state_dict()`` and updated only in
            training mode; ``reset_prototypes()`` discards them. Call the module once before compiling it.
        prototype_decay: weight of earlier calls in that average. With 0, the means are those of ``"batch"``, but a class that a
            batch lacks keeps its mean.

    Example:
        >>> import torch
        >>> import rplib
        >>> loss_fn = rplib.ReliableMutualLoss()
        >>> logits = [torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 2, 4, 4)]
        >>> features = [torch.ones(1, 8, 4, 4), torch.ones(1, 8, 4, 4)]
        >>> loss_fn(logits, features).item()  # identical networks have nothing to teach each other
        0.0
    """

    def __init__(
        self,
        *,
        confidence: Confidence | None = "entropy",
        weighting: Weighting | None = "similarity",
        cross_entropy_on: CrossEntropyOn = "logits",
        eps: float = 1e-6,
        impl: Implementation = "auto",
        check_finite: bool = False,
        process_group: Group = None,
        students: tuple[int, ...] | None = None,
        minimum_confidence: float | None = None,
        temperature: float = 1.0,
        class_weights: tuple[float, ...] | None = None,
        prototypes: Prototypes = "sample",
        reduction: Reduction = "mean",
        prototype_decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.options = Options(
            confidence, weighting, cross_entropy_on, eps, impl, check_finite, process_group, students,
            minimum_confidence, temperature, class_weights, prototypes, reduction, prototype_decay,
        )  # fmt: skip
        self.averages = PrototypeAverages(prototype_decay) if prototypes == "average" else None

    def forward(
        self,
        logits: Sequence[Tensor],
        features: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        sample_weights: Tensor | Sequence[float] | None = None,
    ) -> Tensor:
        """The 0-dim loss of K logits (B, C, *spatial) and K features (B, F, *spatial), where mask (B, *spatial) is True."""
        return loss_with(self.options, logits, features, mask, sample_weights, self.averages)

    def reliability(
        self,
        logits: Sequence[Tensor],
        features: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        sample_weights: Tensor | Sequence[float] | None = None,
    ) -> list[Reliability]:
        """`rplib.reliability` with the keywords and averages of this module, without updating the averages."""
        if self.averages is None or not self.averages.training:
            return reliability_with(self.options, logits, features, mask, sample_weights, self.averages)
        self.averages.eval()
        try:
            return reliability_with(self.options, logits, features, mask, sample_weights, self.averages)
        finally:
            self.averages.train()

    def reset_prototypes(self) -> None:
        """Discard the averages of ``prototypes="average"``; the next call starts again like the first."""
        if self.averages is not None:
            self.averages.reset()

    def extra_repr(self) -> str:
        """The keywords, for print(module)."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


class ObjectiveTerms(NamedTuple):
    """total: 0-dim, to call backward on; dice and mutual: 0-dim, detached, to log.

    ``dice`` is the supervised term, whatever ``supervised=`` selects.
    """

    total: Tensor
    dice: Tensor
    mutual: Tensor


class ObjectiveTermsAndStatistics(NamedTuple):
    """`ObjectiveTerms`, and the field that ``statistics=True`` adds."""

    total: Tensor
    dice: Tensor
    mutual: Tensor
    statistics: ObjectiveStatistics


class MutualObjective(nn.Module):
    """The whole training objective: L = dice_weight * sum_k S_k + consistency_weight * L_mutual.

    Args:
        dice_weight: factor of the supervised term S; 0.5 in the paper.
        dice_classes: classes in the mean of the Dice loss; None is 1..C-1.
        supervised: ``"dice"``, as in the paper; ``"cross_entropy"``, its mean over labelled voxels; ``"dice+cross_entropy"``,
            the mean of the two. Summed over the networks that learn.
        ignore_index: label of voxels that the supervised term ignores (scribbles, unlabelled slices); the mutual term includes
            them. Any other label outside 0..C-1 is an error. On a GPU, where a check would wait for the device, it makes the
            loss NaN instead.
        statistics: the result has a fourth field, `rplib.ObjectiveStatistics`.
        mutual_on: samples of the mutual term: ``"all"``, as in the paper, or the ``"unlabelled"`` ones.
        **keywords: those of `ReliableMutualLoss`.

    Raises:
        ValueError, TypeError: an invalid keyword or class.

    Source: Su et al., Medical Image Analysis 94 (2024) 103111.

    Example:
        >>> import torch
        >>> import rplib
        >>> objective = rplib.MutualObjective()
        >>> logits = [torch.randn(4, 2, 8, 8, 8, requires_grad=True) for _ in range(2)]
        >>> features = [torch.randn(4, 16, 8, 8, 8) for _ in range(2)]
        >>> target = torch.randint(0, 2, (2, 8, 8, 8))  # the first two of four samples are labelled
        >>> terms = objective(logits, features, target, consistency_weight=rplib.ramp(1))
        >>> terms.total.backward()
        >>> terms.dice.requires_grad, terms.mutual.requires_grad
        (False, False)
    """

    def __init__(
        self,
        dice_weight: float = 0.5,
        dice_classes: Sequence[int] | None = None,
        *,
        supervised: Supervised = "dice",
        ignore_index: int | None = None,
        statistics: bool = False,
        mutual_on: MutualOn = "all",
        confidence: Confidence | None = "entropy",
        weighting: Weighting | None = "similarity",
        cross_entropy_on: CrossEntropyOn = "logits",
        eps: float = 1e-6,
        impl: Implementation = "auto",
        check_finite: bool = False,
        process_group: Group = None,
        students: tuple[int, ...] | None = None,
        minimum_confidence: float | None = None,
        temperature: float = 1.0,
        class_weights: tuple[float, ...] | None = None,
        prototypes: Prototypes = "sample",
        reduction: Reduction = "mean",
        prototype_decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.supervision = Supervision(
            dice_weight, None if dice_classes is None else tuple(dice_classes), supervised, ignore_index, statistics, mutual_on
        )
        self.mutual_loss = ReliableMutualLoss(
            confidence=confidence,
            weighting=weighting,
            cross_entropy_on=cross_entropy_on,
            eps=eps,
            impl=impl,
            check_finite=check_finite,
            process_group=process_group,
            students=students,
            minimum_confidence=minimum_confidence,
            temperature=temperature,
            class_weights=class_weights,
            prototypes=prototypes,
            reduction=reduction,
            prototype_decay=prototype_decay,
        )
        if reduction == "none":
            raise ValueError('reduction is "none"; expected "mean" or "sum": the objective is one number.')

    def forward(
        self,
        logits: Sequence[Tensor],
        features: Sequence[Tensor] | None,
        target: Tensor,
        consistency_weight: float | Tensor,
        mask: Tensor | None = None,
        labelled: Labelled = None,
        sample_weights: Tensor | Sequence[float] | None = None,
    ) -> ObjectiveTerms | ObjectiveTermsAndStatistics:
        """Compute the objective.

        Args:
            logits: K tensors (B, C, *spatial).
            features: K tensors (B, F, *spatial).
            target: (B_l, *spatial) or (B_l, 1, *spatial), integer, bool or float class indices of the labelled samples;
                B_l = 0 makes the supervised term 0.
            consistency_weight: a number, or a tensor of one element (required for a CUDA graph).
            mask: (B, *spatial) bool, True where a voxel counts, in both terms; None: everywhere.
            labelled: the samples of the batch that the target belongs to. None: the first B_l. Otherwise their number, their
                indices in the order of the target, or a bool mask (B,). The target may also have all B samples; the entries
                of unlabelled ones are ignored. Pass numbers or a CPU tensor: a GPU tensor synchronises with the device.
            sample_weights: (B,) non-negative numbers, factors of the samples' weights in the mutual term; None: 1 for all.

        Returns:
            `ObjectiveTerms`: total, dice, mutual; with ``statistics=True`` `ObjectiveTermsAndStatistics`.

        Raises:
            TypeError, ValueError: target, weight, mask or labelled do not fit the logits; target contains values that are not
                classes; in addition, the errors of the loss.
        """
        options = self.mutual_loss.options
        total, dice, mutual, statistics = objective_with(
            options, self.supervision, logits, features, target, consistency_weight, mask, labelled, sample_weights,
            self.mutual_loss.averages,
        )  # fmt: skip
        if statistics is None:
            return ObjectiveTerms(total, dice, mutual)
        return ObjectiveTermsAndStatistics(total, dice, mutual, statistics)

    def reset_prototypes(self) -> None:
        """Discard the averages of ``prototypes="average"``; the next call starts again like the first."""
        self.mutual_loss.reset_prototypes()

    def extra_repr(self) -> str:
        """The keywords of the supervised term, for print(module)."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.supervision).items())
