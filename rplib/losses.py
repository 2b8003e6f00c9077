"""The loss and the whole training objective as modules."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from rplib.functional import loss_with, objective_with
from rplib.options import Confidence, CrossEntropyOn, Implementation, Options, Weighting
from rplib.ranks import Group


class ReliableMutualLoss(nn.Module):
    """The reliable-pseudo-label loss as a module without parameters.

    Keywords, shapes, errors and source: `rplib.functional.reliable_mutual_loss`.

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
    ) -> None:
        super().__init__()
        self.options = Options(confidence, weighting, cross_entropy_on, eps, impl, check_finite, process_group)

    def forward(self, logits: Sequence[Tensor], features: Sequence[Tensor] | None = None) -> Tensor:
        """Loss of K networks' logits (B, C, *spatial) and features (B, F, *spatial): 0-dim."""
        return loss_with(self.options, logits, features)

    def extra_repr(self) -> str:
        """The keywords, for print(module)."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


class ObjectiveTerms(NamedTuple):
    """total: 0-dim, to call backward on; dice and mutual: 0-dim, detached, to log."""

    total: Tensor
    dice: Tensor
    mutual: Tensor


class MutualObjective(nn.Module):
    """The whole training objective: L = dice_weight * sum_k Dice_k + consistency_weight * L_mutual.

    Args:
        dice_weight: factor of the supervised term; the paper has 0.5.
        dice_classes: classes in the mean of the Dice loss; None is 1..C-1.
        **keywords: those of `ReliableMutualLoss`.

    Raises:
        ValueError: a keyword or class that does not fit.

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
        confidence: Confidence | None = "entropy",
        weighting: Weighting | None = "similarity",
        cross_entropy_on: CrossEntropyOn = "logits",
        eps: float = 1e-6,
        impl: Implementation = "auto",
        check_finite: bool = False,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        if dice_classes is not None and (len(dice_classes) == 0 or min(dice_classes) < 0):
            raise ValueError(f"dice_classes is {tuple(dice_classes)}; expected class indices such as (1,), or None.")
        self.dice_weight = dice_weight
        self.dice_classes = None if dice_classes is None else tuple(dice_classes)
        self.mutual_loss = ReliableMutualLoss(
            confidence=confidence,
            weighting=weighting,
            cross_entropy_on=cross_entropy_on,
            eps=eps,
            impl=impl,
            check_finite=check_finite,
            process_group=process_group,
        )

    def forward(
        self,
        logits: Sequence[Tensor],
        features: Sequence[Tensor] | None,
        target: Tensor,
        consistency_weight: float | Tensor,
    ) -> ObjectiveTerms:
        """Compute the objective.

        Args:
            logits: K tensors (B, C, *spatial).
            features: K tensors (B, F, *spatial).
            target: (B_l, *spatial) or (B_l, 1, *spatial), integer, bool or float class indices of the first B_l samples;
                B_l = 0 gives Dice 0.
            consistency_weight: a float, or a 0-dim tensor (a CUDA graph needs the tensor).

        Raises:
            ValueError: target does not fit the logits, besides what the loss raises.
        """
        options = self.mutual_loss.options
        weights = self.dice_weight, self.dice_classes, consistency_weight
        return ObjectiveTerms(*objective_with(options, logits, features, target, *weights))
