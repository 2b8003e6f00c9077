"""Verify the loss and gradient of an implementation on one input; only verified implementations are timed.

The reference is the formula in float64, sample by sample, to fit into memory at the paper's shape: weights from
`rplib.naive`, the gradient by the closed formula dL/dz_i(c, v) = w_ij(v) / n_ij (p_i(c, v) - [c = y_j(v)]).

Where both networks are equally confident up to float32 rounding (near-ties), an implementation may choose either
teacher: the reference adopts its choice, inferred from its gradient, and counts such voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rplib import naive
from rplib.options import Options

_EVERY_VOXEL = Options(confidence=None)  # mask 1: the weight is r_j itself
_EPS = Options().eps
# Entropy differences below this cannot be resolved in float32.
_FLOAT32_ENTROPY = 2e-6


@dataclass(frozen=True)
class Verdict:
    """Relative errors of loss and gradient (2-norm), near-ties, and whether the errors are within bounds."""

    loss_error: float
    gradient_error: float
    near_ties: int
    right: bool

    def __str__(self) -> str:
        return f"loss error {self.loss_error:.1e}, gradient error {self.gradient_error:.1e}, {self.near_ties} near-ties"


@dataclass(frozen=True)
class _Sample:
    """One sample in float64; (V,) each, one entry per network: entropy H_k, weight r_k as a teacher, label y_k."""

    entropies: list[Tensor]
    weights: list[Tensor]
    labels: list[Tensor]


class Truth:
    """The formula in float64 at one input; computed once for all implementations.

    Args:
        logits: two tensors (B, C, *spatial), any dtype.
        features: two tensors (B, F, *spatial).
    """

    def __init__(self, logits: Sequence[Tensor], features: Sequence[Tensor]) -> None:
        self._logits = [z.detach() for z in logits]
        self._samples = [
            _sample([z[b : b + 1] for z in self._logits], [f.detach()[b : b + 1] for f in features])
            for b in range(logits[0].shape[0])
        ]

    def judge(self, loss: Tensor, gradients: Sequence[Tensor], *, exact_order: bool) -> Verdict:
        """Compare one implementation's result.

        Args:
            loss: 0-dim.
            gradients: of ``loss`` with respect to the logits, two tensors (B, C, *spatial).
            exact_order: its confidence order must be exact even where both networks are almost certain.
        """
        classes = self._logits[0].shape[1]
        slack = 1e-12 if exact_order and classes == 2 else _FLOAT32_ENTROPY
        masks: list[list[Tensor]] = []  # per sample and student: (V,) bool
        near_ties, counts = 0, [0, 0]
        for b, sample in enumerate(self._samples):
            near = _near_ties(sample, slack)
            near_ties += int(near.sum())
            masks.append([])
            for i, j in ((0, 1), (1, 0)):
                own = (gradients[i].detach()[b].flatten(1) != 0).any(0)  # (V,)
                mask = torch.where(near, own, sample.entropies[i] > sample.entropies[j])
                masks[b].append(mask)
                counts[i] += int(mask.sum())
        value, wrong, size = 0.0, 0.0, 0.0
        for b, (sample, sample_masks) in enumerate(zip(self._samples, masks, strict=True)):
            for i, j in ((0, 1), (1, 0)):
                z = self._logits[i][b].flatten(1).double()  # (C, V)
                share = sample_masks[i] * sample.weights[j] / (counts[i] + _EPS)
                log_p = z.log_softmax(0)
                label = sample.labels[j][None]
                value -= float((share * log_p.gather(0, label)[0]).sum())
                slope = log_p.exp().scatter_add_(0, label, torch.full_like(z[:1], -1.0)).mul_(share)
                size += float(slope.square().sum())
                wrong += float(slope.sub_(gradients[i].detach()[b].flatten(1)).square_().sum())
        loss_error = _relative(abs(float(loss.detach()) - value), abs(value))
        gradient_error = _relative(wrong**0.5, size**0.5)
        loss_bound, gradient_bound = _bounds(gradients[0].dtype, exact_order)
        right = loss_error <= loss_bound and gradient_error <= gradient_bound  # False for NaN
        return Verdict(loss_error, gradient_error, near_ties, right)


def _sample(logits: list[Tensor], features: list[Tensor]) -> _Sample:
    z, f = [t.double() for t in logits], [t.double() for t in features]
    entropies = []
    for t in z:
        p = t.softmax(1)
        entropies.append(p.mul_((p + _EPS).log_()).sum(1).neg_().flatten())
    first, second = naive.maps(z, f, _EVERY_VOXEL)  # teacher 1, teacher 0
    by_teacher = {m.teacher: m for m in (first, second)}
    return _Sample(
        entropies,
        [by_teacher[k].weight.flatten() for k in range(2)],
        [by_teacher[k].pseudo_label.flatten() for k in range(2)],
    )


def _near_ties(sample: _Sample, slack: float) -> Tensor:
    """(V,) bool."""
    a, b = sample.entropies
    return (a - b).abs() <= torch.maximum(a.abs(), b.abs()) * 1e-6 + slack


def _bounds(dtype: torch.dtype, exact_order: bool) -> tuple[float, float]:
    """Largest relative errors of the loss (computed in float32 or better) and of the gradient (rounded to ``dtype``)."""
    if dtype == torch.float64:
        return 1e-12, 1e-12
    # Formulas in plain float32 subtract nearly equal numbers: p(y) - 1.
    single = 1e-6 if exact_order else 1e-5
    return single, single if dtype == torch.float32 else torch.finfo(dtype).eps


def _relative(error: float, size: float) -> float:
    return error / size if size else error
