"""What all kernels share at a voxel: addresses, softmax, confidence, cross-entropy and its slope.

A block of voxels is a tile (ROWS, VECTOR): one thread holds the VECTOR neighbours of a row, so that a row is one wide load and a
sum over it needs no other thread. Classes are no axis of a tile but the elements of a tuple, one tile (ROWS, VECTOR) each:
whatever runs over classes is unrolled and stays in its thread. An axis of a few classes would be spread over warps, and every
sum over it would pass through shared memory.

Rounding: with l the class of the largest logit, e_c = exp(z_c - z_l) and rest = sum_{c != l} e_c, the probabilities are
p_c = e_c / (1 + rest), the complement 1 - p_l = rest / (1 + rest) and the cross-entropy log1p(rest) + z_l - z_y. None of
them subtracts nearly equal numbers, so confident voxels keep their gradient in half precision.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# How the channels and voxels of a tensor lie in memory (see launch.layout_of). A layout is a constant of the kernel: strides
# are arguments that the compiler knows nothing about, and the constants here tell it how wide it may load.
ANY = tl.constexpr(0)
ALIGNED = tl.constexpr(1)  # neighbouring voxels side by side, in multiples of 16, as the strides of channels and samples
LAST = tl.constexpr(2)  # the channels of a voxel are side by side
PACKED = tl.constexpr(3)  # and voxel after voxel, sample by sample: channels last

# Integer arguments of the kernels. They are not specialised: otherwise a size of 1, or a multiple of 16, would be another
# variant to compile, and a 1 would not be a tensor in the kernel. What the compiler has to know of them is in the layouts.
SIZES = [
    *("labelled", "voxels", "size1", "size2", "record_stride", "batch", "programs", "blocks_per_program", "flags", "n"),
    *(f"{tensor}_{axis}" for tensor in ("za", "zb", "fa", "fb", "ga", "gb", "t", "m") for axis in "bc012"),
]


class Strides(NamedTuple):
    """Strides of a tensor (B, channels, *spatial), without the batch's."""

    channel: tl.tensor
    axis0: tl.tensor
    axis1: tl.tensor
    axis2: tl.tensor


class Opinion(NamedTuple):
    """What one network predicts at every voxel.

    z: logits, a tuple of C tiles. top, label: the largest logit and its class (the first maximum). rest: see the head of this
    file. inverse: 1 / (1 + rest), the largest probability. gap: for C = 2 the difference between the logits, else log(1 + rest).
    below, others: for C > 2 z_c - top and e_c of the other classes, in the same order, whichever they are.
    """

    z: tl.tuple
    top: tl.tensor
    label: tl.tensor
    rest: tl.tensor
    inverse: tl.tensor
    gap: tl.tensor
    below: tl.tuple
    others: tl.tuple


