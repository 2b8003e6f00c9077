"""What every kernel does at a voxel: addresses, softmax, confidence, cross-entropy and its slope.

Tiles have the channel axis first and then one or two voxel axes; the functions here take either. ``cls`` is the class index,
shaped to broadcast over a tile of logits: (CLASSES_PAD, 1) or (CLASSES_PAD, 1, 1).

Rounding: with l the class of the largest logit, e_c = exp(z_c - z_l) and rest = sum_{c != l} e_c, the probabilities are
p_c = e_c / (1 + rest), the complement 1 - p_l = rest / (1 + rest) and the cross-entropy log1p(rest) + z_l - z_y. None of
them subtracts nearly equal numbers, so confident voxels keep their gradient in half precision.
"""

import triton
import triton.language as tl


@triton.jit
def voxel_offsets(v, size1, size2, stride0, stride1, stride2, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Element offset of voxel v inside one channel; FLAT: the three spatial axes collapse into one."""
    if WIDE:
        v = v.to(tl.int64)
    if FLAT:
        return v * stride2
    else:
        row = v // size2
        return (row // size1) * stride0 + (row % size1) * stride1 + (v % size2) * stride2


@triton.jit
def channel_offsets(channel, stride, WIDE: tl.constexpr):
    """Element offset of a channel."""
    if WIDE:
        channel = channel.to(tl.int64)
    return channel * stride


@triton.jit
def batch_stride(stride, CLASSES: tl.constexpr, PACKED: tl.constexpr):
    """The stride itself; packed logits' is a multiple of C, written so that the compiler sees it."""
    if PACKED:
        return stride // CLASSES * CLASSES
    else:
        return stride


@triton.jit
def load(pointers, mask, MASKED: tl.constexpr):
    """Load as float32; whole tiles go unmasked, because a mask that ends anywhere costs the width of the loads."""
    if MASKED:
        x = tl.load(pointers, mask=mask, other=0.0)
    else:
        x = tl.load(pointers)
    return x.to(tl.float32)


@triton.jit
def sectors(wanted, valid, MASKED: tl.constexpr):
    """A mask (GROUPS, GROUP) that is constant over a sector: true where any voxel of the sector is wanted.

    A mask that changed from voxel to voxel would split 128-bit loads and save nothing: memory moves by sectors.
    """
    any_wanted = tl.max(wanted.to(tl.int32), axis=1) > 0  # (GROUPS,)
    whole = tl.broadcast_to(any_wanted[:, None], wanted.shape)
    if MASKED:  # the last sector may end beyond the tensor
        whole = whole & valid
    return whole


@triton.jit
def softmax_parts(z, cls, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr):
    """Largest logit, its class (the first maximum), rest, and exp(z - largest), of logits z (CLASSES_PAD, ...)."""
    if CLASSES_PAD > CLASSES:
        z = tl.where(cls < CLASSES, z, float("-inf"))
    top = tl.max(z, axis=0)
    label = tl.min(tl.where(z == tl.expand_dims(top, 0), cls, CLASSES_PAD), axis=0)
    e = tl.exp(z - tl.expand_dims(top, 0))
    rest = tl.sum(tl.where(cls == tl.expand_dims(label, 0), 0.0, e), axis=0)
    return top, label, rest, e


@triton.jit
def probabilities(z, top, rest, cls, CLASSES: tl.constexpr):
    """softmax(z) (CLASSES_PAD, ...) from what softmax_parts said of z; zero for the padding."""
    e = tl.exp(z - tl.expand_dims(top, 0))
    return tl.where(cls < CLASSES, e / tl.expand_dims(1.0 + rest, 0), 0.0)


@triton.jit
def pick(tile, cls, wanted):
    """The row of a tile that each voxel wants: (CLASSES_PAD, ...) -> (...)."""
    return tl.sum(tl.where(cls == wanted, tile, 0.0), axis=0)


@triton.jit
def margin(z, cls):
    """|z_1 - z_0| for two classes, exactly, as a sum of a float32 and its rounding error (Knuth's two-sum)."""
    a = pick(z, cls, 1)
    b = -pick(z, cls, 0)
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    return tl.abs(total), tl.where(total < 0, -error, error)


@triton.jit
def doubt(z, p, rest, cls, eps, CLASSES: tl.constexpr, CONFIDENCE: tl.constexpr):
    """(d, e): a number that grows as the network's confidence falls, and its rounding error where it matters, else d again.

    For two classes entropy and largest probability order voxels alike, for every eps: both fall or rise strictly with the
    margin between the logits, which is compared without rounding.
    """
    if CONFIDENCE == "none":
        return rest, rest
    elif CLASSES == 2:
        distance, error = margin(z, cls)
        return -distance, -error
    elif CONFIDENCE == "max_probability":
        return rest, rest  # max_c p = 1 / (1 + rest)
    else:
        entropy = -tl.sum(p * tl.log(p + eps), axis=0)  # padded classes: p = 0
        return entropy, entropy


@triton.jit
def more_doubt(doubt_a, error_a, doubt_b, error_b, CLASSES: tl.constexpr, CONFIDENCE: tl.constexpr):
    """(m_ab, m_ba): where network a is strictly less confident, so that b teaches a, and the reverse."""
    if CONFIDENCE == "none":
        everywhere = tl.full(doubt_a.shape, 1, tl.int1)
        return everywhere, everywhere
    elif CLASSES == 2:
        same = doubt_a == doubt_b
        return (doubt_a > doubt_b) | (same & (error_a > error_b)), (doubt_a < doubt_b) | (same & (error_a < error_b))
    else:
        return doubt_a > doubt_b, doubt_b > doubt_a


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to float32's relative precision: the series of 2 atanh(x / (2 + x)) where x is small."""
    t = x / (2.0 + x)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3 + t2 * (1.0 / 5 + t2 * (1.0 / 7 + t2 * (1.0 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def cross_entropy(z, p, top, rest, label, cls, ON_LOGITS: tl.constexpr, CLASSES: tl.constexpr):
    """CE of a student with logits z against the teacher's label."""
    target = tl.expand_dims(label, 0)
    if ON_LOGITS:
        return log1p(rest) + (top - pick(z, cls, target))
    else:
        total = tl.sum(tl.where(cls < CLASSES, tl.exp(p), 0.0), axis=0)
        return tl.log(total) - pick(p, cls, target)


@triton.jit
def slope(p, rest, own, label, cls, ON_LOGITS: tl.constexpr, CLASSES: tl.constexpr):
    """dCE/dz (CLASSES_PAD, ...) of a student whose own most probable class is ``own``."""
    target = cls == tl.expand_dims(label, 0)
    is_own = cls == tl.expand_dims(own, 0)
    if ON_LOGITS:
        # p - [c = own] without cancellation; then the one moves from own to the teacher's class.
        complement = tl.expand_dims(rest / (1.0 + rest), 0)
        return tl.where(is_own, -complement, p) + (is_own.to(tl.float32) - target.to(tl.float32))
    else:
        # p(c) (D(c) - sum_q p(q) D(q)), D = d - d(own): a shift cancels in the formula, and D(own) = 0 keeps small numbers.
        e = tl.where(cls < CLASSES, tl.exp(p), 0.0)
        d = e / tl.expand_dims(tl.sum(e, axis=0), 0) - target.to(tl.float32)
        shifted = tl.where(cls < CLASSES, d - tl.expand_dims(pick(d, cls, tl.expand_dims(own, 0)), 0), 0.0)
        return p * (shifted - tl.expand_dims(tl.sum(p * shifted, axis=0), 0))
