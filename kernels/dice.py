"""The supervised term inside the same passes: sums over labelled voxels, and what they make of a voxel's gradient.

Per network, over all labelled samples together, with g_c the indicator of class c in the target:

    overlap_c = sum_v p(c,v) g_c(v)        soft_c = sum_v p(c,v)        truth_c = sum_v g_c(v)
    Dice      = mean over the chosen classes of 1 - (2 overlap_c + s) / size_c,   size_c = soft_c + truth_c + s,   s = 1e-8

    dDice/dp(c,v) = u_c(v) = alpha_c g_c(v) + beta_c
    alpha_c = -2 / (n size_c)     beta_c = (2 overlap_c + s) / (n size_c^2)     n chosen classes; 0 for the others
    dDice/dz(c,v) = p(c,v) (u_c(v) - sum_q p(q,v) u_q(v));   for C = 2: p(0) p(1) (u_0 - u_1), and the negative

The sums lie in one vector behind the value that marks non-finite input (see statistics.py):

    [poison, overlap_a (C), overlap_b (C), soft_a (C), soft_b (C), truth (C)]
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import pick

_SMOOTH = tl.constexpr(1e-8)


@triton.jit
def load_target(target, offsets, labelled, valid, MASKED: tl.constexpr):
    """Class of every voxel as float32, -1 where there is no label; ``labelled``: a scalar, the sample has labels."""
    if MASKED:
        known = valid & labelled
    else:
        known = tl.broadcast_to(labelled, offsets.shape)  # one value for the whole tile, so that wide loads stay wide
    t = tl.load(target + offsets, mask=known, other=0).to(tl.float32)
    return tl.where(known, t, -1.0), known


@triton.jit
def _chosen(cls, LOW: tl.constexpr, HIGH: tl.constexpr):
    """True for the classes in the mean: bits of LOW (classes 0..31) and HIGH (32..63)."""
    c = cls.to(tl.int64)
    low = tl.full(cls.shape, LOW, tl.int64) >> tl.minimum(c, 31)
    high = tl.full(cls.shape, HIGH, tl.int64) >> tl.maximum(c - 32, 0)
    return (tl.where(c < 32, low, high) & 1) != 0


@triton.jit
def _sums_of(sums, network, cls, CLASSES: tl.constexpr):
    """(overlap, soft + truth) of one network (0 or 1), shaped as cls."""
    inside = cls < CLASSES
    at = sums + 1 + cls
    overlap = tl.load(at + network * CLASSES, mask=inside, other=0.0)
    soft = tl.load(at + (2 + network) * CLASSES, mask=inside, other=0.0)
    truth = tl.load(at + 4 * CLASSES, mask=inside, other=0.0)
    return overlap, soft + truth


@triton.jit
def dice_value(
    sums, network, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, CHOSEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):  # fmt: skip
    """Dice loss of one network; CHOSEN classes in the mean."""
    cls = tl.arange(0, CLASSES_PAD)
    overlap, size = _sums_of(sums, network, cls, CLASSES)
    term = 1.0 - (2.0 * overlap + _SMOOTH) / (size + _SMOOTH)
    return tl.sum(tl.where(_chosen(cls, LOW, HIGH), term, 0.0), axis=0) / CHOSEN


@triton.jit
def dice_coefficients(
    sums, network, factor, cls, CLASSES: tl.constexpr, CHOSEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):  # fmt: skip
    """factor * (alpha, beta) of one network, shaped as cls."""
    overlap, size = _sums_of(sums, network, cls, CLASSES)
    inverse = 1.0 / (size + _SMOOTH)
    chosen = _chosen(cls, LOW, HIGH)
    share = factor / CHOSEN
    alpha = tl.where(chosen, -2.0 * inverse * share, 0.0)
    beta = tl.where(chosen, (2.0 * overlap + _SMOOTH) * inverse * inverse * share, 0.0)
    return alpha, beta


@triton.jit
def dice_slope(p, rest, alpha, beta, t, cls, CLASSES: tl.constexpr):
    """dDice/dz (CLASSES_PAD, ...) of a network at voxels of class t (...); of class 0 alone, (...), for C = 2."""
    u = tl.where(cls.to(tl.float32) == tl.expand_dims(t, 0), alpha, 0.0) + beta
    if CLASSES == 2:
        # p(0) p(1) = rest / (1 + rest)^2, whichever class is the larger
        return rest / ((1.0 + rest) * (1.0 + rest)) * (pick(u, cls, 0) - pick(u, cls, 1))
    else:
        return p * (u - tl.expand_dims(tl.sum(p * u, axis=0), 0))
