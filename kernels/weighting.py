"""Second pass: weights, loss, and a small record per voxel from which the backward pass makes the gradients.

Where one network is more confident only that network teaches, so only its features are read. Loads are skipped by whole
32-byte sectors (GROUP neighbouring voxels), because a mask that changes from voxel to voxel would split a 128-bit load into
32-bit ones and save nothing: memory moves by sectors. Tiles are therefore shaped (channels, BLOCK // GROUP, GROUP).

The record holds what the gradient needs, complete but for the upstream factor. Where one network learns at a voxel:

    C = 2   one float32, w_ij cw/n_ij dCE/dz_i(0, v), the gradient of class 0 (that of class 1 is its negative), with the
            student (0 or 1) in its lowest bit: half a unit in the last place of float32 for 3 bytes a voxel saved
    C > 2   one float32, w_ij cw/n_ij, and one byte: the teacher's class, 64 if the student is network b, 128 if one learns

Where both may learn there are two float32, one per network: for every sample with ``confidence=None``, and for the labelled
samples with Dice and C = 2 (the Dice term teaches both). cw is the weight of the mutual term in the objective, 1 for the loss
alone. The second planes follow the first ones: row B + b of the record belongs to sample b.

Programs and their blocks run in the reverse order of the first pass: what that read last is still in the L2 cache.
"""

import triton
import triton.language as tl

from rplib.kernels.dice import dice_coefficients, dice_slope, load_target
from rplib.kernels.similarity import reliability
from rplib.kernels.total import mutual_weight_of
from rplib.kernels.voxels import (
    batch_stride,
    channel_offsets,
    cross_entropy,
    doubt,
    load,
    more_doubt,
    pick,
    probabilities,
    slope,
    softmax_parts,
    voxel_offsets,
)


@triton.jit
def _entry(p, rest, own, label, cls, CLASSES: tl.constexpr, ON_LOGITS: tl.constexpr):
    """What the record holds besides the weight (see the head of this file): dCE/dz(0) for C = 2, else 1."""
    if CLASSES == 2:
        return pick(slope(p, rest, own, label, cls, ON_LOGITS, CLASSES), cls, 0)
    else:
        return tl.full(rest.shape, 1.0, tl.float32)


