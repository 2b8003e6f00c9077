"""The last step of the forward pass: the total of the objective from partial sums, by one program."""

import triton
import triton.language as tl

from rplib.kernels.dice import supervised_value
from rplib.kernels.voxels import SIZES


@triton.jit
def mutual_weight_of(factor, weight, HAS_WEIGHT: tl.constexpr):
    """cw: a number, or a number times a 0-dim tensor."""
    if HAS_WEIGHT:
        return factor * tl.load(weight).to(tl.float32)
    else:
        return factor


@triton.jit
def normaliser(counts, student, RULES: tl.constexpr):
    """n_ij of a student (0 or 1); 1 for a sum."""
    if RULES.summed:
        return 1.0
    else:
        return tl.load(counts + student).to(tl.float32) + RULES.eps


@triton.jit
def _sums(values, n, BLOCK: tl.constexpr):
    """Sum of n numbers, and sum of the next n, in a fixed order."""
    i = tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + i
        first += tl.load(values + at, mask=at < n, other=0.0)
        second += tl.load(values + n + at, mask=at < n, other=0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def _report(out, counts, weight_ab, weight_ba, mutual_ab, mutual_ba, CLASSES: tl.constexpr):
    """The fields of `rplib.ObjectiveStatistics`: weight (2), mutual (2), taught (2), disagreement, pseudo-labels (2 C).

    The first four add up over ranks; the others are of the whole batch, because ``counts`` are.
    """
    voxels = tl.load(counts + 3)
    for c in tl.static_range(1, CLASSES):
        voxels += tl.load(counts + 3 + c)
    valid = tl.maximum(voxels, 1).to(tl.float32)
    taught_ab = tl.load(counts)
    taught_ba = tl.load(counts + 1)
    tl.store(out, weight_ab / tl.maximum(taught_ab, 1).to(tl.float32))
    tl.store(out + 1, weight_ba / tl.maximum(taught_ba, 1).to(tl.float32))
    tl.store(out + 2, mutual_ab)
    tl.store(out + 3, mutual_ba)
    tl.store(out + 4, taught_ab.to(tl.float32) / valid)
    tl.store(out + 5, taught_ba.to(tl.float32) / valid)
    for k in tl.static_range(2 * CLASSES + 1):
        tl.store(out + 6 + k, tl.load(counts + 2 + k).to(tl.float32) / valid)


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    numerators, counts, sums, mutual_weight,
    total,  # out: () float32, cw * mutual + dice_weight * dice
    terms,  # out: (2,) float32: dice (sum over both networks), mutual; detailed (9 + 2 C,): and what `_report` writes
    mutual_factor, dice_weight, n,
    CLASSES: tl.constexpr, RULES: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (1,). mutual = sum of L_ij = numerator_ij / (count_ij + eps), in a fixed order."""
    nonfinite = tl.load(sums)
    loss_ab, loss_ba = _sums(numerators, n, BLOCK)
    mutual_ab = loss_ab / normaliser(counts, 0, RULES)
    mutual_ba = loss_ba / normaliser(counts, 1, RULES)
    mutual = mutual_ab + mutual_ba + nonfinite
    value = mutual * mutual_weight_of(mutual_factor, mutual_weight, HAS_WEIGHT)
    dice = 0.0
    if RULES.supervised:
        if RULES.learns_a:
            dice = supervised_value(sums, 0, CLASSES, RULES)
        if RULES.learns_b:
            dice += supervised_value(sums, 1, CLASSES, RULES)
        value += dice_weight * dice
    tl.store(total, value)
    tl.store(terms, dice)
    tl.store(terms + 1, mutual)
    if RULES.detailed:
        weight_ab, weight_ba = _sums(numerators + 2 * n, n, BLOCK)
        _report(
            terms + 2, counts, weight_ab + nonfinite, weight_ba + nonfinite, mutual_ab + nonfinite, mutual_ba + nonfinite, CLASSES
        )  # fmt: skip
