"""The supervised term, computed in the same passes: its sums over the labelled voxels, and its gradient at a voxel.

Per network, over all labelled samples together, with g_c the indicator of class c in the target:

    overlap_c = sum_v p(c,v) g_c(v)        soft_c = sum_v p(c,v)        truth_c = sum_v g_c(v)
    Dice      = mean over the chosen classes of 1 - (2 overlap_c + s) / size_c,   size_c = soft_c + truth_c + s,   s = 1e-8

    dDice/dp(c,v) = u_c(v) = alpha_c g_c(v) + beta_c
    alpha_c = -2 / (n size_c)     beta_c = (2 overlap_c + s) / (n size_c^2)     n chosen classes; 0 for the others
    dDice/dz(c,v) = p(c,v) (u_c(v) - sum_q p(q,v) u_q(v));   for C = 2: p(0) p(1) (u_0 - u_1), and the negative

Cross-entropy is the mean over the labelled voxels, sum_v CE(v) / max(sum_c truth_c, 1); its slope is that of voxels.py. With both
terms each counts half.

The sums lie in one vector behind the value that marks non-finite input (see statistics.py):

    [nonfinite, overlap_a (C), overlap_b (C), soft_a (C), soft_b (C), truth (C), and with cross-entropy its sums of a and b]

Without Dice its first four entries are 0.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from rplib.kernels.voxels import first_slope, probabilities, slope

_SMOOTH = tl.constexpr(1e-8)


@triton.jit
def load_target(target, offsets, labelled, valid, keep, RULES: tl.constexpr, MASKED: tl.constexpr):
    """Class of every voxel as float32, -1 where no label counts; ``labelled``: a scalar, the sample has labels."""
    if MASKED:
        known = valid & labelled
    else:
        known = tl.broadcast_to(labelled, offsets.shape)  # one value for the whole block, so that wide loads stay wide
    t = tl.load(target + offsets, mask=known, other=0).to(tl.float32)
    if RULES.ignoring:
        known = known & (t != RULES.ignored)
    if RULES.masked:
        known = known & keep
    return tl.where(known, t, -1.0), known


@triton.jit
def _sums_of(sums, network, c, CLASSES: tl.constexpr):
    """(overlap, soft + truth) of one network (0 or 1) and class."""
    at = sums + 1 + c
    overlap = tl.load(at + network * CLASSES)
    soft = tl.load(at + (2 + network) * CLASSES)
    truth = tl.load(at + 4 * CLASSES)
    return overlap, soft + truth


class Coefficients(NamedTuple):
    """Factors in the gradient of one network's supervised term: of Dice two tuples over classes, of cross-entropy 1 / voxels."""

    alpha: tl.tuple
    beta: tl.tuple
    entropy: tl.tuple  # one number; empty without cross-entropy


@triton.jit
def _labelled_voxels(sums, CLASSES: tl.constexpr):
    """The number of labelled voxels, at least 1."""
    voxels = 0.0
    for c in tl.static_range(CLASSES):
        voxels += tl.load(sums + 1 + 4 * CLASSES + c)
    return tl.maximum(voxels, 1.0)


@triton.jit
def supervised_value(sums, network, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """The supervised term of one network."""
    total = 0.0
    if RULES.dice:
        total += RULES.share * _dice_value(sums, network, CLASSES, RULES)
    if RULES.entropy:
        total += RULES.share * tl.load(sums + 1 + 5 * CLASSES + network) / _labelled_voxels(sums, CLASSES)
    return total


@triton.jit
def _dice_value(sums, network, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """Dice loss of one network; RULES says which classes are in the mean."""
    total = 0.0
    for c in tl.static_range(CLASSES):
        if (RULES.bits >> c) & 1:
            overlap, size = _sums_of(sums, network, c, CLASSES)
            total += 1.0 - (2.0 * overlap + _SMOOTH) / (size + _SMOOTH)
    return total / RULES.chosen


@triton.jit
def supervised_coefficients(sums, network, factor, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """`Coefficients` of one network, times ``factor``."""
    alpha = ()
    beta = ()
    entropy = ()
    if RULES.dice:
        alpha, beta = _dice_coefficients(sums, network, factor * RULES.share, CLASSES, RULES)
    if RULES.entropy:
        entropy = (factor * RULES.share / _labelled_voxels(sums, CLASSES),)
    return Coefficients(alpha, beta, entropy)


@triton.jit
def _dice_coefficients(sums, network, factor, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """factor * (alpha, beta) of one network: two tuples of scalars."""
    share = factor / RULES.chosen
    alpha = ()
    beta = ()
    for c in tl.static_range(CLASSES):
        if (RULES.bits >> c) & 1:
            overlap, size = _sums_of(sums, network, c, CLASSES)
            inverse = 1.0 / (size + _SMOOTH)
            alpha = alpha + (-2.0 * inverse * share,)
            beta = beta + ((2.0 * overlap + _SMOOTH) * inverse * inverse * share,)
        else:
            alpha = alpha + (0.0,)
            beta = beta + (0.0,)
    return alpha, beta


@triton.jit
def supervised_slope(of, coefficients, t, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """dS/dz, a tuple of tiles, of a network at voxels of class t; of class 0 alone for C = 2."""
    if RULES.dice and not RULES.entropy:
        return _dice_slope(of, coefficients.alpha, coefficients.beta, t, CLASSES)
    else:
        if CLASSES == 2:
            of_entropy = (first_slope(of, t, True),)
        else:
            of_entropy = slope(of, t, True, CLASSES)
        result = ()
        if RULES.dice:
            of_dice = _dice_slope(of, coefficients.alpha, coefficients.beta, t, CLASSES)
            for c in tl.static_range(1 if CLASSES == 2 else CLASSES):
                result = result + (of_dice[c] + of_entropy[c] * coefficients.entropy[0],)
        else:
            for c in tl.static_range(1 if CLASSES == 2 else CLASSES):
                result = result + (of_entropy[c] * coefficients.entropy[0],)
        return result


@triton.jit
def _dice_slope(of, alpha, beta, t, CLASSES: tl.constexpr):
    u = ()
    for c in tl.static_range(CLASSES):
        u = u + (tl.where(t == c, alpha[c], 0.0) + beta[c],)
    if CLASSES == 2:
        # p(0) p(1) = rest / (1 + rest)^2, whichever class is the larger
        return (of.rest / ((1.0 + of.rest) * (1.0 + of.rest)) * (u[0] - u[1]),)
    else:
        p = probabilities(of, CLASSES, True, True)
        mean = tl.zeros(t.shape, tl.float32)
        for c in tl.static_range(CLASSES):
            mean += p[c] * u[c]
        result = ()
        for c in tl.static_range(CLASSES):
            result = result + (p[c] * (u[c] - mean),)
        return result
