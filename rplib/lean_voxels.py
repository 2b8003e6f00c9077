"""The arithmetic of the lean form on one piece of voxels: softmax, comparison, cross-entropy and its gradient.

Rounding. With l the class of the largest logit, e_c = exp(z_c - z_l) and rest = sum_{c != l} e_c, the probabilities are
p_c = e_c / (1 + rest), the complement 1 - p_l = rest / (1 + rest) and the cross-entropy log1p(rest) + z_l - z_y: none of them
subtracts nearly equal numbers, so confident voxels keep their gradient. For C = 2 the entropy decreases strictly as |z_1 - z_0|
grows, for every eps. So margins are compared (exactly, with the rounding error of the subtraction) and no entropy is computed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rplib.options import Options

# Voxels per piece: on a CPU 16 feature channels of float32 are 4 MB; elsewhere the piece bounds memory, not cache misses.
_PIECE_CPU = 1 << 16
_PIECE_ELSEWHERE = 1 << 22


class Network(NamedTuple):
    """One network's softmax at some voxels, in the form that keeps small numbers (see the module docstring)."""

    top: Tensor  # (b, 1, v) largest logit
    label: Tensor  # (b, 1, v) int64, its class: the first maximum
    rest: Tensor  # (b, 1, v) sum of exp(z_c - top) over the other classes
    p: Tensor  # (b, C, v) probabilities


Uncertainty = tuple[Tensor, Tensor | None]  # each (b, 1, v)


def network_at(z: Tensor) -> Network:
    top, label = z.max(dim=1, keepdim=True)  # (b, 1, v), the first maximum
    e = torch.exp(z - top)
    classes = torch.arange(z.shape[1], device=z.device)[:, None]
    rest = e.masked_fill(classes == label, 0).sum(dim=1, keepdim=True)
    return Network(top, label, rest, e / (1 + rest))


def uncertainty(z: Tensor, network: Network, options: Options) -> Uncertainty:
    """A number that grows as the network's confidence falls, and for C = 2 the rounding error of that number."""
    if z.shape[1] == 2:
        # Knuth's two-sum of z_1 + (-z_0): margin + error is exact.
        a, b = z[:, 1:], -z[:, :1]
        margin = a + b
        b_part = margin - a
        error = (a - (margin - b_part)) + (b - b_part)
        return -margin.abs(), torch.where(margin < 0, error, -error)
    if options.confidence == "max_probability":
        return network.rest, None  # max_c p = 1 / (1 + rest)
    return -(network.p * torch.log(network.p + options.eps)).sum(dim=1, keepdim=True), None


def teaches(
    student: Uncertainty, teacher: Uncertainty, teaching: Network, options: Options, valid: Tensor | None = None
) -> Tensor:
    """m_ij: (b, 1, v) bool; False outside ``valid``, (b, 1, v)."""
    mask = _more_confident(student, teacher, options)
    if options.minimum_confidence is not None:
        mask = mask & (1 / (1 + teaching.rest) >= options.minimum_confidence)
    return mask if valid is None else mask & valid


def reliability(s: Tensor, z: Tensor, network: Network, options: Options) -> Tensor:
    """r_j from similarities (b, C, v): (b, 1, v)."""
    p = network.p if options.temperature == 1 else network_at(z / options.temperature).p
    return 1 - (s - p).square().mean(dim=1, keepdim=True)


def class_factor(label: Tensor, options: Options, dtype: torch.dtype) -> Tensor | None:
    """Factor of the weight of voxels with this pseudo-label (b, 1, v); None for 1."""
    if options.class_weights is None:
        return None
    return torch.tensor(options.class_weights, dtype=dtype, device=label.device)[label]


def _more_confident(student: Uncertainty, teacher: Uncertainty, options: Options) -> Tensor:
    (student_uncertainty, student_error), (teacher_uncertainty, teacher_error) = student, teacher
    if options.confidence is None:
        return torch.ones_like(student_uncertainty, dtype=torch.bool)
    more = student_uncertainty > teacher_uncertainty
    if student_error is None or teacher_error is None:
        return more
    return more | ((student_uncertainty == teacher_uncertainty) & (student_error > teacher_error))


def cross_entropy(z: Tensor, network: Network, label: Tensor, options: Options) -> Tensor:
    """CE_ij: (b, 1, v)."""
    if options.cross_entropy_on == "logits":
        return torch.log1p(network.rest) + (network.top - z.gather(1, label))
    return network.p.exp().sum(dim=1, keepdim=True).log() - network.p.gather(1, label)


def slope(network: Network, label: Tensor, options: Options) -> Tensor:
    """dCE_ij / dz_i: (b, C, v)."""
    p = network.p
    classes = torch.arange(p.shape[1], device=p.device)[:, None]
    own = classes == network.label
    if options.cross_entropy_on == "logits":
        # p - [c = l] without cancellation, then move the 1 from l to y where the two networks disagree.
        return torch.where(own, -network.rest / (1 + network.rest), p) + (own.to(p.dtype) - (classes == label).to(p.dtype))
    # p(c) (D(c) - sum_q p(q) D(q)) with D = d - d(l): a shift cancels in the formula, and D(l) = 0 keeps small numbers.
    d = torch.softmax(p, dim=1) - (classes == label).to(p.dtype)
    shifted = d - d.gather(1, network.label)
    return p * (shifted - (p * shifted).sum(dim=1, keepdim=True))


def compute_dtype(logits: list[Tensor], features: list[Tensor] | None) -> torch.dtype:
    double = any(t.dtype == torch.float64 for t in [*logits, *(features or [])])
    return torch.float64 if double else torch.float32


def pieces(batch: int, voxels: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of samples, each with the voxel ranges to process."""
    if torch.compiler.is_compiling():
        yield slice(0, batch), [slice(0, voxels)]
        return
    size = _PIECE_CPU if device.type == "cpu" else _PIECE_ELSEWHERE
    together = max(1, size // voxels)
    for b in range(0, batch, together):
        yield slice(b, b + together), [slice(v, v + size) for v in range(0, voxels, size)]
