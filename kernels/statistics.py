"""First pass: reliable voxels per pair, and the class prototypes of both networks.

One read of all logits and features. Every program walks over a run of blocks of one sample, adds in registers and writes
one partial result; a second, tiny kernel adds the partials in a fixed order. Non-finite values end up in ``poison``.
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import channel_offsets, less_confident, load, softmax_parts, voxel_offsets


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
    start, total_a, total_b, count_ab, count_ba, poison, members_a, members_b,
    za, zb, fa, fb,
    voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2, fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2,
    first_feature, eps,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr, DOT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
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
    top_a, label_a, rest_a, e_a = softmax_parts(a, column, CLASSES, CLASSES_PAD)
    top_b, label_b, rest_b, e_b = softmax_parts(b, column, CLASSES, CLASSES_PAD)
    p_a = e_a / (1.0 + rest_a)[None, :]
    p_b = e_b / (1.0 + rest_b)[None, :]
    m_ab, m_ba = less_confident(a, b, p_a, p_b, rest_a, rest_b, column, eps, CLASSES, CONFIDENCE)

    if MASKED:  # no class counts a voxel beyond the end
        m_ab = m_ab & valid
        m_ba = m_ba & valid
        label_a = tl.where(valid, label_a, CLASSES_DOT)
        label_b = tl.where(valid, label_b, CLASSES_DOT)
    count_ab += m_ab.to(tl.int32)
    count_ba += m_ba.to(tl.int32)
    poison += (top_a + rest_a + top_b + rest_b) * 0.0  # 0, or NaN where a logit is NaN or +inf
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
    return total_a, total_b, count_ab, count_ba, poison, members_a, members_b


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
def statistics_kernel(
    za, zb, fa, fb,  # logits and features of networks a and b
    sums_a, sums_b,  # out: (B, programs, C, F) float32
    members,  # out: (2, B, programs, C) int32, voxels per class
    counts,  # out: (2, B, programs) int32, reliable voxels: student a, student b
    poison,  # out: (B, programs, feature blocks) float32, 0 or NaN
    voxels, size1, size2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    fa_b, fa_c, fa_0, fa_1, fa_2, fb_b, fb_c, fb_0, fb_1, fb_2,
    blocks_per_program,
    EPS: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, CLASSES_DOT: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr, DOT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, B, feature blocks)."""
    program = tl.program_id(0)
    sample = tl.program_id(1)
    feature_block = tl.program_id(2)
    batch = tl.num_programs(1)
    programs = tl.num_programs(0)
    wide_sample = sample.to(tl.int64)
    za += wide_sample * za_b
    zb += wide_sample * zb_b
    first_feature = feature_block * FEATURE_BLOCK
    if WITH_FEATURES:
        fa += wide_sample * fa_b
        fb += wide_sample * fb_b

    count_ab = tl.zeros((BLOCK,), tl.int32)
    count_ba = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.float32)
    members_a = tl.zeros((CLASSES_PAD, BLOCK), tl.int32)
    members_b = tl.zeros((CLASSES_PAD, BLOCK), tl.int32)
    if DOT:
        total_a = tl.zeros((CLASSES_DOT, FEATURE_BLOCK), tl.float32)
        total_b = tl.zeros((CLASSES_DOT, FEATURE_BLOCK), tl.float32)
    else:
        total_a = tl.zeros((CLASSES_PAD, FEATURE_BLOCK, BLOCK), tl.float32)
        total_b = tl.zeros((CLASSES_PAD, FEATURE_BLOCK, BLOCK), tl.float32)

    first = program * blocks_per_program
    whole = tl.minimum(first + blocks_per_program, voxels // BLOCK)
    for block in range(first, whole):
        total_a, total_b, count_ab, count_ba, bad, members_a, members_b = _block(
            block * BLOCK, total_a, total_b, count_ab, count_ba, bad, members_a, members_b, za, zb, fa, fb,
            voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, first_feature, EPS,
            CLASSES, CLASSES_PAD, CLASSES_DOT, FEATURES_A, FEATURES_B, FEATURE_BLOCK, BLOCK,
            CONFIDENCE, WITH_FEATURES, DOT, FLAT, WIDE, False,
        )  # fmt: skip
    if (program == programs - 1) & (voxels % BLOCK != 0):
        total_a, total_b, count_ab, count_ba, bad, members_a, members_b = _block(
            voxels // BLOCK * BLOCK, total_a, total_b, count_ab, count_ba, bad, members_a, members_b, za, zb, fa, fb,
            voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, first_feature, EPS,
            CLASSES, CLASSES_PAD, CLASSES_DOT, FEATURES_A, FEATURES_B, FEATURE_BLOCK, BLOCK,
            CONFIDENCE, WITH_FEATURES, DOT, FLAT, WIDE, True,
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
        if WITH_FEATURES:
            cls = tl.arange(0, CLASSES_PAD)
            tl.store(members + here * CLASSES + cls, tl.sum(members_a, axis=1), mask=cls < CLASSES)
            out_b = members + (batch * programs + here) * CLASSES
            tl.store(out_b + cls, tl.sum(members_b, axis=1), mask=cls < CLASSES)


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
def prototypes_kernel(
    sums_a, sums_b, members, counts, poison,  # what statistics_kernel wrote
    prototypes_a, prototypes_b,  # out: (B, C, F) float32
    totals,  # out: (2,) int64
    all_poison,  # out: () float32
    batch, programs, poisons,
    EPS: tl.constexpr, CLASSES: tl.constexpr, FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr,
    FEATURES_PAD: tl.constexpr, ROWS: tl.constexpr, COUNT_BLOCK: tl.constexpr, WITH_FEATURES: tl.constexpr,
):  # fmt: skip
    """Grid: (2 B C + 1,) with features, else (1,). The last program adds the counts."""
    program = tl.program_id(0)
    rows = batch * CLASSES
    if program == tl.num_programs(0) - 1:
        i = tl.arange(0, COUNT_BLOCK)
        n = batch * programs
        total_a = tl.zeros((COUNT_BLOCK,), tl.int64)
        total_b = tl.zeros((COUNT_BLOCK,), tl.int64)
        bad = tl.zeros((COUNT_BLOCK,), tl.float32)
        for start in range(0, n, COUNT_BLOCK):
            at = start + i
            total_a += tl.load(counts + at, mask=at < n, other=0).to(tl.int64)
            total_b += tl.load(counts + n + at, mask=at < n, other=0).to(tl.int64)
        for start in range(0, poisons, COUNT_BLOCK):
            at = start + i
            bad += tl.load(poison + at, mask=at < poisons, other=0.0)
        tl.store(totals, tl.sum(total_a, axis=0))
        tl.store(totals + 1, tl.sum(total_b, axis=0))
        tl.store(all_poison, tl.sum(bad, axis=0))
    elif WITH_FEATURES:
        if program < rows:
            _prototype(sums_a, members, prototypes_a, program, programs, EPS, CLASSES, FEATURES_A, FEATURES_PAD, ROWS)
        else:
            offset = batch * programs * CLASSES
            row = program - rows
            _prototype(sums_b, members + offset, prototypes_b, row, programs, EPS, CLASSES, FEATURES_B, FEATURES_PAD, ROWS)
