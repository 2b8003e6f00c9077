"""Second pass: weights, loss, and a small record per voxel from which the backward pass makes the gradients.

Where one network is more confident only that network teaches, so only its features are read. Loads are skipped by whole
32-byte sectors (GROUP neighbouring voxels), because a mask that changes from voxel to voxel would split a 128-bit load into
32-bit ones and save nothing: memory moves by sectors. Tiles are therefore shaped (channels, BLOCK // GROUP, GROUP).

The record, one plane (B, V) of float32, or two where both networks teach everywhere (``confidence=None``; plane i is student i):

    C = 2   w_ij dCE/dz_i(0, v), the gradient of class 0 before 1/n_ij; that of class 1 is its negative
    C > 2   w_ij

With one plane, its lowest bit is the student (0 or 1): half a unit in the last place of float32 for 3 bytes a voxel saved.
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import (
    channel_offsets,
    cross_entropy,
    less_confident,
    load,
    pick,
    slope,
    softmax_parts,
    voxel_offsets,
)


@triton.jit
def _load_features(
    base, offsets, stride_c, use, valid, f,
    FEATURES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Features of the voxels in use, zero elsewhere: (FEATURE_BLOCK, GROUPS, GROUP)."""
    sector = tl.max(use.to(tl.int32), axis=1) > 0  # (GROUPS,): does any voxel of the sector want this network?
    wanted = tl.broadcast_to(sector[:, None], (GROUPS, GROUP))
    if MASKED:  # the last sector may end beyond the tensor
        wanted = wanted & valid
    wanted = wanted[None, :, :]
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
def _reliability(
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
        for first in tl.static_range(0, FEATURES_A, FEATURE_BLOCK):
            dots, square = _add_similarity(
                dots, square, fa, prototypes_a, fa_v, fa_c, use_a, valid, first, FEATURES_A, FEATURE_BLOCK,
                CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
    if READ_B:
        for first in tl.static_range(0, FEATURES_B, FEATURE_BLOCK):
            dots, square = _add_similarity(
                dots, square, fb, prototypes_b, fb_v, fb_c, use_b, valid, first, FEATURES_B, FEATURE_BLOCK,
                CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
    inverse = 1.0 / tl.maximum(tl.sqrt(square), 1e-8)
    difference = tl.where(cls < CLASSES, dots * inverse[None, :, :] - p, 0.0)
    # square * 0: a feature whose square overflows float32 gives NaN, not a similarity of 0
    return 1.0 - tl.sum(difference * difference, axis=0) / CLASSES + square * 0.0


@triton.jit
def _entry(taught, p, rest, own, label, cls, CLASSES: tl.constexpr, ON_LOGITS: tl.constexpr):
    """What the record holds besides the weight (see the head of this file): dCE/dz(0) for C = 2, else 1."""
    if CLASSES == 2:
        return taught * pick(slope(p, rest, own, label, cls, ON_LOGITS, CLASSES), cls, 0)
    else:
        return taught


@triton.jit
def _with_student(value, student_is_b):
    bits = value.to(tl.int32, bitcast=True)
    return ((bits & -2) | student_is_b.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _block(
    start, loss_ab, loss_ba,
    za, zb, fa, fb, prototypes_a, prototypes_b, record, record_stride, plane, weights, masks,
    voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2, fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2,
    map_plane, eps,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr, ON_LOGITS: tl.constexpr, WITH_RECORD: tl.constexpr,
    WITH_MAPS: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (GROUPS, GROUP)
    valid = v < voxels
    cls = tl.arange(0, CLASSES_PAD)[:, None, None]
    inside = cls < CLASSES
    if MASKED:
        inside = inside & valid[None, :, :]
    ragged: tl.constexpr = CLASSES_PAD != CLASSES

    za_v = voxel_offsets(v, size1, size2, za_0, za_1, za_2, FLAT, WIDE)
    zb_v = voxel_offsets(v, size1, size2, zb_0, zb_1, zb_2, FLAT, WIDE)
    # (CLASSES_PAD, GROUPS, GROUP)
    a = load(za + channel_offsets(cls, za_c, WIDE) + za_v[None, :, :], inside, MASKED or ragged)
    b = load(zb + channel_offsets(cls, zb_c, WIDE) + zb_v[None, :, :], inside, MASKED or ragged)
    top_a, label_a, rest_a, e_a = softmax_parts(a, cls, CLASSES, CLASSES_PAD)
    top_b, label_b, rest_b, e_b = softmax_parts(b, cls, CLASSES, CLASSES_PAD)
    p_a = e_a / (1.0 + rest_a)[None, :, :]
    p_b = e_b / (1.0 + rest_b)[None, :, :]
    m_ab, m_ba = less_confident(a, b, p_a, p_b, rest_a, rest_b, cls, eps, CLASSES, CONFIDENCE)
    m_ab = m_ab & valid
    m_ba = m_ba & valid
    fa_v = v
    fb_v = v
    if WITH_FEATURES:
        fa_v = voxel_offsets(v, size1, size2, fa_0, fa_1, fa_2, FLAT, WIDE)
        fb_v = voxel_offsets(v, size1, size2, fb_0, fb_1, fb_2, FLAT, WIDE)

    if CONFIDENCE == "none":  # both networks teach everywhere
        w_ab = m_ab.to(tl.float32)
        w_ba = m_ba.to(tl.float32)
        if WITH_FEATURES:
            r_b = _reliability(
                p_b, m_ba, m_ab, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls, False, True,
                FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
            r_a = _reliability(
                p_a, m_ba, m_ab, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls, True, False,
                FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
            w_ab = tl.where(m_ab, r_b, 0.0)
            w_ba = tl.where(m_ba, r_a, 0.0)
        ce_ab = cross_entropy(a, p_a, top_a, rest_a, label_b, cls, ON_LOGITS, CLASSES)
        ce_ba = cross_entropy(b, p_b, top_b, rest_b, label_a, cls, ON_LOGITS, CLASSES)
        loss_ab += tl.where(m_ab, w_ab * ce_ab, 0.0)
        loss_ba += tl.where(m_ba, w_ba * ce_ba, 0.0)
        if WITH_RECORD:
            entry_a = w_ab * _entry(m_ab.to(tl.float32), p_a, rest_a, label_a, label_b, cls, CLASSES, ON_LOGITS)
            entry_b = w_ba * _entry(m_ba.to(tl.float32), p_b, rest_b, label_b, label_a, cls, CLASSES, ON_LOGITS)
            if MASKED:
                tl.store(record + v, entry_a, mask=v < record_stride)  # the padding gets zeros
                tl.store(record + plane + v, entry_b, mask=v < record_stride)
            else:
                tl.store(record + v, entry_a)
                tl.store(record + plane + v, entry_b)
    else:  # at most one network teaches: select student (s) and teacher (t) first, compute once
        any_teacher = m_ab | m_ba
        learner_a = m_ab[None, :, :]
        z_s = tl.where(learner_a, a, b)
        p_s = tl.where(learner_a, p_a, p_b)
        p_t = tl.where(learner_a, p_b, p_a)
        top_s = tl.where(m_ab, top_a, top_b)
        rest_s = tl.where(m_ab, rest_a, rest_b)
        own = tl.where(m_ab, label_a, label_b)
        label = tl.where(m_ab, label_b, label_a)  # the teacher's
        ce = cross_entropy(z_s, p_s, top_s, rest_s, label, cls, ON_LOGITS, CLASSES)
        entry = _entry(any_teacher.to(tl.float32), p_s, rest_s, own, label, cls, CLASSES, ON_LOGITS)
        weight = any_teacher.to(tl.float32)
        if WITH_FEATURES:
            r = _reliability(
                p_t, m_ba, m_ab, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls, True, True,
                FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
            )  # fmt: skip
            weight = tl.where(any_teacher, r, 0.0)
        loss_ab += tl.where(m_ab, weight * ce, 0.0)
        loss_ba += tl.where(m_ba, weight * ce, 0.0)
        w_ab = tl.where(m_ab, weight, 0.0)
        w_ba = tl.where(m_ba, weight, 0.0)
        if WITH_RECORD:
            entry = _with_student(tl.where(any_teacher, weight * entry, 0.0), m_ba)
            if MASKED:
                tl.store(record + v, entry, mask=v < record_stride)
            else:
                tl.store(record + v, entry)
    if WITH_MAPS:
        tl.store(weights + v, w_ab, mask=valid)
        tl.store(weights + map_plane + v, w_ba, mask=valid)
        tl.store(masks + v, m_ab.to(tl.int8), mask=valid)
        tl.store(masks + map_plane + v, m_ba.to(tl.int8), mask=valid)
    return loss_ab, loss_ba


@triton.jit
def weighting_kernel(
    za, zb, fa, fb, prototypes_a, prototypes_b,
    numerators,  # out: (2, B, programs) float32
    record,  # out: (planes, B, record_stride) float32, rows padded to whole sectors
    weights,  # out with WITH_MAPS: (2, B, V) float32
    masks,  # out with WITH_MAPS: (2, B, V) int8
    voxels, record_stride, size1, size2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    fa_b, fa_c, fa_0, fa_1, fa_2, fb_b, fb_c, fb_0, fb_1, fb_2,
    blocks_per_program,
    EPS: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr,
    ON_LOGITS: tl.constexpr, WITH_RECORD: tl.constexpr, WITH_MAPS: tl.constexpr,
    UNROLL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, B)."""
    BLOCK: tl.constexpr = GROUPS * GROUP
    program = tl.program_id(0)
    sample = tl.program_id(1)
    programs = tl.num_programs(0)
    batch = tl.num_programs(1)
    wide_sample = sample.to(tl.int64)
    za += wide_sample * za_b
    zb += wide_sample * zb_b
    if WITH_FEATURES:
        fa += wide_sample * fa_b
        fb += wide_sample * fb_b
        prototypes_a += wide_sample * CLASSES * FEATURES_A
        prototypes_b += wide_sample * CLASSES * FEATURES_B
    plane = record_stride.to(tl.int64) * batch
    map_plane = voxels.to(tl.int64) * batch
    if WITH_RECORD:
        record += wide_sample * record_stride
    if WITH_MAPS:
        weights += wide_sample * voxels
        masks += wide_sample * voxels

    loss_ab = tl.zeros((GROUPS, GROUP), tl.float32)
    loss_ba = tl.zeros((GROUPS, GROUP), tl.float32)
    first = program * blocks_per_program
    whole = tl.minimum(first + blocks_per_program, voxels // BLOCK)
    for block in range(first, whole):
        loss_ab, loss_ba = _block(
            block * BLOCK, loss_ab, loss_ba, za, zb, fa, fb, prototypes_a, prototypes_b,
            record, record_stride, plane, weights, masks,
            voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, map_plane, EPS,
            CLASSES, CLASSES_PAD, FEATURES_A, FEATURES_B, FEATURE_BLOCK, GROUPS, GROUP,
            CONFIDENCE, WITH_FEATURES, ON_LOGITS, WITH_RECORD, WITH_MAPS, UNROLL, FLAT, WIDE, False,
        )  # fmt: skip
    if (program == programs - 1) & (voxels % BLOCK != 0):
        loss_ab, loss_ba = _block(
            voxels // BLOCK * BLOCK, loss_ab, loss_ba, za, zb, fa, fb, prototypes_a, prototypes_b,
            record, record_stride, plane, weights, masks,
            voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, map_plane, EPS,
            CLASSES, CLASSES_PAD, FEATURES_A, FEATURES_B, FEATURE_BLOCK, GROUPS, GROUP,
            CONFIDENCE, WITH_FEATURES, ON_LOGITS, WITH_RECORD, WITH_MAPS, UNROLL, FLAT, WIDE, True,
        )  # fmt: skip
    here = sample * programs + program
    tl.store(numerators + here, tl.sum(tl.sum(loss_ab, axis=1), axis=0))
    tl.store(numerators + batch * programs + here, tl.sum(tl.sum(loss_ba, axis=1), axis=0))


@triton.jit
def loss_kernel(numerators, counts, poison, out, n, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (1,). L = sum of L_ij = numerator_ij / (count_ij + eps), in a fixed order."""
    i = tl.arange(0, BLOCK)
    total_ab = tl.zeros((BLOCK,), tl.float32)
    total_ba = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + i
        total_ab += tl.load(numerators + at, mask=at < n, other=0.0)
        total_ba += tl.load(numerators + n + at, mask=at < n, other=0.0)
    n_ab = tl.load(counts).to(tl.float32) + EPS
    n_ba = tl.load(counts + 1).to(tl.float32) + EPS
    value = tl.sum(total_ab, axis=0) / n_ab + tl.sum(total_ba, axis=0) / n_ba
    tl.store(out, value + tl.load(poison))
