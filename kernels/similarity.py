"""HOW reliable: r_j of the teacher j, from its features, the class prototypes and its probabilities.

    s_j(c) = <f_j, mu_j(c)> / max(||f_j||, 1e-8)        r_j = 1 - (1/C) sum_c (s_j(c) - p_j(c))^2

The prototypes are of unit length or zero. Features are read where their network teaches, by 32-byte sectors. Up to four
classes the loops over classes and blocks of features are unrolled; beyond, one class's products live at a time.
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import channel_offsets, sectors


@triton.jit
def _load_features(
    base, offsets, stride_c, use, valid, f,
    FEATURES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Features of the voxels in use, zero elsewhere: (FEATURE_BLOCK, GROUPS, GROUP)."""
    wanted = sectors(use, valid, MASKED)[None, :, :]
    if RAGGED:
        wanted = wanted & (f < FEATURES)[:, None, None]
    pointers = base + channel_offsets(f, stride_c, WIDE)[:, None, None] + offsets[None, :, :]
    x = tl.load(pointers, mask=wanted, other=0.0).to(tl.float32)
    return tl.where(use[None, :, :], x, 0.0)


@triton.jit
def _product(x, prototypes, c, f, FEATURES: tl.constexpr, RAGGED: tl.constexpr):
    """<f, mu_c> over one block of features: (GROUPS, GROUP)."""
    at = prototypes + c * FEATURES + f
    if RAGGED:
        mu = tl.load(at, mask=f < FEATURES, other=0.0)
    else:
        mu = tl.load(at)
    return tl.sum(x * mu[:, None, None], axis=0)


@triton.jit
def _add_similarity(
    dots, square, base, prototypes, offsets, stride_c, use, valid, first,
    FEATURES: tl.constexpr, FEATURE_BLOCK: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of the teacher's features: products with its prototypes, and the square of the feature's length."""
    RAGGED: tl.constexpr = FEATURES % FEATURE_BLOCK != 0
    f = first + tl.arange(0, FEATURE_BLOCK)
    x = _load_features(base, offsets, stride_c, use, valid, f, FEATURES, GROUPS, GROUP, WIDE, RAGGED, MASKED)
    square += tl.sum(x * x, axis=0)
    cls = tl.arange(0, CLASSES_PAD)[:, None, None]
    if UNROLL:
        for c in tl.static_range(CLASSES):
            dots += tl.where(cls == c, _product(x, prototypes, c, f, FEATURES, RAGGED)[None, :, :], 0.0)
    else:  # one class's products live at a time
        for c in range(CLASSES):
            dots += tl.where(cls == c, _product(x, prototypes, c, f, FEATURES, RAGGED)[None, :, :], 0.0)
    return dots, square


@triton.jit
def _add_similarities(
    dots, square, base, prototypes, offsets, stride_c, use, valid,
    FEATURES: tl.constexpr, FEATURE_BLOCK: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`_add_similarity` for all blocks of features."""
    if UNROLL:
        for first in tl.static_range(0, FEATURES, FEATURE_BLOCK):
            dots, square = _add_similarity(
                dots, square, base, prototypes, offsets, stride_c, use, valid, first, FEATURES, FEATURE_BLOCK,
                CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
    else:
        for first in range(0, FEATURES, FEATURE_BLOCK):
            dots, square = _add_similarity(
                dots, square, base, prototypes, offsets, stride_c, use, valid, first, FEATURES, FEATURE_BLOCK,
                CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
    return dots, square


@triton.jit
def reliability(
    p, use_a, use_b, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls,
    READ_A: tl.constexpr, READ_B: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    UNROLL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """r of the teacher with probabilities p: network a where use_a, network b where use_b: (GROUPS, GROUP)."""
    dots = tl.zeros((CLASSES_PAD, GROUPS, GROUP), tl.float32)
    square = tl.zeros((GROUPS, GROUP), tl.float32)
    if READ_A:
        dots, square = _add_similarities(
            dots, square, fa, prototypes_a, fa_v, fa_c, use_a, valid, FEATURES_A, FEATURE_BLOCK,
            CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
        )  # fmt: skip
    if READ_B:
        dots, square = _add_similarities(
            dots, square, fb, prototypes_b, fb_v, fb_c, use_b, valid, FEATURES_B, FEATURE_BLOCK,
            CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
        )  # fmt: skip
    inverse = 1.0 / tl.maximum(tl.sqrt(square), 1e-8)
    difference = tl.where(cls < CLASSES, dots * inverse[None, :, :] - p, 0.0)
    # square * 0: a feature whose square overflows float32 gives NaN, not a similarity of 0
    return 1.0 - tl.sum(difference * difference, axis=0) / CLASSES + square * 0.0
