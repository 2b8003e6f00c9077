"""The last step of the forward pass: the total of the objective from partial sums, by one program."""

import triton
import triton.language as tl

from rplib.kernels.dice import dice_value
from rplib.kernels.voxels import SIZES


@triton.jit
def mutual_weight_of(factor, weight, HAS_WEIGHT: tl.constexpr):
    """cw: a number, or a number times a 0-dim tensor."""
    if HAS_WEIGHT:
        return factor * tl.load(weight).to(tl.float32)
    else:
        return factor


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    numerators, counts, sums, mutual_weight,
    total,  # out: () float32, cw * mutual + dice_weight * dice
    terms,  # out: (2,) float32: dice (sum over both networks), mutual
    mutual_factor, dice_weight, n,
    CLASSES: tl.constexpr, RULES: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (1,). mutual = sum of L_ij = numerator_ij / (count_ij + eps), in a fixed order."""
    i = tl.arange(0, BLOCK)
    total_ab = tl.zeros((BLOCK,), tl.float32)
    total_ba = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + i
        total_ab += tl.load(numerators + at, mask=at < n, other=0.0)
        total_ba += tl.load(numerators + n + at, mask=at < n, other=0.0)
    n_ab = tl.load(counts).to(tl.float32) + RULES.eps
    n_ba = tl.load(counts + 1).to(tl.float32) + RULES.eps
    mutual = tl.sum(total_ab, axis=0) / n_ab + tl.sum(total_ba, axis=0) / n_ba + tl.load(sums)
    value = mutual * mutual_weight_of(mutual_factor, mutual_weight, HAS_WEIGHT)
    dice = 0.0
    if RULES.supervised:
        dice = dice_value(sums, 0, CLASSES, RULES)
        dice += dice_value(sums, 1, CLASSES, RULES)
        value += dice_weight * dice
    tl.store(total, value)
    tl.store(terms, dice)
    tl.store(terms + 1, mutual)
