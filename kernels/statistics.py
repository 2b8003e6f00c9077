"""First pass: reliable voxels per pair, the class prototypes of both networks, and the sums of the Dice loss.

One read of all logits, features and labels. Every program walks over a run of blocks of one sample, adds in registers and
writes one partial result; prototypes.py adds the partial results in a fixed order. Non-finite values end up in ``nonfinite``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from rplib.kernels.dice import load_target
from rplib.kernels.products import add_products, labels_of_product, store_products, voxels_of_product
from rplib.kernels.voxels import (
    LAST,
    PACKED,
    SIZES,
    channel_offset,
    cross_entropy,
    kept,
    load,
    load_logits,
    load_mask,
    member_of,
    opinion,
    probabilities,
    sample_offset,
    strides_of,
    teaches,
    voxel_offsets,
    voxels_of,
)


class Sums(NamedTuple):
    """Sums of a program. Tiles of one number per row (ROWS,); tuples over classes where there are some.

    seen: voxels, a number, or one per row where some do not count. ab, ba: reliable voxels of student a and b. nonfinite: 0 or
    NaN. members: voxels pseudo-labelled as class 1, 2 .. (those of class 0 are the rest), by a in the lower half of the bits, by
    b in the upper. differing: voxels whose pseudo-labels differ, if requested. features_a, features_b: sums of features,
    (FEATURE_BLOCK, ROWS), with DOT one tile (CLASSES_DOT, FEATURE_BLOCK), IN_REGISTERS for every TILE of features and 16 classes
    (groups, 16, TILE). overlap_a, overlap_b, soft_a, soft_b, truth: of Dice; PAIRED truth has classes 2 k and 2 k + 1 in the
    halves of tile k. entropy: of cross-entropy, both networks'.
    """

    seen: tl.tensor
    ab: tl.tensor
    ba: tl.tensor
    nonfinite: tl.tensor
    members: tl.tuple
    differing: tl.tuple
    features_a: tl.tuple
    features_b: tl.tuple
    overlap_a: tl.tuple
    overlap_b: tl.tuple
    soft_a: tl.tuple
    soft_b: tl.tuple
    truth: tl.tuple
    entropy: tl.tuple


@triton.jit
def _zeros(SHAPE: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):
    """A tuple of N tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros(SHAPE, DTYPE),)
    return tiles


@triton.jit
def _rows(tile):
    """Sums of the rows of a tile (ROWS, VECTOR)."""
    return tl.sum(tile, axis=1)


@triton.jit
def _add_members(members, a, b, keep, CLASSES: tl.constexpr, SOME: tl.constexpr):
    """Two counts in one register; `launch.split` gives a program so few blocks that 16 bits do not overflow."""
    if SOME:
        a = tl.where(keep, a, CLASSES)
        b = tl.where(keep, b, CLASSES)
    added = ()
    for c in tl.static_range(1, CLASSES):
        added = added + (members[c - 1] + _rows(tl.where(a == c, 1, 0) + tl.where(b == c, 65536, 0)),)
    return added


@triton.jit
def _add_tiles(sums, tiles, t, known, OF_CLASS: tl.constexpr, CLASSES: tl.constexpr):
    """Add a tuple of tiles where the target is known, or with OF_CLASS where it is the tile's class."""
    added = ()
    for c in tl.static_range(CLASSES):
        if OF_CLASS:
            added = added + (sums[c] + _rows(tl.where(t == c, tiles[c], 0.0)),)
        else:
            added = added + (sums[c] + _rows(tl.where(known, tiles[c], 0.0)),)
    return added


