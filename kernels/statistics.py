"""First pass: reliable voxels per pair, the class prototypes of both networks, and the sums of the Dice loss.

One read of all logits, features and labels. Every program walks over a run of blocks of one sample, adds in registers and
writes one partial result; a second, tiny kernel adds the partials in a fixed order. Non-finite values end up in ``poison``.
"""

import triton
import triton.language as tl

from rplib.kernels.dice import load_target
from rplib.kernels.voxels import batch_stride, channel_offsets, doubt, load, more_doubt, softmax_parts, voxel_offsets


@triton.jit
def _add_features(
    total, base, offsets, stride_c, f, label, valid,
    FEATURES: tl.constexpr, CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add one block of features to the sums per class.

    Few classes: a tile (CLASSES_PAD, FEATURE_BLOCK, BLOCK), reduced over voxels only once at the end of the program. Many:
    (CLASSES_DOT, FEATURE_BLOCK), a product with the one-hot labels.
    """
    pointers = base + channel_offsets(f, stride_c, WIDE)[:, None] + offsets[None, :]
    inside = (f < FEATURES)[:, None]
    if MASKED:
        inside = inside & valid[None, :]
    x = load(pointers, inside, MASKED or RAGGED)  # (FEATURE_BLOCK, BLOCK)
    if DOT:
        one_hot = (tl.arange(0, CLASSES_DOT)[:, None] == label[None, :]).to(tl.float32)  # (CLASSES_DOT, BLOCK)
        total += tl.dot(one_hot, tl.trans(x), input_precision="ieee")
    else:
        cls = tl.arange(0, CLASSES_PAD)[:, None, None]
        total += tl.where(cls == label[None, None, :], x[None, :, :], 0.0)
    return total


@triton.jit
def _block(
    start, total_a, total_b, count_ab, count_ba, poison, members_a, members_b, overlap_a, overlap_b, soft_a, soft_b, truth,
    za, zb, fa, fb, target, labelled,
    voxels, size1, size2, t_0, t_1, t_2,
    za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2, fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2,
    first_feature, eps,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr, WITH_DICE: tl.constexpr, DOT: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK)
    valid = v < voxels
    cls = tl.arange(0, CLASSES_PAD)
    cls_ok = (cls < CLASSES)[:, None]
    if MASKED:
        cls_ok = cls_ok & valid[None, :]
    ragged: tl.constexpr = CLASSES_PAD != CLASSES
    column = cls[:, None]

    za_v = voxel_offsets(v, size1, size2, za_0, za_1, za_2, FLAT, WIDE)
    zb_v = voxel_offsets(v, size1, size2, zb_0, zb_1, zb_2, FLAT, WIDE)
    # (CLASSES_PAD, BLOCK)
    a = load(za + channel_offsets(cls, za_c, WIDE)[:, None] + za_v[None, :], cls_ok, MASKED or ragged)
    b = load(zb + channel_offsets(cls, zb_c, WIDE)[:, None] + zb_v[None, :], cls_ok, MASKED or ragged)
    # One network after the other: with many classes their tiles do not fit into registers together.
    top_a, label_a, rest_a, e_a = softmax_parts(a, column, CLASSES, CLASSES_PAD)
    p_a = e_a / (1.0 + rest_a)[None, :]
    doubt_a, error_a = doubt(a, p_a, rest_a, column, eps, CLASSES, CONFIDENCE)
    top_b, label_b, rest_b, e_b = softmax_parts(b, column, CLASSES, CLASSES_PAD)
    p_b = e_b / (1.0 + rest_b)[None, :]
    doubt_b, error_b = doubt(b, p_b, rest_b, column, eps, CLASSES, CONFIDENCE)
    m_ab, m_ba = more_doubt(doubt_a, error_a, doubt_b, error_b, CLASSES, CONFIDENCE)

    if MASKED:  # no class counts a voxel beyond the end
        m_ab = m_ab & valid
        m_ba = m_ba & valid
        label_a = tl.where(valid, label_a, CLASSES_DOT)
        label_b = tl.where(valid, label_b, CLASSES_DOT)
    count_ab += m_ab.to(tl.int32)
    count_ba += m_ba.to(tl.int32)
    poison += (top_a + rest_a + top_b + rest_b) * 0.0  # 0, or NaN where a logit is NaN or +inf
    if WITH_DICE:
        t_v = voxel_offsets(v, size1, size2, t_0, t_1, t_2, FLAT, WIDE)
        t, known = load_target(target, t_v, labelled, valid, MASKED)
        of_class = column.to(tl.float32) == t[None, :]  # (CLASSES_PAD, BLOCK)
        overlap_a += tl.where(of_class, p_a, 0.0)
        overlap_b += tl.where(of_class, p_b, 0.0)
        soft_a += tl.where(known[None, :], p_a, 0.0)
        soft_b += tl.where(known[None, :], p_b, 0.0)
        truth += of_class.to(tl.int32)
    if WITH_FEATURES:
        members_a += (column == label_a[None, :]).to(tl.int32)
        members_b += (column == label_b[None, :]).to(tl.int32)
        f = first_feature + tl.arange(0, FEATURE_BLOCK)
        fa_v = voxel_offsets(v, size1, size2, fa_0, fa_1, fa_2, FLAT, WIDE)
        fb_v = voxel_offsets(v, size1, size2, fb_0, fb_1, fb_2, FLAT, WIDE)
        total_a = _add_features(
            total_a, fa, fa_v, fa_c, f, label_a, valid, FEATURES_A, CLASSES_PAD, CLASSES_DOT,
            DOT, WIDE, MASKED, FEATURES_A % FEATURE_BLOCK != 0 or FEATURES_A != FEATURES_B,
        )  # fmt: skip
        total_b = _add_features(
            total_b, fb, fb_v, fb_c, f, label_b, valid, FEATURES_B, CLASSES_PAD, CLASSES_DOT,
            DOT, WIDE, MASKED, FEATURES_B % FEATURE_BLOCK != 0 or FEATURES_A != FEATURES_B,
        )  # fmt: skip
    return (
        total_a, total_b, count_ab, count_ba, poison, members_a, members_b, overlap_a, overlap_b, soft_a, soft_b, truth
    )  # fmt: skip


@triton.jit
def _store_sums(
    out, total, f, FEATURES: tl.constexpr, CLASSES: tl.constexpr,
    CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write one network's sums (C, F) of this program; returns 0, or NaN where one of them is not finite."""
    if DOT:
        cls = tl.arange(0, CLASSES_DOT)
        sums = total
    else:
        cls = tl.arange(0, CLASSES_PAD)
        sums = tl.sum(total, axis=2)
    inside = (cls < CLASSES)[:, None] & (f < FEATURES)[None, :]
    tl.store(out + cls[:, None] * FEATURES + f[None, :], sums, mask=inside)
    return tl.sum(tl.sum(sums * 0.0, axis=0), axis=0)


@triton.jit
def _store_per_class(out, tile, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr):
    """Write the sums over voxels of a tile (CLASSES_PAD, BLOCK)."""
    cls = tl.arange(0, CLASSES_PAD)
    tl.store(out + cls, tl.sum(tile, axis=1), mask=cls < CLASSES)


@triton.jit
def statistics_kernel(
    za, zb, fa, fb,  # logits and features of networks a and b
    target,  # classes of the first `labelled` samples
    sums_a, sums_b,  # out: (B, programs, C, F) float32
    members,  # out: (3, B, programs, C) int32, voxels per class: a, b, target
    dice,  # out: (labelled, programs, 4, C) float32, overlap and soft sums (see dice.py)
    counts,  # out: (2, B, programs) int32, reliable voxels: student a, student b
    poison,  # out: (B, programs, feature blocks) float32, 0 or NaN
    labelled, voxels, size1, size2, t_b, t_0, t_1, t_2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    fa_b, fa_c, fa_0, fa_1, fa_2, fb_b, fb_c, fb_0, fb_1, fb_2,
    blocks_per_program,
    EPS: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr, WITH_DICE: tl.constexpr, DOT: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, B, feature blocks)."""
    if PACKED:  # a constant tells the compiler how wide it may load
        za_2 = CLASSES
        zb_2 = CLASSES
    program = tl.program_id(0)
    sample = tl.program_id(1)
    feature_block = tl.program_id(2)
    batch = tl.num_programs(1)
    programs = tl.num_programs(0)
    wide_sample = sample.to(tl.int64)
    za += wide_sample * batch_stride(za_b, CLASSES, PACKED)
    zb += wide_sample * batch_stride(zb_b, CLASSES, PACKED)
    first_feature = feature_block * FEATURE_BLOCK
    if WITH_FEATURES:
        fa += wide_sample * fa_b
        fb += wide_sample * fb_b
    read_target = (sample < labelled) & (feature_block == 0)
    if WITH_DICE:
        target += wide_sample * t_b

    count_ab = tl.zeros((BLOCK,), tl.int32)
    count_ba = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.float32)
    members_a = tl.zeros((CLASSES_PAD, BLOCK), tl.int32)
    members_b = tl.zeros((CLASSES_PAD, BLOCK), tl.int32)
    overlap_a = tl.zeros((CLASSES_PAD, BLOCK), tl.float32)
    overlap_b = tl.zeros((CLASSES_PAD, BLOCK), tl.float32)
    soft_a = tl.zeros((CLASSES_PAD, BLOCK), tl.float32)
    soft_b = tl.zeros((CLASSES_PAD, BLOCK), tl.float32)
    truth = tl.zeros((CLASSES_PAD, BLOCK), tl.int32)
    if DOT:
        total_a = tl.zeros((CLASSES_DOT, FEATURE_BLOCK), tl.float32)
        total_b = tl.zeros((CLASSES_DOT, FEATURE_BLOCK), tl.float32)
    else:
        total_a = tl.zeros((CLASSES_PAD, FEATURE_BLOCK, BLOCK), tl.float32)
        total_b = tl.zeros((CLASSES_PAD, FEATURE_BLOCK, BLOCK), tl.float32)

    first = program * blocks_per_program
    whole = tl.minimum(first + blocks_per_program, voxels // BLOCK)
    for block in range(first, whole):
        (
            total_a, total_b, count_ab, count_ba, bad, members_a, members_b, overlap_a, overlap_b, soft_a, soft_b, truth
        ) = _block(
            block * BLOCK, total_a, total_b, count_ab, count_ba, bad, members_a, members_b,
            overlap_a, overlap_b, soft_a, soft_b, truth, za, zb, fa, fb, target, read_target,
            voxels, size1, size2, t_0, t_1, t_2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, first_feature, EPS,
            CLASSES, CLASSES_PAD, CLASSES_DOT, FEATURES_A, FEATURES_B, FEATURE_BLOCK, BLOCK,
            CONFIDENCE, WITH_FEATURES, WITH_DICE, DOT, FLAT, WIDE, False,
        )  # fmt: skip
    if (program == programs - 1) & (voxels % BLOCK != 0):
        (
            total_a, total_b, count_ab, count_ba, bad, members_a, members_b, overlap_a, overlap_b, soft_a, soft_b, truth
        ) = _block(
            voxels // BLOCK * BLOCK, total_a, total_b, count_ab, count_ba, bad, members_a, members_b,
            overlap_a, overlap_b, soft_a, soft_b, truth, za, zb, fa, fb, target, read_target,
            voxels, size1, size2, t_0, t_1, t_2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, first_feature, EPS,
            CLASSES, CLASSES_PAD, CLASSES_DOT, FEATURES_A, FEATURES_B, FEATURE_BLOCK, BLOCK,
            CONFIDENCE, WITH_FEATURES, WITH_DICE, DOT, FLAT, WIDE, True,
        )  # fmt: skip

    here = sample * programs + program
    all_bad = tl.sum(bad, axis=0)
    if WITH_FEATURES:
        f = first_feature + tl.arange(0, FEATURE_BLOCK)
        row = here.to(tl.int64) * CLASSES
        all_bad += _store_sums(sums_a + row * FEATURES_A, total_a, f, FEATURES_A, CLASSES, CLASSES_PAD, CLASSES_DOT, DOT)
        all_bad += _store_sums(sums_b + row * FEATURES_B, total_b, f, FEATURES_B, CLASSES, CLASSES_PAD, CLASSES_DOT, DOT)
    tl.store(poison + here * tl.num_programs(2) + feature_block, all_bad)
    if feature_block == 0:
        tl.store(counts + here, tl.sum(count_ab, axis=0))
        tl.store(counts + batch * programs + here, tl.sum(count_ba, axis=0))
        per_class = here * CLASSES
        plane = batch * programs * CLASSES
        if WITH_FEATURES:
            _store_per_class(members + per_class, members_a, CLASSES, CLASSES_PAD)
            _store_per_class(members + plane + per_class, members_b, CLASSES, CLASSES_PAD)
        if WITH_DICE:
            if sample < labelled:
                _store_per_class(members + 2 * plane + per_class, truth, CLASSES, CLASSES_PAD)
                _store_per_class(dice + 4 * per_class, overlap_a, CLASSES, CLASSES_PAD)
                _store_per_class(dice + 4 * per_class + CLASSES, overlap_b, CLASSES, CLASSES_PAD)
                _store_per_class(dice + 4 * per_class + 2 * CLASSES, soft_a, CLASSES, CLASSES_PAD)
                _store_per_class(dice + 4 * per_class + 3 * CLASSES, soft_b, CLASSES, CLASSES_PAD)


@triton.jit
def _prototype(
    sums, members, prototypes, row, programs,
    EPS: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr, FEATURES_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one (sample, class), divide by the class's voxels, scale to unit length."""
    sample = row // CLASSES
    c = row % CLASSES
    f = tl.arange(0, FEATURES_PAD)
    r = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, FEATURES_PAD), tl.float32)
    voxels = tl.zeros((ROWS,), tl.int64)
    for start in range(0, programs, ROWS):
        p = start + r
        at = (sample * programs + p).to(tl.int64) * CLASSES + c
        inside = p < programs
        tile = inside[:, None] & (f < FEATURES)[None, :]
        total += tl.load(sums + at[:, None] * FEATURES + f[None, :], mask=tile, other=0.0)
        voxels += tl.load(members + at, mask=inside, other=0).to(tl.int64)
    mean = tl.sum(total, axis=0) / (tl.sum(voxels, axis=0).to(tl.float32) + EPS)  # (FEATURES_PAD,)
    # Scaled by its largest component first, so that no square overflows or vanishes.
    largest = tl.max(tl.abs(mean), axis=0)
    scale = tl.where(largest > 0, largest, 1.0)
    scaled = mean / scale
    length = tl.sqrt(tl.sum(scaled * scaled, axis=0)) * scale
    tl.store(prototypes + row.to(tl.int64) * FEATURES + f, mean / tl.maximum(length, 1e-12), mask=f < FEATURES)