@triton.jit
def strides_of(channel, axis0, axis1, axis2, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr):
    """The strides; those that the layout fixes are constants."""
    if LAYOUT == PACKED:
        return Strides(1, 0, 0, CHANNELS)
    elif LAYOUT == LAST:
        return Strides(1, axis0, axis1, axis2)
    elif LAYOUT == ALIGNED:
        return Strides(channel // 16 * 16, 0, 0, 1)
    else:
        return Strides(channel, axis0, axis1, axis2)


@triton.jit
def voxels_of(voxels, LAYOUT: tl.constexpr):
    """Voxels of a sample; a multiple is written so that the compiler sees it: then the tail's masks do not split wide loads."""
    if LAYOUT == ALIGNED:
        return voxels // 16 * 16
    else:
        return voxels


@triton.jit
def member_of(order, sample, RULES: tl.constexpr):
    """Index in the batch of a sample, counted with the labelled ones first."""
    if RULES.reordered:
        return tl.load(order + sample)
    else:
        return sample


@triton.jit
def sample_offset(sample, stride, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr):
    """Element offset of a sample; multiples are written so that the compiler sees them."""
    step = tl.cast(stride, tl.int64)
    if LAYOUT == PACKED:
        step = step // CHANNELS * CHANNELS
    elif LAYOUT == ALIGNED:
        step = step // 16 * 16
    return sample.to(tl.int64) * step


@triton.jit
def voxel_offsets(v, size1, size2, strides, LAYOUT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Element offset of voxel v inside one channel; FLAT: the three spatial axes of all tensors collapse into one."""
    if WIDE:
        v = v.to(tl.int64)
    if FLAT or LAYOUT == ALIGNED or LAYOUT == PACKED:
        return v * strides.axis2
    else:
        row = v // size2
        return (row // size1) * strides.axis0 + (row % size1) * strides.axis1 + (v % size2) * strides.axis2


@triton.jit
def channel_offset(channel, stride, WIDE: tl.constexpr):
    """Element offset of one channel (a constant or a tile of indices)."""
    if WIDE:
        return tl.cast(channel, tl.int64) * stride
    else:
        return channel * stride


@triton.jit
def load(pointers, mask, MASKED: tl.constexpr):
    """Load as float32; whole blocks go unmasked, because a mask that ends anywhere costs the width of the loads."""
    if MASKED:
        x = tl.load(pointers, mask=mask, other=0.0)
    else:
        x = tl.load(pointers)
    return widened(x)


@triton.jit
def widened(x):
    """x as float32. bfloat16 by its bits: otherwise the compiler compares and selects in packed halves, which it has to unpack
    again for everything else."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_logits(
    base, at, stride, wanted, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The logits of a block as a tuple of CLASSES float32 tiles; ``at``: the voxels' offsets, ``wanted``: with MASKED which."""
    z = ()
    if LAYOUT == LAST or LAYOUT == PACKED:  # one load of whole voxels, taken apart class by class
        cls = tl.arange(0, CLASSES_PAD)[None, None, :]
        inside = cls < CLASSES
        if MASKED:
            inside = inside & wanted[:, :, None]
        parts = (load(base + at[:, :, None] + cls, inside, MASKED or CLASSES_PAD != CLASSES),)
        for level in tl.static_range(6):  # tile i holds the classes that leave i when divided by 2^level
            if CLASSES_PAD >> level > 1:
                even = ()
                odd = ()
                for k in tl.static_range(1 << level):
                    left, right = _halves(parts[k], CLASSES_PAD >> level)
                    even = even + (left,)
                    odd = odd + (right,)
                parts = even + odd
        for c in tl.static_range(CLASSES):
            z = z + (parts[c],)
    else:
        for c in tl.static_range(CLASSES):
            z = z + (load(base + channel_offset(c, stride, WIDE) + at, wanted, MASKED),)
    return z


@triton.jit
def load_mask(
    mask, v, size1, size2, strides, valid,
    RULES: tl.constexpr, LAYOUT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Which voxels of a block count: those of the sample (``valid``), and where the call has a mask those it keeps."""
    if RULES.masked:
        at = mask + voxel_offsets(v, size1, size2, strides, LAYOUT, FLAT, WIDE)
        if MASKED:
            return tl.load(at, mask=valid, other=0) != 0
        else:
            return tl.load(at) != 0
    else:
        return valid


@triton.jit
def kept(z, keep, CLASSES: tl.constexpr):
    """A tuple of tiles with 0 where a voxel does not count, so that not even a NaN there matters."""
    result = ()
    for c in tl.static_range(CLASSES):
        result = result + (tl.where(keep, z[c], 0.0),)
    return result


@triton.jit
def _halves(x, N: tl.constexpr):
    """Even and odd elements of the last axis, N long."""
    if N > 2:
        x = tl.reshape(x, (x.shape[0], x.shape[1], N // 2, 2))
    return tl.split(x)


@triton.jit
def store_logits(
    base, at, stride, wanted, values, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store a tuple of CLASSES tiles as logits are loaded, cast to what ``base`` points to."""
    dtype: tl.constexpr = base.dtype.element_ty
    if LAYOUT == LAST or LAYOUT == PACKED:
        parts = ()
        for c in tl.static_range(CLASSES_PAD):
            parts = parts + (values[c if c < CLASSES else 0].to(dtype),)
        for level in tl.static_range(6):
            if CLASSES_PAD >> level > 1:
                joined = ()
                for k in tl.static_range(CLASSES_PAD >> (level + 1)):
                    joined = joined + (_joined(parts[k], parts[k + (CLASSES_PAD >> (level + 1))], 1 << level),)
                parts = joined
        cls = tl.arange(0, CLASSES_PAD)[None, None, :]
        inside = cls < CLASSES
        if MASKED:
            inside = inside & wanted[:, :, None]
        if MASKED or CLASSES_PAD != CLASSES:
            tl.store(base + at[:, :, None] + cls, parts[0], mask=inside)
        else:
            tl.store(base + at[:, :, None] + cls, parts[0])
    else:
        for c in tl.static_range(CLASSES):
            if MASKED:
                tl.store(base + channel_offset(c, stride, WIDE) + at, values[c].to(dtype), mask=wanted)
            else:
                tl.store(base + channel_offset(c, stride, WIDE) + at, values[c].to(dtype))


@triton.jit
def _joined(left, right, N: tl.constexpr):
    """(.., N) and (.., N) as (.., 2 N), left ones even; N = 1: both without the last axis."""
    x = tl.join(left, right)
    if N > 1:
        x = tl.reshape(x, (x.shape[0], x.shape[1], 2 * N))
    return x


@triton.jit
def sectors(wanted, valid, MASKED: tl.constexpr):
    """A mask that is constant over a row, which is a sector: true where any voxel of the row is wanted.

    A mask that changed from voxel to voxel would split 128-bit loads and save nothing: memory moves by sectors.
    """
    whole = tl.broadcast_to((tl.max(wanted.to(tl.int32), axis=1) > 0)[:, None], wanted.shape)
    if MASKED:  # the last sector may end beyond the tensor
        whole = whole & valid
    return whole


@triton.jit
def opinion(z, CLASSES: tl.constexpr, FULL: tl.constexpr):
    """`Opinion` of a tuple of logits. A NaN or +inf among them makes top + rest not finite.

    FULL: exponentials down to denormal numbers also for C > 2. Both passes that compare confidences must agree.
    """
    if CLASSES == 2:
        difference = z[1] - z[0]
        gap = tl.abs(difference)
        top = tl.maximum(z[0], z[1], propagate_nan=tl.PropagateNan.ALL)
        rest = tl.exp(-gap)
        label = (difference.to(tl.int32, bitcast=True) > 0).to(tl.int32)
        return Opinion(z, top, label, rest, inverse_of(1.0 + rest), gap, (), ())
    else:
        top = z[0]
        label = tl.zeros(top.shape, tl.int32)
        lower = ()
        for c in tl.static_range(1, CLASSES):
            better = (z[c] <= top) == 0  # also where one of them is NaN, which then is among the lower ones or stays on top
            lower = lower + (tl.where(better, top, z[c]),)
            label = tl.where(better, c, label)
            top = tl.where(better, z[c], top)
        rest = tl.zeros(top.shape, tl.float32)
        below = ()
        others = ()
        for c in tl.static_range(CLASSES - 1):
            below = below + (lower[c] - top,)
            others = others + (exponential(below[c], FULL),)
            rest += others[c]
        return Opinion(z, top, label, rest, inverse_of(1.0 + rest), log1p(rest, CLASSES), below, others)


@triton.jit
def where(mask, a, b, CLASSES: tl.constexpr):
    """The `Opinion` a where the mask is true, b elsewhere; without ``below`` and ``others``."""
    z = ()
    for c in tl.static_range(CLASSES):
        z = z + (tl.where(mask, a.z[c], b.z[c]),)
    return Opinion(
        z, tl.where(mask, a.top, b.top), tl.where(mask, a.label, b.label), tl.where(mask, a.rest, b.rest),
        tl.where(mask, a.inverse, b.inverse), tl.where(mask, a.gap, b.gap), (), (),
    )  # fmt: skip


@triton.jit
def probabilities(of, CLASSES: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr):
    """softmax(z), a tuple of tiles; FULL: as in `opinion`; EXACT: a division's rounding, for sums over many voxels."""
    p = ()
    for c in tl.static_range(CLASSES):
        if EXACT:
            if CLASSES == 2:
                e = tl.where(of.label == c, 1.0, of.rest)
            else:
                e = tl.exp(of.z[c] - of.top)
            p = p + (e / (1.0 + of.rest),)
        elif CLASSES == 2:
            p = p + (tl.where(of.label == c, of.inverse, of.rest * of.inverse),)
        else:
            p = p + (exponential(of.z[c] - of.top, FULL) * of.inverse,)
    return p


@triton.jit
def pick(tiles, label, CLASSES: tl.constexpr):
    """For each voxel the value of the tile that it selects from a tuple."""
    picked = tiles[0]
    for c in tl.static_range(1, CLASSES):
        picked = tl.where(label == c, tiles[c], picked)
    return picked


@triton.jit
def pick_constant(values: tl.constexpr, label, CLASSES: tl.constexpr):
    """For each voxel the constant of a tuple that it selects, a tile of float32."""
    picked = tl.full(label.shape, values[0], tl.float32)
    for c in tl.static_range(1, CLASSES):
        picked = tl.where(label == c, values[c], picked)
    return picked


@triton.jit
def _margin_error(z):
    """Rounding error of z_1 - z_0 (Knuth's two-sum), with the sign that makes it an error of |z_1 - z_0|."""
    total = z[1] - z[0]
    part = total - z[1]
    error = (z[1] - (total - part)) - (z[0] + part)
    return tl.where(total < 0, -error, error)


@triton.jit
def teaches(a, b, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """(m_ab, m_ba): where network b teaches a, and the reverse."""
    m_ab, m_ba = _more_uncertain(a, b, CLASSES, RULES)
    if RULES.minimum > 0:
        m_ab = m_ab & (1.0 / (1.0 + b.rest) >= RULES.minimum)
        m_ba = m_ba & (1.0 / (1.0 + a.rest) >= RULES.minimum)
    if not RULES.learns_a:
        m_ab = tl.zeros(m_ab.shape, tl.int1)
    if not RULES.learns_b:
        m_ba = tl.zeros(m_ba.shape, tl.int1)
    return m_ab, m_ba


@triton.jit
def _more_uncertain(a, b, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """Where network a is strictly less confident than b, and the reverse.

    For two classes entropy and largest probability order voxels alike, for every eps: both fall or rise strictly with the
    margin between the logits, which is compared without rounding.
    """
    if not RULES.compare:
        everywhere = tl.full(a.top.shape, 1, tl.int1)
        return everywhere, everywhere
    elif CLASSES == 2:
        same = a.gap == b.gap
        error_a = _margin_error(a.z)
        error_b = _margin_error(b.z)
        return (a.gap < b.gap) | (same & (error_a < error_b)), (a.gap > b.gap) | (same & (error_a > error_b))
    elif RULES.by_entropy:
        entropy_a = _entropy(a, RULES, CLASSES)
        entropy_b = _entropy(b, RULES, CLASSES)
        return entropy_a > entropy_b, entropy_b > entropy_a
    else:
        return a.rest > b.rest, b.rest > a.rest  # max_c p = 1 / (1 + rest)


@triton.jit
def _entropy(of, RULES: tl.constexpr, CLASSES: tl.constexpr):
    """-sum_c p_c log(p_c + eps), up to a constant that two networks share.

    For small eps without a logarithm for every class: with G(w) = w log(1 + 1 / w),

        p_c log(p_c + eps) = p_c log(p_c) + eps G(p_c / eps)
        -sum_c p_c log(p_c) = log(1 + rest) - inverse sum_c e_c (z_c - top)

    The second line does not cancel where a network is certain. G lies between 0 and 1; w / sqrt(w^2 + 1.06 w + 0.051) is off by
    less than 0.006. At the largest probability G is 1, which is the constant.
    """
    if RULES.eps * CLASSES <= 5e-5 and CLASSES <= 16:  # an error below 3e-7; more classes would spill
        WITH_EPS: tl.constexpr = RULES.eps > 1e-15  # else its square is no float32
        scale = RULES.eps * (1.0 + of.rest)  # w = e_c / scale
        last = 0.051 * (scale * scale)
        total = tl.zeros(of.rest.shape, tl.float32)
        shared = tl.zeros(of.rest.shape, tl.float32)
        for c in tl.static_range(CLASSES - 1):
            e = of.others[c]
            total += e * tl.maximum(of.below[c], -1e4)  # 0 times -inf would be NaN
            if WITH_EPS:
                shared += e * tl.rsqrt(e * (e + 1.06 * scale) + last)
        return of.gap - of.inverse * total - RULES.eps * shared
    else:
        entropy = -of.inverse * log(of.inverse + RULES.eps)
        for c in tl.static_range(CLASSES - 1):
            p = of.others[c] * of.inverse
            entropy -= p * log(p + RULES.eps)
        return entropy


@triton.jit
def _exponent(x):
    """(k, m): x = 2^(k / 2^23) m with k a multiple of 2^23 and m between sqrt(1/2) and sqrt(2); x is positive, not denormal."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) & -0x800000
    return k, (bits - k).to(tl.float32, bitcast=True)


@triton.jit
def _log_near_one(k, f):
    """k / 2^23 log(2) + log(1 + f), by a polynomial with a relative error below 2e-7 where -0.3 < f < 0.42."""
    y = 0.161804959 + f * -0.100823574
    y = -0.249712288 + f * (0.199068844 + f * (-0.172432289 + f * y))
    y = 1.0 + f * (-0.500003219 + f * (0.333347142 + f * y))
    return k.to(tl.float32) * 8.262958294867817e-08 + f * y


@triton.jit
def log(x):
    """log(x) of a positive number that is not denormal: half the instructions of ``tl.log``, which takes any."""
    k, m = _exponent(x)
    return _log_near_one(k, m - 1.0)


@triton.jit
def exponential(x, FULL: tl.constexpr):
    """exp(x); unless FULL 0 below 1e-38 and off by |x| / 2 units in the last place, in two instructions instead of five."""
    if FULL:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def inverse_of(x):
    """1 / x for x >= 1, within 4 units in the last place: two instructions instead of a division's seven."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def log1p(x, CLASSES: tl.constexpr):
    """log(1 + x) for 0 <= x < CLASSES, to float32's relative precision."""
    if CLASSES == 2:  # x <= 1: a polynomial with a relative error below 5e-9
        y = 0.0198513512 + x * -0.00324400025
        y = -0.153055802 + x * (0.106036335 + x * (-0.0569593236 + x * y))
        y = -0.499999017 + x * (0.333299637 + x * (-0.249541327 + x * (0.196759343 + x * y)))
        return x * (1.0 + x * y)
    else:
        k, m = _exponent(1.0 + x)
        return _log_near_one(k, tl.where(k == 0, x, m - 1.0))


@triton.jit
def cross_entropy(student, label, ON_LOGITS: tl.constexpr, CLASSES: tl.constexpr):
    """CE of a student against the teacher's label."""
    if ON_LOGITS:
        if CLASSES == 2:
            return log1p(student.rest, CLASSES) + tl.where(student.label == label, 0.0, student.gap)
        else:
            return student.gap + (student.top - pick(student.z, label, CLASSES))
    else:
        p = probabilities(student, CLASSES, False, False)
        total = exponential(p[0], False)
        for c in tl.static_range(1, CLASSES):
            total += exponential(p[c], False)
        return log(total) - pick(p, label, CLASSES)


@triton.jit
def slope(student, label, ON_LOGITS: tl.constexpr, CLASSES: tl.constexpr):
    """dCE/dz of a student against the teacher's label, a tuple of tiles."""
    p = probabilities(student, CLASSES, True, False)
    result = ()
    if ON_LOGITS:
        # p - [c = own] without cancellation; then the one moves from own to the teacher's class.
        for c in tl.static_range(CLASSES):
            own = student.label == c
            one = own.to(tl.float32) - (label == c).to(tl.float32)
            result = result + (tl.where(own, -student.rest * student.inverse, p[c]) + one,)
    else:
        # p(c) (D(c) - sum_q p(q) D(q)), D = d - d(own): a shift cancels in the formula, and D(own) = 0 keeps small numbers.
        e = ()
        total = tl.zeros(label.shape, tl.float32)
        for c in tl.static_range(CLASSES):
            e = e + (exponential(p[c], False),)
            total += e[c]
        inverse = inverse_of(total)
        d = ()
        for c in tl.static_range(CLASSES):
            d = d + (e[c] * inverse - (label == c).to(tl.float32),)
        own = pick(d, student.label, CLASSES)
        mean = tl.zeros(label.shape, tl.float32)
        for c in tl.static_range(CLASSES):
            mean += p[c] * (d[c] - own)
        for c in tl.static_range(CLASSES):
            result = result + (p[c] * ((d[c] - own) - mean),)
    return result


@triton.jit
def first_slope(student, label, ON_LOGITS: tl.constexpr):
    """dCE/dz(0) for C = 2; that of class 1 is its negative."""
    if ON_LOGITS:
        size = tl.where(student.label == label, student.rest * student.inverse, student.inverse)  # p(0) - [label = 0]
        return tl.where(label == 0, -size, size)
    else:
        return slope(student, label, ON_LOGITS, 2)[0]
