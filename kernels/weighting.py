"""Second pass: weights, loss, and a small record per voxel from which the backward pass computes the gradients.

Where one network is more confident only that network teaches, so only its features are read. Loads are skipped by whole
32-byte sectors (GROUP neighbouring voxels), because a mask that changes from voxel to voxel would split a 128-bit load into
32-bit ones and save nothing: memory moves by sectors. A row of a tile is therefore one sector: (GROUPS, GROUP).

The record holds what the gradient needs, complete but for the upstream factor. Where one network learns at a voxel:

    C = 2   one float32, w_ij cw/n_ij dCE/dz_i(0, v), the gradient of class 0 (that of class 1 is its negative), with the
            student (0 or 1) in its lowest bit: half a unit in the last place of float32 for 3 bytes a voxel saved
    C > 2   one float32, w_ij cw/n_ij, and one byte: the teacher's class, 64 if the student is network b, 128 if one learns

Where both may learn there are two float32, one per network: for every sample with ``confidence=None``, and for the labelled
samples with Dice and C = 2 (the Dice term teaches both). cw is the weight of the mutual term in the objective, 1 for the loss
alone. The second planes follow the first ones: row B + b of the record belongs to sample b.

Programs and their blocks run in the reverse order of the first pass: what that pass read last is still in the L2 cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from rplib.kernels.dice import Coefficients, load_target, supervised_coefficients, supervised_slope
from rplib.kernels.similarity import products, reliability, taken_products, where_products
from rplib.kernels.total import mutual_weight_of, normaliser
from rplib.kernels.voxels import (
    ALIGNED,
    ANY,
    LAST,
    PACKED,
    SIZES,
    cross_entropy,
    first_slope,
    kept,
    load_logits,
    load_mask,
    member_of,
    opinion,
    pick_constant,
    probabilities,
    sample_offset,
    sectors,
    strides_of,
    teaches,
    voxel_offsets,
    voxels_of,
    where,
)


class Inputs(NamedTuple):
    """Inputs of a program: pointers to its sample, strides, sizes, and the factors of its results."""

    za: tl.tensor
    zb: tl.tensor
    fa: tl.tensor
    fb: tl.tensor
    target: tl.tensor
    mask: tl.tensor
    prototypes_a: tl.tensor
    prototypes_b: tl.tensor
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
    scale_ab: tl.tensor
    scale_ba: tl.tensor
    supervised_a: Coefficients
    supervised_b: Coefficients
    sample_weight: tl.tensor


class Outputs(NamedTuple):
    """Outputs of a program: pointers to its sample."""

    record: tl.tensor
    record_stride: tl.tensor
    second_plane: tl.tensor
    code: tl.tensor
    weights: tl.tensor
    masks: tl.tensor
    map_plane: tl.tensor


class Sums(NamedTuple):
    """Sums of a program, a tile (GROUPS,) each: both students' losses and, on request, their weights."""

    loss_ab: tl.tensor
    loss_ba: tl.tensor
    weights: tl.tuple


class Options(NamedTuple):
    """The constants of weighting_kernel that a block needs."""

    CLASSES: tl.constexpr
    CLASSES_PAD: tl.constexpr
    FEATURES_A: tl.constexpr
    FEATURES_B: tl.constexpr
    FEATURE_BLOCK: tl.constexpr
    GROUPS: tl.constexpr
    GROUP: tl.constexpr
    WITH_FEATURES: tl.constexpr
    WITH_RECORD: tl.constexpr
    TARGET_IN_RECORD: tl.constexpr
    WITH_MAPS: tl.constexpr
    RULES: tl.constexpr
    UNROLL: tl.constexpr
    Z_LAYOUT: tl.constexpr
    F_LAYOUT: tl.constexpr
    M_LAYOUT: tl.constexpr
    FLAT: tl.constexpr
    WIDE: tl.constexpr