@triton.jit
def _column_sum(values, n, stride, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of n values that lie ``stride`` apart, in a fixed order."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, n, BLOCK):
        at = start + i
        total += tl.load(values + at.to(tl.int64) * stride, mask=at < n, other=0).to(DTYPE)
    return tl.sum(total, axis=0)


@triton.jit
def prototypes_kernel(
    sums_a, sums_b, members, counts, poison, dice,  # what statistics_kernel wrote
    prototypes_a, prototypes_b,  # out: (B, C, F) float32
    all_counts,  # out: (2,) int64
    all_sums,  # out: (1 + 5 C,) float32, or (1,) without Dice: the vector of dice.py
    batch, programs, poisons, labelled,
    EPS: tl.constexpr, CLASSES: tl.constexpr, FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr,
    FEATURES_PAD: tl.constexpr, ROWS: tl.constexpr, COUNT_BLOCK: tl.constexpr,
    WITH_FEATURES: tl.constexpr, WITH_DICE: tl.constexpr,
):  # fmt: skip
    """Grid: (2 B C with features + 1 + 5 C with Dice,): the prototypes, the counts and the poison, the sums of Dice."""
    program = tl.program_id(0)
    rows = batch * CLASSES
    plane = batch * programs * CLASSES
    if WITH_FEATURES:
        after = program - 2 * rows
    else:
        after = program
    if after == 0:
        n = batch * programs
        tl.store(all_counts, _column_sum(counts, n, 1, tl.int64, COUNT_BLOCK))
        tl.store(all_counts + 1, _column_sum(counts + n, n, 1, tl.int64, COUNT_BLOCK))
        tl.store(all_sums, _column_sum(poison, poisons, 1, tl.float32, COUNT_BLOCK))
    elif after > 0:
        if WITH_DICE:
            n = labelled * programs
            column = after - 1
            if column < 4 * CLASSES:
                tl.store(all_sums + after, _column_sum(dice + column, n, 4 * CLASSES, tl.float32, COUNT_BLOCK))
            else:
                truth = _column_sum(members + 2 * plane + column - 4 * CLASSES, n, CLASSES, tl.int64, COUNT_BLOCK)
                tl.store(all_sums + after, truth.to(tl.float32))
    elif WITH_FEATURES:
        if program < rows:
            _prototype(sums_a, members, prototypes_a, program, programs, EPS, CLASSES, FEATURES_A, FEATURES_PAD, ROWS)
        else:
            row = program - rows
            _prototype(sums_b, members + plane, prototypes_b, row, programs, EPS, CLASSES, FEATURES_B, FEATURES_PAD, ROWS)
