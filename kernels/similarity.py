"""How reliable the teacher j is: r_j, from its features, the class prototypes and its probabilities.

    s_j(c) = <f_j, mu_j(c)> / max(||f_j||, 1e-8)        r_j = 1 - (1/C) sum_c (s_j(c) - p_j(c))^2

The prototypes are of unit length or zero. Features are read where their network teaches: by 32-byte sectors (`products`), or the
teacher's alone, voxel by voxel (`taken_products`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from rplib.kernels.voxels import channel_offset, widened


class Products(NamedTuple):
    """Products of one network's features: squared length (ROWS, VECTOR), and with its prototypes, a tuple over classes."""

    square: tl.tensor
    dots: tl.tuple


@triton.jit
def _add_block(
    s, base, at, stride, prototypes, wanted, first,
    FEATURES: tl.constexpr, FEATURE_BLOCK: tl.constexpr, CLASSES: tl.constexpr, JOINED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    RAGGED: tl.constexpr = FEATURES % FEATURE_BLOCK != 0
    f = first + tl.arange(0, FEATURE_BLOCK)
    inside = f < FEATURES
    mask = wanted[None, :, :]
    if RAGGED:
        mask = mask & inside[:, None, None]
    pointers = base + channel_offset(f, stride, WIDE)[:, None, None] + at[None, :, :]
    x = widened(tl.load(pointers, mask=mask, other=0.0))  # (FEATURE_BLOCK, ROWS, VECTOR)
    dots = ()
    for c in tl.static_range(CLASSES):
        if RAGGED:
            mu = tl.load(prototypes + c * FEATURES + f, mask=inside, other=0.0)
        else:
            mu = tl.load(prototypes + c * FEATURES + f)
        dots = dots + (_add_sum(s.dots[c], x * mu[:, None, None], JOINED),)
    return Products(_add_sum(s.square, x * x, JOINED), dots)


@triton.jit
def _add_sum(total, x, JOINED: tl.constexpr):
    """total (ROWS, VECTOR) + the sum of x (FEATURE_BLOCK, ROWS, VECTOR) over its first axis.

    JOINED: the total is added to the first summand, so that each product is one multiply-add. The others get -0.0, an addition
    that the compiler leaves out. It takes registers.
    """
    if JOINED:
        nothing = tl.full((1, 1, 1), -0x80000000, tl.int32).to(tl.float32, bitcast=True)  # -0.0
        first = (tl.arange(0, x.shape[0]) == 0)[:, None, None]
        return tl.sum(x + tl.where(first, total[None, :, :], nothing), axis=0)
    else:
        return total + tl.sum(x, axis=0)


@triton.jit
def products(
    base, at, stride, prototypes, wanted,
    FEATURES: tl.constexpr, FEATURE_BLOCK: tl.constexpr, CLASSES: tl.constexpr, UNROLL: tl.constexpr, JOINED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`Products` of one network where wanted (constant over a sector), 0 elsewhere; JOINED: see `_add_sum`."""
    zero = tl.zeros(wanted.shape, tl.float32)
    dots = ()
    for _ in tl.static_range(CLASSES):
        dots = dots + (zero,)
    s = Products(zero, dots)
    if UNROLL:
        for first in tl.static_range(0, FEATURES, FEATURE_BLOCK):
            s = _add_block(s, base, at, stride, prototypes, wanted, first, FEATURES, FEATURE_BLOCK, CLASSES, JOINED, WIDE)
    else:
        for first in range(0, FEATURES, FEATURE_BLOCK):
            s = _add_block(s, base, at, stride, prototypes, wanted, first, FEATURES, FEATURE_BLOCK, CLASSES, JOINED, WIDE)
    return s


@triton.jit
def taken_products(
    base_a, base_b, at_a, at_b, stride, prototypes_a, prototypes_b, take_b, wanted,
    FEATURES: tl.constexpr, FEATURE_BLOCK: tl.constexpr, CLASSES: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`Products` of network b where ``take_b``, of a elsewhere, where wanted: one load for both networks.

    The stride between features is a number, or a tile (1, ROWS, VECTOR) if the networks' strides differ. A thread should hold one
    voxel, because neighbours may have different teachers, and all features of a block.
    """
    pointers = tl.where(take_b, base_b + at_b, base_a + at_a)
    # Prototypes, too, are read through the teacher's pointer, instead of loading both and choosing for every product.
    prototypes = tl.where(take_b, prototypes_b, prototypes_a)
    zero = tl.zeros(wanted.shape, tl.float32)
    dots = ()
    for _ in tl.static_range(CLASSES):
        dots = dots + (zero,)
    s = Products(zero, dots)
    if UNROLL:
        for first in tl.static_range(0, FEATURES, FEATURE_BLOCK):
            s = _take_block(
                s, pointers, stride, prototypes, wanted, first, FEATURES, FEATURE_BLOCK, CLASSES, WIDE
            )  # fmt: skip
    else:
        # The loads of both blocks come first. With more classes the compiler takes minutes and spills registers.
        TIMES: tl.constexpr = 2 if FEATURES % (2 * FEATURE_BLOCK) == 0 and CLASSES <= 16 else 1
        for first in range(0, FEATURES, FEATURE_BLOCK * TIMES):
            for i in tl.static_range(TIMES):
                s = _take_block(
                    s, pointers, stride, prototypes, wanted, first + i * FEATURE_BLOCK, FEATURES, FEATURE_BLOCK, CLASSES, WIDE
                )  # fmt: skip
    return s


@triton.jit
def _take_block(
    s, pointers, stride, prototypes, wanted, first,
    FEATURES: tl.constexpr, FEATURE_BLOCK: tl.constexpr, CLASSES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    RAGGED: tl.constexpr = FEATURES % FEATURE_BLOCK != 0
    f = first + tl.arange(0, FEATURE_BLOCK)
    inside = (f < FEATURES)[:, None, None]
    mask = wanted[None, :, :]
    if RAGGED:
        mask = mask & inside
    x = widened(tl.load(pointers[None, :, :] + channel_offset(f[:, None, None], stride, WIDE), mask=mask, other=0.0))
    dots = ()
    for c in tl.static_range(CLASSES):
        at = prototypes[None, :, :] + (c * FEATURES + f)[:, None, None]
        if RAGGED:
            mu = tl.load(at, mask=inside, other=0.0)
        else:
            mu = tl.load(at)
        dots = dots + (s.dots[c] + tl.sum(x * mu, axis=0),)
    return Products(s.square + tl.sum(x * x, axis=0), dots)


@triton.jit
def where_products(mask, a, b, CLASSES: tl.constexpr):
    """The `Products` a where the mask is true, b elsewhere."""
    dots = ()
    for c in tl.static_range(CLASSES):
        dots = dots + (tl.where(mask, a.dots[c], b.dots[c]),)
    return Products(tl.where(mask, a.square, b.square), dots)


@triton.jit
def reliability(of, p, CLASSES: tl.constexpr):
    """r of a teacher with these `Products` and probabilities p: (ROWS, VECTOR)."""
    inverse = tl.rsqrt(tl.maximum(of.square, 1e-16))
    total = tl.zeros(of.square.shape, tl.float32)
    for c in tl.static_range(CLASSES):
        difference = of.dots[c] * inverse - p[c]
        total += difference * difference
    # square * 0: a feature whose square overflows float32 gives NaN, not a similarity of 0
    return (CLASSES - total) * (1.0 / CLASSES) + of.square * 0.0