@triton.jit
def _with_student(value, student_is_b):
    bits = value.to(tl.int32, bitcast=True)
    return ((bits & -2) | student_is_b.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _products(v, use_a, use_b, valid, i, o, MASKED: tl.constexpr):
    """`Products` of both networks, each read where it teaches."""
    fa_v = voxel_offsets(v, i.size1, i.size2, i.fa_strides, o.F_LAYOUT, o.FLAT, o.WIDE)
    fb_v = voxel_offsets(v, i.size1, i.size2, i.fb_strides, o.F_LAYOUT, o.FLAT, o.WIDE)
    if o.F_LAYOUT == ANY or o.F_LAYOUT == ALIGNED:  # else the features of a voxel are whole sectors
        use_a = sectors(use_a, valid, MASKED)
        use_b = sectors(use_b, valid, MASKED)
    # Where registers allow it, tried with every option; blocks of four features are for what has none to spare (see tiling).
    HALF: tl.constexpr = i.fa.dtype.element_ty != tl.float32 and i.fb.dtype.element_ty != tl.float32
    SPARE: tl.constexpr = o.FEATURE_BLOCK == 8 and o.F_LAYOUT == ALIGNED and not o.RULES.masked
    JOINED: tl.constexpr = o.CLASSES == 2 or (o.CLASSES <= 4 and HALF and SPARE)
    of_a = products(
        i.fa, fa_v, i.fa_strides.channel, i.prototypes_a, use_a,
        o.FEATURES_A, o.FEATURE_BLOCK, o.CLASSES, o.UNROLL, JOINED, o.WIDE,
    )  # fmt: skip
    of_b = products(
        i.fb, fb_v, i.fb_strides.channel, i.prototypes_b, use_b,
        o.FEATURES_B, o.FEATURE_BLOCK, o.CLASSES, o.UNROLL, JOINED, o.WIDE,
    )  # fmt: skip
    return of_a, of_b


@triton.jit
def _teachers_products(v, m_ab, m_ba, valid, i, o, MASKED: tl.constexpr):
    """`Products` of the teacher alone."""
    SIDE_BY_SIDE: tl.constexpr = o.F_LAYOUT == LAST or o.F_LAYOUT == PACKED
    ONE_VOXEL: tl.constexpr = SIDE_BY_SIDE or (o.CLASSES > 4 and o.CLASSES <= 16)  # a thread: see tiling.weighting_tiles
    if ONE_VOXEL and o.FEATURES_A == o.FEATURES_B and i.fa.dtype == i.fb.dtype:
        fa_v = voxel_offsets(v, i.size1, i.size2, i.fa_strides, o.F_LAYOUT, o.FLAT, o.WIDE)
        fb_v = voxel_offsets(v, i.size1, i.size2, i.fb_strides, o.F_LAYOUT, o.FLAT, o.WIDE)
        if SIDE_BY_SIDE:
            stride = 1
        else:
            stride = tl.where(m_ab, i.fb_strides.channel, i.fa_strides.channel)[None, :, :]
        return taken_products(
            i.fa, i.fb, fa_v, fb_v, stride, i.prototypes_a, i.prototypes_b, m_ab, m_ab | m_ba,
            o.FEATURES_A, o.FEATURE_BLOCK, o.CLASSES, o.UNROLL, o.WIDE,
        )  # fmt: skip
    else:
        of_a, of_b = _products(v, m_ba, m_ab, valid, i, o, MASKED)
        return where_products(m_ab, of_b, of_a, o.CLASSES)


@triton.jit
def _lesson(student, label, ON_LOGITS: tl.constexpr, CLASSES: tl.constexpr):
    """(cross-entropy, record entry) of a student, both still without the weight; the entry is dCE/dz(0) for C = 2, else 1."""
    ce = cross_entropy(student, label, ON_LOGITS, CLASSES)
    if CLASSES == 2:
        entry = first_slope(student, label, ON_LOGITS)
    else:
        entry = tl.full(ce.shape, 1.0, tl.float32)
    return ce, entry


@triton.jit
def _teachers_probabilities(of, CLASSES: tl.constexpr, RULES: tl.constexpr):
    """softmax(z / T)."""
    if RULES.temperature == 1.0:
        return probabilities(of, CLASSES, False, False)
    else:
        z = ()
        for c in tl.static_range(CLASSES):
            z = z + (of.z[c] / RULES.temperature,)
        return probabilities(opinion(z, CLASSES, False), CLASSES, False, False)


@triton.jit
def _with_factors(weight, label, i, o):
    """The weight, times that of the pseudo-label's class and that of the sample."""
    if o.RULES.class_weighted:
        weight = weight * pick_constant(o.RULES.class_weights, label, o.CLASSES)
    if o.RULES.sample_weighted:
        weight = weight * i.sample_weight
    return weight


@triton.jit
def _store_plane(record, v, value, record_stride, MASKED: tl.constexpr):
    if MASKED:
        tl.store(record + v, value, mask=v < record_stride)  # the padding gets zeros
    else:
        tl.store(record + v, value)


@triton.jit
def _block(start, s, i, out, o, MASKED: tl.constexpr):
    """Weigh the block of voxels that begins at ``start``; i: `Inputs`, out: `Outputs`, o: `Options`; returns s with it."""
    CLASSES: tl.constexpr = o.CLASSES
    v = start + tl.arange(0, o.GROUPS)[:, None] * o.GROUP + tl.arange(0, o.GROUP)[None, :]  # (GROUPS, GROUP)
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
    if MASKED or o.RULES.masked:
        m_ab = m_ab & keep
        m_ba = m_ba & keep
    if o.RULES.unlabelled:
        m_ab = m_ab & (i.labelled == 0)
        m_ba = m_ba & (i.labelled == 0)
    if not o.RULES.compare:
        w_ab = m_ab.to(tl.float32)
        w_ba = m_ba.to(tl.float32)
        if o.WITH_FEATURES:
            of_a, of_b = _products(v, m_ba, m_ab, valid, i, o, MASKED)
            w_ab = tl.where(m_ab, reliability(of_b, _teachers_probabilities(b, CLASSES, o.RULES), CLASSES), 0.0)
            w_ba = tl.where(m_ba, reliability(of_a, _teachers_probabilities(a, CLASSES, o.RULES), CLASSES), 0.0)
        w_ab = _with_factors(w_ab, b.label, i, o)
        w_ba = _with_factors(w_ba, a.label, i, o)
        ce_ab, entry_a = _lesson(a, b.label, o.RULES.on_logits, CLASSES)
        ce_ba, entry_b = _lesson(b, a.label, o.RULES.on_logits, CLASSES)
        loss_ab = s.loss_ab + tl.sum(tl.where(m_ab, w_ab * ce_ab, 0.0), axis=1)
        loss_ba = s.loss_ba + tl.sum(tl.where(m_ba, w_ba * ce_ba, 0.0), axis=1)
        entry_a *= w_ab * i.scale_ab
        entry_b *= w_ba * i.scale_ba
    else:  # at most one teaches: student and teacher are selected first
        student = where(m_ab, a, b, CLASSES)
        teacher = where(m_ab, b, a, CLASSES)
        learns = m_ab | m_ba
        ce, entry = _lesson(student, teacher.label, o.RULES.on_logits, CLASSES)
        weight = learns.to(tl.float32)
        if o.WITH_FEATURES:
            p = _teachers_probabilities(teacher, CLASSES, o.RULES)
            weight = tl.where(learns, reliability(_teachers_products(v, m_ab, m_ba, valid, i, o, MASKED), p, CLASSES), 0.0)
        weight = _with_factors(weight, teacher.label, i, o)
        part = tl.where(learns, weight * ce, 0.0)
        entry = tl.where(learns, weight * entry * tl.where(m_ab, i.scale_ab, i.scale_ba), 0.0)
        loss_ab = s.loss_ab + tl.sum(tl.where(m_ab, part, 0.0), axis=1)
        loss_ba = s.loss_ba + tl.sum(tl.where(m_ab, 0.0, part), axis=1)
        w_ab = tl.where(m_ab, weight, 0.0)
        w_ba = tl.where(m_ba, weight, 0.0)
        entry_a = tl.where(m_ab, entry, 0.0)
        entry_b = tl.where(m_ba, entry, 0.0)
    weights = s.weights
    if o.RULES.detailed:
        weights = (weights[0] + tl.sum(w_ab, axis=1), weights[1] + tl.sum(w_ba, axis=1))
    if o.WITH_RECORD:
        if o.TARGET_IN_RECORD:
            t_v = voxel_offsets(v, i.size1, i.size2, i.target_strides, 0, o.FLAT, o.WIDE)
            t, known = load_target(i.target, t_v, i.labelled, valid, keep, o.RULES, MASKED)
            if o.RULES.learns_a:
                entry_a += tl.where(known, supervised_slope(a, i.supervised_a, t, CLASSES, o.RULES)[0], 0.0)
            if o.RULES.learns_b:
                entry_b += tl.where(known, supervised_slope(b, i.supervised_b, t, CLASSES, o.RULES)[0], 0.0)
        if not o.RULES.compare:
            _store_plane(out.record, v, entry_a, out.record_stride, MASKED)
            _store_plane(out.record + out.second_plane, v, entry_b, out.record_stride, MASKED)
        elif CLASSES == 2:
            first = _with_student(entry, m_ba)
            if o.TARGET_IN_RECORD:
                first = tl.where(i.labelled, entry_a, first)
                if i.labelled:
                    _store_plane(out.record + out.second_plane, v, entry_b, out.record_stride, MASKED)
            _store_plane(out.record, v, first, out.record_stride, MASKED)
        else:
            bits = tl.where(learns, teacher.label + 128, 0) + tl.where(m_ba, 64, 0)
            _store_plane(out.record, v, entry, out.record_stride, MASKED)
            _store_plane(out.code, v, bits.to(tl.uint8), out.record_stride, MASKED)
    if o.WITH_MAPS:
        tl.store(out.weights + v, w_ab, mask=valid)
        tl.store(out.weights + out.map_plane + v, w_ba, mask=valid)
        tl.store(out.masks + v, m_ab.to(tl.int8), mask=valid)
        tl.store(out.masks + out.map_plane + v, m_ba.to(tl.int8), mask=valid)
    return Sums(loss_ab, loss_ba, weights)


@triton.jit
def _walk(i, out, program, programs, blocks_per_program, o):
    """Weigh a program's blocks, the last one first; returns their `Sums`."""
    BLOCK: tl.constexpr = o.GROUPS * o.GROUP
    zero = tl.zeros((o.GROUPS,), tl.float32)
    if o.RULES.detailed:
        sums = Sums(zero, zero, (zero, zero))
    else:
        sums = Sums(zero, zero, ())
    first = program * blocks_per_program
    whole = tl.minimum(first + blocks_per_program, i.voxels // BLOCK)
    if (program == programs - 1) & (i.voxels % BLOCK != 0):
        sums = _block(i.voxels // BLOCK * BLOCK, sums, i, out, o, True)
    for done in range(whole - first):
        sums = _block((whole - 1 - done) * BLOCK, sums, i, out, o, False)
    return sums


@triton.jit(do_not_specialize=SIZES)
def weighting_kernel(
    za, zb, fa, fb, target, mask, order, prototypes_a, prototypes_b,
    counts, sums,  # of prototypes_kernel
    mutual_weight,  # with HAS_WEIGHT a 0-dim tensor that multiplies mutual_factor
    sample_weights,  # with RULES.sample_weighted (B,) float32
    numerators,  # out: (2 or detailed 4, B, programs) float32: losses of students a and b, their weights
    record,  # out: (B + samples with two planes, record_stride) float32, rows padded to whole sectors
    code,  # out for C > 2: (B, record_stride) uint8
    weights,  # out with WITH_MAPS: (2, B, V) float32
    masks,  # out with WITH_MAPS: (2, B, V) int8
    mutual_factor, dice_weight, labelled, voxels, record_stride, size1, size2, t_b, t_0, t_1, t_2, m_b, m_0, m_1, m_2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    fa_b, fa_c, fa_0, fa_1, fa_2, fb_b, fb_c, fb_0, fb_1, fb_2,
    programs, blocks_per_program,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr, FEATURE_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, WITH_FEATURES: tl.constexpr,
    WITH_RECORD: tl.constexpr, TARGET_IN_RECORD: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WITH_MAPS: tl.constexpr, RULES: tl.constexpr, UNROLL: tl.constexpr,
    Z_LAYOUT: tl.constexpr, F_LAYOUT: tl.constexpr, M_LAYOUT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs * B,)."""
    all_programs = tl.num_programs(0)
    here = all_programs - 1 - tl.program_id(0)
    sample = here // programs
    program = here % programs
    member = member_of(order, sample, RULES)
    za += sample_offset(member, za_b, CLASSES, Z_LAYOUT)
    zb += sample_offset(member, zb_b, CLASSES, Z_LAYOUT)
    if WITH_FEATURES:
        fa += sample_offset(member, fa_b, FEATURES_A, F_LAYOUT)
        fb += sample_offset(member, fb_b, FEATURES_B, F_LAYOUT)
        prototypes_a += sample.to(tl.int64) * (CLASSES * FEATURES_A)
        prototypes_b += sample.to(tl.int64) * (CLASSES * FEATURES_B)
    if RULES.masked:
        mask += sample_offset(member, m_b, 1, M_LAYOUT)
    row = sample_offset(sample, record_stride, 1, 1)
    samples = all_programs // programs
    map_row = sample.to(tl.int64) * voxels
    scale_ab = 0.0
    scale_ba = 0.0
    supervised_a = Coefficients((), (), ())
    supervised_b = Coefficients((), (), ())
    if WITH_RECORD:
        cw = mutual_weight_of(mutual_factor, mutual_weight, HAS_WEIGHT)
        scale_ab = cw / normaliser(counts, 0, RULES)
        scale_ba = cw / normaliser(counts, 1, RULES)
        if TARGET_IN_RECORD:
            target += sample_offset(sample, t_b, 1, 0)
            supervised_a = supervised_coefficients(sums, 0, dice_weight, CLASSES, RULES)
            supervised_b = supervised_coefficients(sums, 1, dice_weight, CLASSES, RULES)
    sample_weight = 1.0
    if RULES.sample_weighted:
        sample_weight = tl.load(sample_weights + member)
    inputs = Inputs(
        za, zb, fa, fb, target, mask, prototypes_a, prototypes_b,
        strides_of(za_c, za_0, za_1, za_2, CLASSES, Z_LAYOUT), strides_of(zb_c, zb_0, zb_1, zb_2, CLASSES, Z_LAYOUT),
        strides_of(fa_c, fa_0, fa_1, fa_2, FEATURES_A, F_LAYOUT), strides_of(fb_c, fb_0, fb_1, fb_2, FEATURES_B, F_LAYOUT),
        strides_of(0, t_0, t_1, t_2, 1, 0), strides_of(0, m_0, m_1, m_2, 1, M_LAYOUT), sample < labelled,
        voxels_of(voxels, Z_LAYOUT), size1, size2, scale_ab, scale_ba, supervised_a, supervised_b, sample_weight,
    )  # fmt: skip
    outputs = Outputs(
        record + row, record_stride, sample_offset(samples, record_stride, 1, 1), code + row,
        weights + map_row, masks + map_row, samples.to(tl.int64) * voxels,
    )  # fmt: skip
    found = _walk(
        inputs, outputs, program, programs, blocks_per_program,
        Options(
            CLASSES, CLASSES_PAD, FEATURES_A, FEATURES_B, FEATURE_BLOCK, GROUPS, GROUP, WITH_FEATURES,
            WITH_RECORD, TARGET_IN_RECORD, WITH_MAPS, RULES, UNROLL, Z_LAYOUT, F_LAYOUT, M_LAYOUT, FLAT, WIDE,
        ),
    )  # fmt: skip
    tl.store(numerators + here, tl.sum(found.loss_ab, axis=0))
    tl.store(numerators + all_programs + here, tl.sum(found.loss_ba, axis=0))
    if RULES.detailed:
        tl.store(numerators + 2 * all_programs + here, tl.sum(found.weights[0], axis=0))
        tl.store(numerators + 3 * all_programs + here, tl.sum(found.weights[1], axis=0))