@triton.jit
def _add_truth(sums, t, CLASSES: tl.constexpr, PAIRED: tl.constexpr):
    """PAIRED: two classes in one register, as two networks in `_add_members`."""
    added = ()
    if PAIRED:
        for k in tl.static_range((CLASSES + 1) // 2):
            added = added + (sums[k] + _rows(tl.where(t == 2 * k, 1, 0) + tl.where(t == 2 * k + 1, 65536, 0)),)
    else:
        for c in tl.static_range(CLASSES):
            added = added + (sums[c] + _rows((t == c).to(tl.int32)),)
    return added


@triton.jit
def _add_features(
    sums, base, at, stride, f, label, valid, keep,
    FEATURES: tl.constexpr, CLASSES: tl.constexpr, CLASSES_DOT: tl.constexpr, DOT: tl.constexpr, RULES: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add one block of features to the sums per class: running sums, one number per thread for every class and feature.

    With DOT a product with the one-hot labels, whose operands pass through shared memory: one tile (CLASSES_DOT, FEATURE_BLOCK).
    """
    pointers = base + channel_offset(f, stride, WIDE)[:, None, None] + at[None, :, :]
    inside = (f < FEATURES)[:, None, None]
    if MASKED:
        inside = inside & valid[None, :, :]
    x = load(pointers, inside, MASKED or RAGGED)  # (FEATURE_BLOCK, ROWS, VECTOR)
    if RULES.partial:
        x = tl.where(keep[None, :, :], x, 0.0)
    added = ()
    if DOT:
        VOXELS: tl.constexpr = x.shape[1] * x.shape[2]
        labels = tl.reshape(label, (1, VOXELS))
        if MASKED:
            labels = tl.where(tl.reshape(valid, (1, VOXELS)), labels, CLASSES_DOT)
        one_hot = (tl.arange(0, CLASSES_DOT)[:, None] == labels).to(tl.float32)  # (CLASSES_DOT, voxels)
        x = tl.reshape(x, (x.shape[0], VOXELS))
        added = (sums[0] + tl.dot(one_hot, tl.trans(x), input_precision="ieee"),)
    else:
        label = label[None, :, :]
        for c in tl.static_range(CLASSES):  # beyond the end x is 0
            added = added + (sums[c] + tl.sum(x * (label == c).to(tl.float32), axis=2),)
    return added


class Inputs(NamedTuple):
    """Inputs of a program: pointers to its sample, strides, sizes."""

    za: tl.tensor
    zb: tl.tensor
    fa: tl.tensor
    fb: tl.tensor
    target: tl.tensor
    mask: tl.tensor
    za_strides: tl.tuple
    zb_strides: tl.tuple
    fa_strides: tl.tuple
    fb_strides: tl.tuple
    target_strides: tl.tuple
    mask_strides: tl.tuple
    labelled: tl.tensor
    voxels: tl.tensor
    size1: tl.tensor
    size2: tl.tensor
    first_feature: tl.tensor
    sample: tl.tensor
    labels: tl.tensor  # samples with a target


class Options(NamedTuple):
    """The constants of statistics_kernel that a block needs."""

    CLASSES: tl.constexpr
    CLASSES_PAD: tl.constexpr
    CLASSES_DOT: tl.constexpr
    FEATURES_A: tl.constexpr
    FEATURES_B: tl.constexpr
    FEATURE_BLOCK: tl.constexpr
    VOXEL_GROUPS: tl.constexpr
    FEATURE_GROUPS: tl.constexpr
    RUNS: tl.constexpr
    K: tl.constexpr
    TILE: tl.constexpr
    ROWS: tl.constexpr
    VECTOR: tl.constexpr
    SIDE_BY_SIDE: tl.constexpr
    PAIRED: tl.constexpr
    WITH_FEATURES: tl.constexpr
    DOT: tl.constexpr
    IN_REGISTERS: tl.constexpr
    RULES: tl.constexpr
    Z_LAYOUT: tl.constexpr
    F_LAYOUT: tl.constexpr
    M_LAYOUT: tl.constexpr
    FLAT: tl.constexpr
    WIDE: tl.constexpr


@triton.jit
def _block(start, s, i, o, MASKED: tl.constexpr):
    """Add the block of voxels that begins at ``start`` to the `Sums` s; i: `Inputs`, o: `Options`."""
    CLASSES: tl.constexpr = o.CLASSES
    LOGITS: tl.constexpr = 1 if o.IN_REGISTERS else o.VECTOR
    SOME: tl.constexpr = MASKED or o.RULES.partial  # not every voxel of the block counts
    row = tl.arange(0, o.ROWS)[:, None]
    v = start + row * LOGITS + tl.arange(0, LOGITS)[None, :]  # (ROWS, VECTOR)
    valid = v < i.voxels
    keep = load_mask(i.mask, v, i.size1, i.size2, i.mask_strides, valid, o.RULES, o.M_LAYOUT, o.FLAT, o.WIDE, MASKED)
    za_v = voxel_offsets(v, i.size1, i.size2, i.za_strides, o.Z_LAYOUT, o.FLAT, o.WIDE)
    zb_v = voxel_offsets(v, i.size1, i.size2, i.zb_strides, o.Z_LAYOUT, o.FLAT, o.WIDE)
    za = load_logits(i.za, za_v, i.za_strides.channel, valid, CLASSES, o.CLASSES_PAD, o.Z_LAYOUT, o.WIDE, MASKED)
    zb = load_logits(i.zb, zb_v, i.zb_strides.channel, valid, CLASSES, o.CLASSES_PAD, o.Z_LAYOUT, o.WIDE, MASKED)
    if o.RULES.masked:
        za = kept(za, keep, CLASSES)
        zb = kept(zb, keep, CLASSES)
    a = opinion(za, CLASSES, False)
    b = opinion(zb, CLASSES, False)
    m_ab, m_ba = teaches(a, b, CLASSES, o.RULES)
    counted = keep  # by the supervised term
    if o.RULES.unlabelled:
        keep = keep & (i.sample >= i.labels)
    if SOME:
        m_ab = m_ab & keep
        m_ba = m_ba & keep
    seen = s.seen
    if o.RULES.partial:
        seen += _rows(keep.to(tl.int32))
    elif MASKED:
        seen += i.voxels % (o.ROWS * LOGITS)
    ab = s.ab + _rows(m_ab.to(tl.int32))
    ba = s.ba + _rows(m_ba.to(tl.int32))
    if CLASSES == 2:  # every NaN and +inf shows in the tops
        bad = tl.maximum(a.top, b.top, propagate_nan=tl.PropagateNan.ALL)
    else:
        bad = a.top + a.rest + b.top + b.rest
    nonfinite = s.nonfinite + _rows(bad * 0.0)  # 0, or NaN where a logit is NaN or +inf
    members = s.members
    differing = s.differing
    features_a = s.features_a
    features_b = s.features_b
    overlap_a = s.overlap_a
    overlap_b = s.overlap_b
    soft_a = s.soft_a
    soft_b = s.soft_b
    truth = s.truth
    entropy = s.entropy
    if o.RULES.supervised:
        t_v = voxel_offsets(v, i.size1, i.size2, i.target_strides, 0, o.FLAT, o.WIDE)
        t, known = load_target(i.target, t_v, i.labelled, valid, counted, o.RULES, MASKED)
        if o.RULES.entropy:  # before Dice, which needs the registers
            entropy_a = entropy[0]
            entropy_b = entropy[1]
            if o.RULES.learns_a:
                entropy_a += _rows(tl.where(known, cross_entropy(a, t, True, CLASSES), 0.0))
            if o.RULES.learns_b:
                entropy_b += _rows(tl.where(known, cross_entropy(b, t, True, CLASSES), 0.0))
            entropy = (entropy_a, entropy_b)
        if o.RULES.dice:
            p_a = probabilities(a, CLASSES, True, True)
            p_b = probabilities(b, CLASSES, True, True)
            if o.RULES.learns_a:
                overlap_a = _add_tiles(overlap_a, p_a, t, known, True, CLASSES)
            if o.RULES.learns_b:
                overlap_b = _add_tiles(overlap_b, p_b, t, known, True, CLASSES)
            if o.RULES.learns_a:
                soft_a = _add_tiles(soft_a, p_a, t, known, False, CLASSES)
            if o.RULES.learns_b:
                soft_b = _add_tiles(soft_b, p_b, t, known, False, CLASSES)
        truth = _add_truth(truth, t, CLASSES, o.PAIRED)
    if o.WITH_FEATURES or o.RULES.detailed:
        members = _add_members(members, a.label, b.label, keep, CLASSES, SOME)
    if o.RULES.detailed:
        different = a.label != b.label
        if SOME:
            different = different & keep
        differing = (differing[0] + _rows(different.to(tl.int32)),)
    if o.WITH_FEATURES:
        RAGGED_A: tl.constexpr = o.FEATURES_A % o.FEATURE_BLOCK != 0 or o.FEATURES_A != o.FEATURES_B
        RAGGED_B: tl.constexpr = o.FEATURES_B % o.FEATURE_BLOCK != 0 or o.FEATURES_A != o.FEATURES_B
        if o.IN_REGISTERS:
            v = voxels_of_product(start, o)
            valid = v < i.voxels
        fa_v = voxel_offsets(v, i.size1, i.size2, i.fa_strides, o.F_LAYOUT, o.FLAT, o.WIDE)
        fb_v = voxel_offsets(v, i.size1, i.size2, i.fb_strides, o.F_LAYOUT, o.FLAT, o.WIDE)
        if o.IN_REGISTERS:
            upper = b.label << 8
            if o.RULES.partial:
                upper = upper | keep.to(tl.int32) << 16
            both = labels_of_product(tl.sum(tl.join(a.label, upper), axis=2), o)
            of_b = both >> 8
            if o.RULES.partial:
                keep = of_b >= 256
                of_b = of_b & 255
            features_a = add_products(
                features_a, i.fa, fa_v, i.fa_strides.channel, i.first_feature, both & 255, valid, keep, o,
                o.FEATURES_A, MASKED, RAGGED_A,
            )  # fmt: skip
            features_b = add_products(
                features_b, i.fb, fb_v, i.fb_strides.channel, i.first_feature, of_b, valid, keep, o,
                o.FEATURES_B, MASKED, RAGGED_B,
            )  # fmt: skip
        else:
            f = i.first_feature + tl.arange(0, o.FEATURE_BLOCK)
            features_a = _add_features(
                features_a, i.fa, fa_v, i.fa_strides.channel, f, a.label, valid, keep, o.FEATURES_A, CLASSES, o.CLASSES_DOT,
                o.DOT, o.RULES, o.WIDE, MASKED, RAGGED_A,
            )  # fmt: skip
            features_b = _add_features(
                features_b, i.fb, fb_v, i.fb_strides.channel, f, b.label, valid, keep, o.FEATURES_B, CLASSES, o.CLASSES_DOT,
                o.DOT, o.RULES, o.WIDE, MASKED, RAGGED_B,
            )  # fmt: skip
    return Sums(
        seen, ab, ba, nonfinite, members, differing, features_a, features_b,
        overlap_a, overlap_b, soft_a, soft_b, truth, entropy,
    )  # fmt: skip


@triton.jit
def _walk(i, program, programs, blocks_per_program, o):
    """`Sums` of a program: whole blocks first, and for the last program of a sample the ragged tail."""
    BLOCK: tl.constexpr = o.ROWS * (1 if o.IN_REGISTERS else o.VECTOR)
    PER_CLASS: tl.constexpr = o.CLASSES if o.RULES.dice else 0
    LABELS: tl.constexpr = (o.CLASSES + 1) // 2 if o.PAIRED else o.CLASSES
    if o.IN_REGISTERS:
        GROUPS: tl.constexpr = o.VOXEL_GROUPS * o.FEATURE_GROUPS
        TILES: tl.constexpr = o.FEATURE_BLOCK // o.FEATURE_GROUPS // o.TILE * (o.CLASSES_DOT // 16)
        features = _zeros((GROUPS, 16, o.TILE), tl.float32, TILES if o.WITH_FEATURES else 0)
    elif o.DOT:
        features = _zeros((o.CLASSES_DOT, o.FEATURE_BLOCK), tl.float32, 1)
    else:
        features = _zeros((o.FEATURE_BLOCK, o.ROWS), tl.float32, o.CLASSES if o.WITH_FEATURES else 0)
    members = _zeros((o.ROWS,), tl.int32, o.CLASSES - 1 if o.WITH_FEATURES or o.RULES.detailed else 0)
    per_class = _zeros((o.ROWS,), tl.float32, PER_CLASS)
    zero = tl.zeros((o.ROWS,), tl.int32)
    differing = _zeros((o.ROWS,), tl.int32, 1 if o.RULES.detailed else 0)
    first = program * blocks_per_program
    whole = tl.minimum(first + blocks_per_program, i.voxels // BLOCK)
    if o.RULES.partial:
        seen = zero
    else:
        seen = tl.maximum(whole - first, 0) * BLOCK
    sums = Sums(
        seen, zero, zero, tl.zeros((o.ROWS,), tl.float32), members, differing,
        features, features, per_class, per_class, per_class, per_class,
        _zeros((o.ROWS,), tl.int32, LABELS if o.RULES.supervised else 0),
        _zeros((o.ROWS,), tl.float32, 2 if o.RULES.entropy else 0),
    )  # fmt: skip
    # One stage: nothing is copied ahead into shared memory.
    for block in tl.range(first, whole, num_stages=1):
        sums = _block(block * BLOCK, sums, i, o, False)
    if (program == programs - 1) & (i.voxels % BLOCK != 0):
        sums = _block(i.voxels // BLOCK * BLOCK, sums, i, o, True)
    return sums


@triton.jit
def _store_features(
    out, sums, f, FEATURES: tl.constexpr, CLASSES: tl.constexpr, CLASSES_DOT: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Write one network's sums (C, F) of this program; returns 0, or NaN where one of them is not finite."""
    if DOT:
        cls = tl.arange(0, CLASSES_DOT)
        inside = (cls < CLASSES)[:, None] & (f < FEATURES)[None, :]
        tl.store(out + cls[:, None] * FEATURES + f[None, :], sums[0], mask=inside)
        return tl.sum(tl.sum(sums[0] * 0.0, axis=0), axis=0)
    else:
        bad = tl.zeros(f.shape, tl.float32)
        for c in tl.static_range(CLASSES):
            total = tl.sum(sums[c], axis=1)
            tl.store(out + c * FEATURES + f, total, mask=f < FEATURES)
            bad += total * 0.0
        return tl.sum(bad, axis=0)


@triton.jit
def _run(i, program, programs, blocks_per_program, sums_a, sums_b, o):
    """Walk over the blocks and write the sums of features; returns `Sums`, and 0, or NaN where a number is not finite."""
    sums = _walk(i, program, programs, blocks_per_program, o)
    bad = tl.sum(sums.nonfinite, axis=0)
    if o.WITH_FEATURES:
        if o.IN_REGISTERS:
            bad += store_products(sums_a, sums.features_a, i.first_feature, o, o.FEATURES_A)
            bad += store_products(sums_b, sums.features_b, i.first_feature, o, o.FEATURES_B)
        else:
            f = i.first_feature + tl.arange(0, o.FEATURE_BLOCK)
            bad += _store_features(sums_a, sums.features_a, f, o.FEATURES_A, o.CLASSES, o.CLASSES_DOT, o.DOT)
            bad += _store_features(sums_b, sums.features_b, f, o.FEATURES_B, o.CLASSES, o.CLASSES_DOT, o.DOT)
    return sums, bad


@triton.jit
def _store_members(out, members, voxels, SHIFT: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr):
    """Write one network's voxels of each class; ``voxels``: of this program, so that class 0 is the rest."""
    cls = tl.arange(0, CLASSES_PAD)
    totals = tl.zeros((CLASSES_PAD,), tl.int32)
    rest = voxels
    for c in tl.static_range(1, CLASSES):
        total = tl.sum((members[c - 1] >> SHIFT) & 65535, axis=0)
        totals = tl.where(cls == c, total, totals)
        rest -= total
    tl.store(out + cls, tl.where(cls == 0, rest, totals), mask=cls < CLASSES)


@triton.jit
def _store_pairs(out, sums, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr):
    cls = tl.arange(0, CLASSES_PAD)
    totals = tl.zeros((CLASSES_PAD,), tl.int32)
    for c in tl.static_range(CLASSES):
        totals = tl.where(cls == c, tl.sum((sums[c // 2] >> 16 * (c % 2)) & 65535, axis=0), totals)
    tl.store(out + cls, totals, mask=cls < CLASSES)


@triton.jit
def _store_per_class(out, sums, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr):
    cls = tl.arange(0, CLASSES_PAD)
    totals = tl.zeros((CLASSES_PAD,), sums[0].dtype)
    for c in tl.static_range(CLASSES):
        totals = tl.where(cls == c, tl.sum(sums[c], axis=0), totals)
    tl.store(out + cls, totals, mask=cls < CLASSES)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    za, zb, fa, fb,  # logits and features of networks a and b
    target,  # classes of the first `labelled` samples
    mask,  # with RULES.masked (B, *spatial) uint8, 0 where a voxel does not count
    order,  # with RULES.reordered (B,) int32, indices of the samples, the labelled ones first; all other rows are in this order
    sums_a, sums_b,  # out: (B, programs, C, F) float32
    members,  # out: (3, B, programs, C) int32, voxels per class: a, b, target
    dice,  # out: (labelled, programs, 4 C or with cross-entropy 4 C + 2) float32, its sums but ``truth`` (see dice.py)
    counts,  # out: (2 or detailed 3, B, programs) int32, reliable voxels: student a, student b; voxels whose labels differ
    nonfinite,  # out: (B, programs, feature blocks) float32, 0 or NaN
    labelled, voxels, size1, size2, t_b, t_0, t_1, t_2, m_b, m_0, m_1, m_2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    fa_b, fa_c, fa_0, fa_1, fa_2, fb_b, fb_c, fb_0, fb_1, fb_2,
    programs, blocks_per_program,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, VOXEL_GROUPS: tl.constexpr, FEATURE_GROUPS: tl.constexpr,
    WITH_FEATURES: tl.constexpr, DOT: tl.constexpr, IN_REGISTERS: tl.constexpr, RULES: tl.constexpr,
    Z_LAYOUT: tl.constexpr, F_LAYOUT: tl.constexpr, M_LAYOUT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs * B, feature blocks)."""
    here = tl.program_id(0)
    sample = here // programs
    program = here % programs
    feature_block = tl.program_id(1)
    all_programs = tl.num_programs(0)
    first_feature = feature_block * FEATURE_BLOCK
    member = member_of(order, sample, RULES)
    za += sample_offset(member, za_b, CLASSES, Z_LAYOUT)
    zb += sample_offset(member, zb_b, CLASSES, Z_LAYOUT)
    if WITH_FEATURES:
        fa += sample_offset(member, fa_b, FEATURES_A, F_LAYOUT)
        fb += sample_offset(member, fb_b, FEATURES_B, F_LAYOUT)
    if RULES.supervised:
        target += sample_offset(sample, t_b, 1, 0)
    if RULES.masked:
        mask += sample_offset(member, m_b, 1, M_LAYOUT)
    inputs = Inputs(
        za, zb, fa, fb, target, mask,
        strides_of(za_c, za_0, za_1, za_2, CLASSES, Z_LAYOUT), strides_of(zb_c, zb_0, zb_1, zb_2, CLASSES, Z_LAYOUT),
        strides_of(fa_c, fa_0, fa_1, fa_2, FEATURES_A, F_LAYOUT), strides_of(fb_c, fb_0, fb_1, fb_2, FEATURES_B, F_LAYOUT),
        strides_of(0, t_0, t_1, t_2, 1, 0), strides_of(0, m_0, m_1, m_2, 1, M_LAYOUT),
        (sample < labelled) & (feature_block == 0), voxels_of(voxels, Z_LAYOUT), size1, size2, first_feature,
        sample, labelled,
    )  # fmt: skip
    SIDE_BY_SIDE: tl.constexpr = F_LAYOUT == LAST or F_LAYOUT == PACKED
    HALF: tl.constexpr = fa.dtype.element_ty != tl.float32
    PAIRED: tl.constexpr = IN_REGISTERS and (SIDE_BY_SIDE or HALF)  # where registers are short; elsewhere more of them spill
    K: tl.constexpr = BLOCK // VOXEL_GROUPS
    RUNS: tl.constexpr = K // 4 if SIDE_BY_SIDE else K // 4 // VECTOR
    TILE: tl.constexpr = VECTOR * 8 if SIDE_BY_SIDE else 16
    ROWS: tl.constexpr = BLOCK if IN_REGISTERS else BLOCK // VECTOR
    row = here.to(tl.int64) * CLASSES
    sums, bad = _run(
        inputs, program, programs, blocks_per_program, sums_a + row * FEATURES_A, sums_b + row * FEATURES_B,
        Options(
            CLASSES, CLASSES_PAD, CLASSES_DOT, FEATURES_A, FEATURES_B, FEATURE_BLOCK, VOXEL_GROUPS, FEATURE_GROUPS,
            RUNS, K, TILE, ROWS, VECTOR, SIDE_BY_SIDE, PAIRED, WITH_FEATURES, DOT, IN_REGISTERS, RULES,
            Z_LAYOUT, F_LAYOUT, M_LAYOUT, FLAT, WIDE,
        ),
    )  # fmt: skip
    tl.store(nonfinite + here * tl.num_programs(1) + feature_block, bad)
    if feature_block == 0:
        tl.store(counts + here, tl.sum(sums.ab, axis=0))
        tl.store(counts + all_programs + here, tl.sum(sums.ba, axis=0))
        mine = here * CLASSES
        plane = all_programs * CLASSES
        if RULES.detailed:
            tl.store(counts + 2 * all_programs + here, tl.sum(sums.differing[0], axis=0))
        if WITH_FEATURES or RULES.detailed:
            seen = sums.seen
            if RULES.partial:
                seen = tl.sum(seen, axis=0)
            _store_members(members + mine, sums.members, seen, 0, CLASSES, CLASSES_PAD)
            _store_members(members + plane + mine, sums.members, seen, 16, CLASSES, CLASSES_PAD)
        if RULES.supervised:
            if sample < labelled:
                if PAIRED:
                    _store_pairs(members + 2 * plane + mine, sums.truth, CLASSES, CLASSES_PAD)
                else:
                    _store_per_class(members + 2 * plane + mine, sums.truth, CLASSES, CLASSES_PAD)
                dice += here * (4 * CLASSES + (2 if RULES.entropy else 0))
                if RULES.dice:
                    _store_per_class(dice, sums.overlap_a, CLASSES, CLASSES_PAD)
                    _store_per_class(dice + CLASSES, sums.overlap_b, CLASSES, CLASSES_PAD)
                    _store_per_class(dice + 2 * CLASSES, sums.soft_a, CLASSES, CLASSES_PAD)
                    _store_per_class(dice + 3 * CLASSES, sums.soft_b, CLASSES, CLASSES_PAD)
                if RULES.entropy:
                    tl.store(dice + 4 * CLASSES, tl.sum(sums.entropy[0], axis=0))
                    tl.store(dice + 4 * CLASSES + 1, tl.sum(sums.entropy[1], axis=0))
