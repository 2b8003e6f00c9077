"""Sums of features per class for many classes: products with one-hot labels on the tensor cores, without shared memory.

Tiles have axes for what the registers and threads of a product hold, so that features and labels are loaded or made where the
product wants them, and none of them passes through shared memory: (2 or 1, RUNS, VOXEL_GROUPS, FEATURE_GROUPS, 8, 4, VECTOR).
A thread holds every fourth of a product's K = RUNS x 4 x VECTOR (or RUNS x 4) voxels, and every eighth of 16 features or classes;
warps lie along the groups. VECTOR are voxels side by side, or SIDE_BY_SIDE features of one voxel: what a thread loads at once.
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import channel_offset, load


@triton.jit
def _axis(N: tl.constexpr, AXIS: tl.constexpr):
    """0 to N - 1 along one of the seven axes."""
    i = tl.arange(0, N)
    for axis in tl.static_range(7):
        if axis != AXIS:
            i = tl.expand_dims(i, axis)
    return i


@triton.jit
def voxels_of_product(start, o):
    """Voxels of a tile, (1, RUNS, VOXEL_GROUPS, 1, 1, 4, VECTOR or 1)."""
    v = (_axis(o.VOXEL_GROUPS, 2) * o.RUNS + _axis(o.RUNS, 1)) * 4 + _axis(4, 5)
    if o.SIDE_BY_SIDE:
        return start + v
    else:
        return start + v * o.VECTOR + _axis(o.VECTOR, 6)


@triton.jit
def labels_of_product(label, o):
    """Labels (voxels of the block, 1) as the tile of `voxels_of_product`."""
    V: tl.constexpr = 1 if o.SIDE_BY_SIDE else o.VECTOR
    label = tl.permute(tl.reshape(label, (o.VOXEL_GROUPS, o.RUNS, 4, V)), (1, 0, 2, 3))
    return label[None, :, :, None, None, :, :]


@triton.jit
def _one_hot(label, like, first, o):
    """(groups, 16, K), 1.0 where the label is class first + 0 .. 15. like: bits of features, whose threads the labels join."""
    GROUPS: tl.constexpr = o.VOXEL_GROUPS * o.FEATURE_GROUPS
    if o.SIDE_BY_SIDE:
        for level in tl.static_range(3):
            if o.VECTOR >> level > 2:
                like, _ = tl.split(
                    tl.reshape(like, (1, o.RUNS, o.VOXEL_GROUPS, o.FEATURE_GROUPS, 8, 4, o.VECTOR >> level + 1, 2))
                )  # fmt: skip
        cls = first + _axis(2, 6) * 8 + _axis(8, 4)
    else:
        cls = first + _axis(2, 0) * 8 + _axis(8, 4)
    # x & 1 & 2 is 0, which the compiler finds out once it has given the labels the threads of x.
    one_hot = (cls == (label | ((like & 1) & (like & 2)))).to(tl.float32)
    if o.SIDE_BY_SIDE:
        one_hot = tl.permute(one_hot, (2, 3, 6, 4, 1, 5, 0))
    else:
        one_hot = tl.permute(one_hot, (2, 3, 0, 4, 1, 6, 5))
    return tl.reshape(one_hot, (GROUPS, 16, o.K))


@triton.jit
def _operand(x, o):
    """A tile of features as (groups, K, features)."""
    if o.SIDE_BY_SIDE:
        x = tl.permute(x, (2, 3, 1, 5, 0, 6, 4))
    else:
        x = tl.permute(x, (2, 3, 1, 6, 5, 0, 4))
    return tl.reshape(x, (o.VOXEL_GROUPS * o.FEATURE_GROUPS, o.K, o.TILE))


@triton.jit
def _feature_of(o):
    """Features of a tile, counted from its first one, (2 or 1, 1, 1, FEATURE_GROUPS, 8, 1, VECTOR or 1)."""
    f = _axis(o.FEATURE_GROUPS, 3) * (o.FEATURE_BLOCK // o.FEATURE_GROUPS)
    if o.SIDE_BY_SIDE:
        return f + _axis(8, 4) * o.VECTOR + _axis(o.VECTOR, 6)
    else:
        return f + _axis(2, 0) * 8 + _axis(8, 4)


@triton.jit
def add_products(
    sums, base, at, stride, first_feature, label, valid, keep, o,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add one block of features to the sums of every class: tiles (groups, 16 classes, TILE features)."""
    EXACT: tl.constexpr = base.dtype.element_ty != tl.float32
    f = first_feature + _feature_of(o)
    added = ()
    one_hot = ()
    for n in tl.static_range(o.FEATURE_BLOCK // o.FEATURE_GROUPS // o.TILE):
        here = f + n * o.TILE
        inside = here < FEATURES
        if MASKED:
            inside = inside & valid
        x = load(base + channel_offset(here, stride, o.WIDE) + at, inside, MASKED or RAGGED)
        if o.RULES.partial:
            x = tl.where(keep, x, 0.0)
        bits = x.to(tl.int32, bitcast=True)
        if n == 0:
            for c in tl.static_range(0, o.CLASSES_DOT, 16):
                one_hot = one_hot + (_one_hot(label, bits, c, o),)
        # The tensor cores multiply numbers of 11 bits: half precision fits; a float32 is the sum of two, except for its last bit.
        if EXACT:
            high = _operand(x, o)
        else:
            high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            low = _operand(x - high, o)
            high = _operand(high, o)
        for m in tl.static_range(o.CLASSES_DOT // 16):
            total = sums[n * (o.CLASSES_DOT // 16) + m]
            # Added outside: the tensor cores round towards zero, an error that would grow with the voxels.
            if EXACT:
                added = added + (total + tl.dot(one_hot[m], high, input_precision="tf32"),)
            else:
                product = tl.dot(one_hot[m], low, input_precision="tf32")
                added = added + (total + tl.dot(one_hot[m], high, product, input_precision="tf32"),)
    return added


@triton.jit
def store_products(out, sums, first_feature, o, FEATURES: tl.constexpr):
    """Write one network's sums (C, F) from `add_products`."""
    CLASS_TILES: tl.constexpr = o.CLASSES_DOT // 16
    n = tl.arange(0, o.TILE)
    if o.SIDE_BY_SIDE:
        n = n % 8 * o.VECTOR + n // 8
    f = tl.arange(0, o.FEATURE_GROUPS)[:, None, None] * (o.FEATURE_BLOCK // o.FEATURE_GROUPS) + n[None, None, :]
    bad = tl.zeros((o.FEATURE_GROUPS, 16, o.TILE), tl.float32)
    for k in tl.static_range(o.FEATURE_BLOCK // o.FEATURE_GROUPS // o.TILE * CLASS_TILES):
        at = first_feature + f + k // CLASS_TILES * o.TILE
        cls = (k % CLASS_TILES * 16 + tl.arange(0, 16))[None, :, None]
        total = tl.sum(tl.reshape(sums[k], (o.VOXEL_GROUPS, o.FEATURE_GROUPS, 16, o.TILE)), axis=0)
        tl.store(out + cls * FEATURES + at, total, mask=(cls < o.CLASSES) & (at < FEATURES))
        bad += total * 0.0
    return tl.sum(tl.reshape(bad, (o.FEATURE_GROUPS * 16 * o.TILE,)), axis=0)