@triton.jit
def _with_student(value, student_is_b):
    bits = value.to(tl.int32, bitcast=True)
    return ((bits & -2) | student_is_b.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _both_teach(
    a, b, p_a, p_b, top_a, top_b, rest_a, rest_b, label_a, label_b, valid,
    fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    WITH_FEATURES: tl.constexpr, ON_LOGITS: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights, cross-entropies and record entries of both students, no confidences compared: each (GROUPS, GROUP)."""
    w_ab = valid.to(tl.float32)
    w_ba = valid.to(tl.float32)
    if WITH_FEATURES:
        r_b = reliability(
            p_b, valid, valid, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls, False, True,
            FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
        )  # fmt: skip
        r_a = reliability(
            p_a, valid, valid, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls, True, False,
            FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
        )  # fmt: skip
        w_ab = tl.where(valid, r_b, 0.0)
        w_ba = tl.where(valid, r_a, 0.0)
    ce_ab = cross_entropy(a, p_a, top_a, rest_a, label_b, cls, ON_LOGITS, CLASSES)
    ce_ba = cross_entropy(b, p_b, top_b, rest_b, label_a, cls, ON_LOGITS, CLASSES)
    entry_a = w_ab * _entry(p_a, rest_a, label_a, label_b, cls, CLASSES, ON_LOGITS)
    entry_b = w_ba * _entry(p_b, rest_b, label_b, label_a, cls, CLASSES, ON_LOGITS)
    return w_ab, w_ba, tl.where(valid, w_ab * ce_ab, 0.0), tl.where(valid, w_ba * ce_ba, 0.0), entry_a, entry_b


@triton.jit
def _one_teaches(
    a, b, top_a, top_b, rest_a, rest_b, label_a, label_b, m_ab, m_ba, valid,
    fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    WITH_FEATURES: tl.constexpr, ON_LOGITS: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weight, weight * cross-entropy, record entry and the teacher's label: student (s) and teacher (t) are selected first."""
    learner_a = m_ab[None, :, :]
    z_s = tl.where(learner_a, a, b)
    top_s = tl.where(m_ab, top_a, top_b)
    rest_s = tl.where(m_ab, rest_a, rest_b)
    # Probabilities anew, of one network instead of two: tiles of many classes would not all fit into registers.
    p_s = probabilities(z_s, top_s, rest_s, cls, CLASSES)
    p_t = probabilities(
        tl.where(learner_a, b, a), tl.where(m_ab, top_b, top_a), tl.where(m_ab, rest_b, rest_a), cls, CLASSES
    )  # fmt: skip
    own = tl.where(m_ab, label_a, label_b)
    label = tl.where(m_ab, label_b, label_a)
    ce = cross_entropy(z_s, p_s, top_s, rest_s, label, cls, ON_LOGITS, CLASSES)
    entry = _entry(p_s, rest_s, own, label, cls, CLASSES, ON_LOGITS)
    any_teacher = m_ab | m_ba
    weight = any_teacher.to(tl.float32)
    if WITH_FEATURES:
        r = reliability(
            p_t, m_ba, m_ab, valid, fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls, True, True,
            FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP, UNROLL, WIDE, MASKED,
        )  # fmt: skip
        weight = tl.where(any_teacher, r, 0.0)
    return weight, tl.where(any_teacher, weight * ce, 0.0), tl.where(any_teacher, weight * entry, 0.0), label


@triton.jit
def _store_plane(record, v, value, record_stride, MASKED: tl.constexpr):
    if MASKED:
        tl.store(record + v, value, mask=v < record_stride)  # the padding gets zeros
    else:
        tl.store(record + v, value)


@triton.jit
def _block(
    start, loss_ab, loss_ba, scale_ab, scale_ba, alpha_a, beta_a, alpha_b, beta_b,
    za, zb, fa, fb, prototypes_a, prototypes_b, target, labelled,
    record, record_stride, second_plane, both, code, weights, masks,
    voxels, size1, size2, t_0, t_1, t_2,
    za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2, fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2,
    map_plane, eps,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr, ON_LOGITS: tl.constexpr, WITH_RECORD: tl.constexpr,
    DICE_IN_RECORD: tl.constexpr, WITH_MAPS: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
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
    # One network after the other: with many classes their tiles do not fit into registers together.
    top_a, label_a, rest_a, e_a = softmax_parts(a, cls, CLASSES, CLASSES_PAD)
    p_a = e_a / (1.0 + rest_a)[None, :, :]
    doubt_a, error_a = doubt(a, p_a, rest_a, cls, eps, CLASSES, CONFIDENCE)
    top_b, label_b, rest_b, e_b = softmax_parts(b, cls, CLASSES, CLASSES_PAD)
    p_b = e_b / (1.0 + rest_b)[None, :, :]
    doubt_b, error_b = doubt(b, p_b, rest_b, cls, eps, CLASSES, CONFIDENCE)
    m_ab, m_ba = more_doubt(doubt_a, error_a, doubt_b, error_b, CLASSES, CONFIDENCE)
    m_ab = m_ab & valid
    m_ba = m_ba & valid
    fa_v = v
    fb_v = v
    if WITH_FEATURES:
        fa_v = voxel_offsets(v, size1, size2, fa_0, fa_1, fa_2, FLAT, WIDE)
        fb_v = voxel_offsets(v, size1, size2, fb_0, fb_1, fb_2, FLAT, WIDE)

    if CONFIDENCE == "none":
        w_ab, w_ba, part_ab, part_ba, entry_a, entry_b = _both_teach(
            a, b, p_a, p_b, top_a, top_b, rest_a, rest_b, label_a, label_b, valid,
            fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls,
            FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP,
            WITH_FEATURES, ON_LOGITS, UNROLL, WIDE, MASKED,
        )  # fmt: skip
        loss_ab += part_ab
        loss_ba += part_ba
        entry_a *= scale_ab
        entry_b *= scale_ba
    else:
        weight, part, entry, label = _one_teaches(
            a, b, top_a, top_b, rest_a, rest_b, label_a, label_b, m_ab, m_ba, valid,
            fa, fb, prototypes_a, prototypes_b, fa_v, fb_v, fa_c, fb_c, cls,
            FEATURES_A, FEATURES_B, FEATURE_BLOCK, CLASSES, CLASSES_PAD, GROUPS, GROUP,
            WITH_FEATURES, ON_LOGITS, UNROLL, WIDE, MASKED,
        )  # fmt: skip
        loss_ab += tl.where(m_ab, part, 0.0)
        loss_ba += tl.where(m_ba, part, 0.0)
        w_ab = tl.where(m_ab, weight, 0.0)
        w_ba = tl.where(m_ba, weight, 0.0)
        entry *= tl.where(m_ab, scale_ab, scale_ba)
        entry_a = tl.where(m_ab, entry, 0.0)
        entry_b = tl.where(m_ba, entry, 0.0)
    if WITH_RECORD:
        if DICE_IN_RECORD:
            t_v = voxel_offsets(v, size1, size2, t_0, t_1, t_2, FLAT, WIDE)
            t, known = load_target(target, t_v, labelled, valid, MASKED)
            entry_a += tl.where(known, dice_slope(p_a, rest_a, alpha_a, beta_a, t, cls, CLASSES), 0.0)
            entry_b += tl.where(known, dice_slope(p_b, rest_b, alpha_b, beta_b, t, cls, CLASSES), 0.0)
        if CONFIDENCE == "none":
            _store_plane(record, v, entry_a, record_stride, MASKED)
            _store_plane(record + second_plane, v, entry_b, record_stride, MASKED)
        elif CLASSES == 2:
            if DICE_IN_RECORD:
                first = tl.where(both, entry_a, _with_student(entry, m_ba))
                _store_plane(record, v, first, record_stride, MASKED)
                if both:
                    _store_plane(record + second_plane, v, entry_b, record_stride, MASKED)
            else:
                _store_plane(record, v, _with_student(entry, m_ba), record_stride, MASKED)
        else:
            learns = m_ab | m_ba
            bits = tl.where(learns, label + 128, 0) + tl.where(m_ba, 64, 0)
            _store_plane(record, v, entry, record_stride, MASKED)
            _store_plane(code, v, bits.to(tl.uint8), record_stride, MASKED)
    if WITH_MAPS:
        tl.store(weights + v, w_ab, mask=valid)
        tl.store(weights + map_plane + v, w_ba, mask=valid)
        tl.store(masks + v, m_ab.to(tl.int8), mask=valid)
        tl.store(masks + map_plane + v, m_ba.to(tl.int8), mask=valid)
    return loss_ab, loss_ba


@triton.jit
def weighting_kernel(
    za, zb, fa, fb, target, prototypes_a, prototypes_b,
    counts, sums,  # of prototypes_kernel
    mutual_weight,  # with HAS_WEIGHT a 0-dim tensor that multiplies mutual_factor
    numerators,  # out: (2, B, programs) float32
    record,  # out: (B + samples with two planes, record_stride) float32, rows padded to whole sectors
    code,  # out for C > 2: (B, record_stride) uint8
    weights,  # out with WITH_MAPS: (2, B, V) float32
    masks,  # out with WITH_MAPS: (2, B, V) int8
    mutual_factor, dice_weight, labelled, voxels, record_stride, size1, size2, t_b, t_0, t_1, t_2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    fa_b, fa_c, fa_0, fa_1, fa_2, fb_b, fb_c, fb_0, fb_1, fb_2,
    blocks_per_program,
    EPS: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CONFIDENCE: tl.constexpr, WITH_FEATURES: tl.constexpr,
    ON_LOGITS: tl.constexpr, WITH_RECORD: tl.constexpr, DICE_IN_RECORD: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    CHOSEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WITH_MAPS: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, B)."""
    if PACKED:  # a constant tells the compiler how wide it may load
        za_2 = CLASSES
        zb_2 = CLASSES
    BLOCK: tl.constexpr = GROUPS * GROUP
    programs = tl.num_programs(0)
    batch = tl.num_programs(1)
    program = programs - 1 - tl.program_id(0)
    sample = batch - 1 - tl.program_id(1)
    wide_sample = sample.to(tl.int64)
    za += wide_sample * batch_stride(za_b, CLASSES, PACKED)
    zb += wide_sample * batch_stride(zb_b, CLASSES, PACKED)
    if WITH_FEATURES:
        fa += wide_sample * fa_b
        fb += wide_sample * fb_b
        prototypes_a += wide_sample * CLASSES * FEATURES_A
        prototypes_b += wide_sample * CLASSES * FEATURES_B
    map_plane = voxels.to(tl.int64) * batch
    second_plane = record_stride.to(tl.int64) * batch
    is_labelled = sample < labelled
    scale_ab = 0.0
    scale_ba = 0.0
    alpha_a = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    beta_a = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    alpha_b = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    beta_b = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    if WITH_RECORD:
        record += wide_sample * record_stride
        code += wide_sample * record_stride
        cw = mutual_weight_of(mutual_factor, mutual_weight, HAS_WEIGHT)
        scale_ab = cw / (tl.load(counts).to(tl.float32) + EPS)
        scale_ba = cw / (tl.load(counts + 1).to(tl.float32) + EPS)
        if DICE_IN_RECORD:
            target += wide_sample * t_b
            cls = tl.arange(0, CLASSES_PAD)[:, None, None]
            alpha_a, beta_a = dice_coefficients(sums, 0, dice_weight, cls, CLASSES, CHOSEN, LOW, HIGH)
            alpha_b, beta_b = dice_coefficients(sums, 1, dice_weight, cls, CLASSES, CHOSEN, LOW, HIGH)
    if WITH_MAPS:
        weights += wide_sample * voxels
        masks += wide_sample * voxels

    loss_ab = tl.zeros((GROUPS, GROUP), tl.float32)
    loss_ba = tl.zeros((GROUPS, GROUP), tl.float32)
    first = program * blocks_per_program
    whole = tl.minimum(first + blocks_per_program, voxels // BLOCK)
    if (program == programs - 1) & (voxels % BLOCK != 0):
        loss_ab, loss_ba = _block(
            voxels // BLOCK * BLOCK, loss_ab, loss_ba, scale_ab, scale_ba, alpha_a, beta_a, alpha_b, beta_b,
            za, zb, fa, fb, prototypes_a, prototypes_b, target, is_labelled,
            record, record_stride, second_plane, is_labelled, code, weights, masks,
            voxels, size1, size2, t_0, t_1, t_2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, map_plane, EPS,
            CLASSES, CLASSES_PAD, FEATURES_A, FEATURES_B, FEATURE_BLOCK, GROUPS, GROUP,
            CONFIDENCE, WITH_FEATURES, ON_LOGITS, WITH_RECORD, DICE_IN_RECORD, WITH_MAPS, UNROLL, FLAT, WIDE, True,
        )  # fmt: skip
    for done in range(whole - first):
        loss_ab, loss_ba = _block(
            (whole - 1 - done) * BLOCK, loss_ab, loss_ba, scale_ab, scale_ba, alpha_a, beta_a, alpha_b, beta_b,
            za, zb, fa, fb, prototypes_a, prototypes_b, target, is_labelled,
            record, record_stride, second_plane, is_labelled, code, weights, masks,
            voxels, size1, size2, t_0, t_1, t_2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            fa_c, fa_0, fa_1, fa_2, fb_c, fb_0, fb_1, fb_2, map_plane, EPS,
            CLASSES, CLASSES_PAD, FEATURES_A, FEATURES_B, FEATURE_BLOCK, GROUPS, GROUP,
            CONFIDENCE, WITH_FEATURES, ON_LOGITS, WITH_RECORD, DICE_IN_RECORD, WITH_MAPS, UNROLL, FLAT, WIDE, False,
        )  # fmt: skip
    here = sample * programs + program
    tl.store(numerators + here, tl.sum(tl.sum(loss_ab, axis=1), axis=0))
    tl.store(numerators + batch * programs + here, tl.sum(tl.sum(loss_ba, axis=1), axis=0))
