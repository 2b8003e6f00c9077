"""Backward pass: gradients of the logits from the record that the second pass left (see weighting.py).

    dL/dz_i(c, v) = upstream * (cw * w_ij(v) / n_ij * dCE_ij/dz_i(c, v) + dice_weight * dDice_i/dz_i(c, v))

in float32 before the cast to the gradient's dtype. C = 2 reads the record alone. C > 2 reads the student's logits again (by
32-byte sectors of GROUP voxels, as the second pass reads features); both networks' where both learn: at labelled voxels, and
everywhere with ``confidence=None``.
"""

import triton
import triton.language as tl

from rplib.kernels.dice import dice_coefficients, dice_slope, load_target
from rplib.kernels.voxels import batch_stride, channel_offsets, load, sectors, slope, softmax_parts, voxel_offsets


@triton.jit
def _both_planes(record, second_plane, v, valid, MASKED: tl.constexpr):
    return load(record + v, valid, MASKED), load(record + second_plane + v, valid, MASKED)


@triton.jit
def _one_plane(record, v, valid, MASKED: tl.constexpr):
    """The record of either student, 0 where it does not learn; C = 2."""
    packed = load(record + v, valid, MASKED)
    bits = packed.to(tl.int32, bitcast=True)
    value = (bits & -2).to(tl.float32, bitcast=True)
    student_is_b = (bits & 1) != 0
    return tl.where(student_is_b, 0.0, value), tl.where(student_is_b, value, 0.0)


@triton.jit
def _student_alone(
    za, zb, za_c, zb_c, za_v, zb_v, record, code, v, valid, cls,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, ON_LOGITS: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients (CLASSES_PAD, GROUPS, GROUP) of both networks where at most one learns; reads that one's logits."""
    weight = load(record + v, valid, MASKED)
    if MASKED:
        bits = tl.load(code + v, mask=valid, other=0).to(tl.int32)
    else:
        bits = tl.load(code + v).to(tl.int32)
    label = bits & 63
    is_b = (bits & 64) != 0
    is_a = (bits >= 128) & (is_b == 0)
    inside = cls < CLASSES
    read_a = inside & sectors(is_a, valid, MASKED)[None, :, :]
    read_b = inside & sectors(is_b, valid, MASKED)[None, :, :]
    a = tl.load(za + channel_offsets(cls, za_c, WIDE) + za_v[None, :, :], mask=read_a, other=0.0).to(tl.float32)
    b = tl.load(zb + channel_offsets(cls, zb_c, WIDE) + zb_v[None, :, :], mask=read_b, other=0.0).to(tl.float32)
    _, own, rest, e = softmax_parts(tl.where(is_b[None, :, :], b, a), cls, CLASSES, CLASSES_PAD)
    p = e / (1.0 + rest)[None, :, :]
    grad = slope(p, rest, own, label, cls, ON_LOGITS, CLASSES) * weight[None, :, :]
    return tl.where(is_a[None, :, :], grad, 0.0), tl.where(is_b[None, :, :], grad, 0.0)


@triton.jit
def _both_networks(
    za, zb, za_c, zb_c, za_v, zb_v, target, t_v, labelled, alpha_a, beta_a, alpha_b, beta_b,
    record, second_plane, code, v, valid, cls,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, BOTH: tl.constexpr, WITH_DICE: tl.constexpr,
    ON_LOGITS: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients (CLASSES_PAD, GROUPS, GROUP) of both networks from both networks' logits."""
    inside = cls < CLASSES
    if MASKED:
        inside = inside & valid[None, :, :]
    ragged: tl.constexpr = CLASSES_PAD != CLASSES
    a = load(za + channel_offsets(cls, za_c, WIDE) + za_v[None, :, :], inside, MASKED or ragged)
    b = load(zb + channel_offsets(cls, zb_c, WIDE) + zb_v[None, :, :], inside, MASKED or ragged)
    _, label_a, rest_a, e_a = softmax_parts(a, cls, CLASSES, CLASSES_PAD)
    _, label_b, rest_b, e_b = softmax_parts(b, cls, CLASSES, CLASSES_PAD)
    p_a = e_a / (1.0 + rest_a)[None, :, :]
    p_b = e_b / (1.0 + rest_b)[None, :, :]
    if BOTH:
        w_a, w_b = _both_planes(record, second_plane, v, valid, MASKED)
    else:
        weight = load(record + v, valid, MASKED)
        if MASKED:
            bits = tl.load(code + v, mask=valid, other=0).to(tl.int32)
        else:
            bits = tl.load(code + v).to(tl.int32)
        is_b = (bits & 64) != 0
        w_a = tl.where(is_b, 0.0, weight)
        w_b = tl.where(is_b, weight, 0.0)
    grad_a = slope(p_a, rest_a, label_a, label_b, cls, ON_LOGITS, CLASSES) * w_a[None, :, :]
    grad_b = slope(p_b, rest_b, label_b, label_a, cls, ON_LOGITS, CLASSES) * w_b[None, :, :]
    if WITH_DICE:
        t, known = load_target(target, t_v, labelled, valid, MASKED)
        known = known[None, :, :]
        grad_a += tl.where(known, dice_slope(p_a, rest_a, alpha_a, beta_a, t, cls, CLASSES), 0.0)
        grad_b += tl.where(known, dice_slope(p_b, rest_b, alpha_b, beta_b, t, cls, CLASSES), 0.0)
    return grad_a, grad_b


@triton.jit
def _gradient_block(
    start, factor, alpha_a, beta_a, alpha_b, beta_b,
    za, zb, target, labelled, record, second_plane, code, out_a, out_b,
    voxels, size1, size2, t_0, t_1, t_2,
    za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2, ga_c, ga_0, ga_1, ga_2, gb_c, gb_0, gb_1, gb_2,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BOTH: tl.constexpr,
    WITH_DICE: tl.constexpr, ON_LOGITS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (GROUPS, GROUP)
    valid = v < voxels
    cls = tl.arange(0, CLASSES_PAD)[:, None, None]
    inside = cls < CLASSES
    if MASKED:
        inside = inside & valid[None, :, :]
    ragged: tl.constexpr = CLASSES_PAD != CLASSES
    if CLASSES == 2:
        if BOTH:
            entry_a, entry_b = _both_planes(record, second_plane, v, valid, MASKED)
        elif WITH_DICE:
            if labelled:
                entry_a, entry_b = _both_planes(record, second_plane, v, valid, MASKED)
            else:
                entry_a, entry_b = _one_plane(record, v, valid, MASKED)
        else:
            entry_a, entry_b = _one_plane(record, v, valid, MASKED)
        grad_a = tl.where(cls == 0, entry_a[None, :, :], -entry_a[None, :, :])
        grad_b = tl.where(cls == 0, entry_b[None, :, :], -entry_b[None, :, :])
    else:
        za_v = voxel_offsets(v, size1, size2, za_0, za_1, za_2, FLAT, WIDE)
        zb_v = voxel_offsets(v, size1, size2, zb_0, zb_1, zb_2, FLAT, WIDE)
        t_v = v
        if WITH_DICE:
            t_v = voxel_offsets(v, size1, size2, t_0, t_1, t_2, FLAT, WIDE)
        if BOTH:
            grad_a, grad_b = _both_networks(
                za, zb, za_c, zb_c, za_v, zb_v, target, t_v, labelled, alpha_a, beta_a, alpha_b, beta_b,
                record, second_plane, code, v, valid, cls, CLASSES, CLASSES_PAD, BOTH, WITH_DICE, ON_LOGITS, WIDE, MASKED,
            )  # fmt: skip
        elif WITH_DICE:
            if labelled:
                grad_a, grad_b = _both_networks(
                    za, zb, za_c, zb_c, za_v, zb_v, target, t_v, labelled, alpha_a, beta_a, alpha_b, beta_b,
                    record, second_plane, code, v, valid, cls, CLASSES, CLASSES_PAD, BOTH, WITH_DICE, ON_LOGITS, WIDE, MASKED,
                )  # fmt: skip
            else:
                grad_a, grad_b = _student_alone(
                    za, zb, za_c, zb_c, za_v, zb_v, record, code, v, valid, cls,
                    CLASSES, CLASSES_PAD, ON_LOGITS, WIDE, MASKED,
                )  # fmt: skip
        else:
            grad_a, grad_b = _student_alone(
                za, zb, za_c, zb_c, za_v, zb_v, record, code, v, valid, cls,
                CLASSES, CLASSES_PAD, ON_LOGITS, WIDE, MASKED,
            )  # fmt: skip
    grad_a *= factor
    grad_b *= factor
    ga_v = voxel_offsets(v, size1, size2, ga_0, ga_1, ga_2, FLAT, WIDE)
    gb_v = voxel_offsets(v, size1, size2, gb_0, gb_1, gb_2, FLAT, WIDE)
    at_a = out_a + channel_offsets(cls, ga_c, WIDE) + ga_v[None, :, :]
    at_b = out_b + channel_offsets(cls, gb_c, WIDE) + gb_v[None, :, :]
    if MASKED or ragged:
        tl.store(at_a, grad_a.to(out_a.dtype.element_ty), mask=inside)
        tl.store(at_b, grad_b.to(out_b.dtype.element_ty), mask=inside)
    else:
        tl.store(at_a, grad_a.to(out_a.dtype.element_ty))
        tl.store(at_b, grad_b.to(out_b.dtype.element_ty))


@triton.jit
def gradient_kernel(
    upstream, sums, record, code, za, zb, target,
    out_a, out_b,  # out: gradients (B, C, *spatial) in the logits' dtypes
    dice_weight, labelled, voxels, record_stride, size1, size2, t_b, t_0, t_1, t_2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    ga_b, ga_c, ga_0, ga_1, ga_2, gb_b, gb_c, gb_0, gb_1, gb_2,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    BOTH: tl.constexpr, WITH_DICE: tl.constexpr, CHOSEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ON_LOGITS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, B)."""
    if PACKED:  # a constant tells the compiler how wide it may load and store
        za_2 = CLASSES
        zb_2 = CLASSES
        ga_2 = CLASSES
        gb_2 = CLASSES
    BLOCK: tl.constexpr = GROUPS * GROUP
    sample = tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    wide_sample = sample.to(tl.int64)
    record += wide_sample * record_stride
    code += wide_sample * record_stride
    second_plane = record_stride.to(tl.int64) * tl.num_programs(1)
    za += wide_sample * batch_stride(za_b, CLASSES, PACKED)
    zb += wide_sample * batch_stride(zb_b, CLASSES, PACKED)
    out_a += wide_sample * batch_stride(ga_b, CLASSES, PACKED)
    out_b += wide_sample * batch_stride(gb_b, CLASSES, PACKED)
    factor = tl.load(upstream).to(tl.float32) + tl.load(sums)
    is_labelled = sample < labelled
    alpha_a = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    beta_a = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    alpha_b = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    beta_b = tl.zeros((CLASSES_PAD, 1, 1), tl.float32)
    if WITH_DICE:
        target += wide_sample * t_b
        if CLASSES > 2:
            cls = tl.arange(0, CLASSES_PAD)[:, None, None]
            alpha_a, beta_a = dice_coefficients(sums, 0, dice_weight, cls, CLASSES, CHOSEN, LOW, HIGH)
            alpha_b, beta_b = dice_coefficients(sums, 1, dice_weight, cls, CLASSES, CHOSEN, LOW, HIGH)
    if start + BLOCK <= voxels:
        _gradient_block(
            start, factor, alpha_a, beta_a, alpha_b, beta_b,
            za, zb, target, is_labelled, record, second_plane, code, out_a, out_b,
            voxels, size1, size2, t_0, t_1, t_2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            ga_c, ga_0, ga_1, ga_2, gb_c, gb_0, gb_1, gb_2,
            CLASSES, CLASSES_PAD, GROUPS, GROUP, BOTH, WITH_DICE, ON_LOGITS, FLAT, WIDE, False,
        )  # fmt: skip
    else:
        _gradient_block(
            start, factor, alpha_a, beta_a, alpha_b, beta_b,
            za, zb, target, is_labelled, record, second_plane, code, out_a, out_b,
            voxels, size1, size2, t_0, t_1, t_2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            ga_c, ga_0, ga_1, ga_2, gb_c, gb_0, gb_1, gb_2,
            CLASSES, CLASSES_PAD, GROUPS, GROUP, BOTH, WITH_DICE, ON_LOGITS, FLAT, WIDE, True,
        )  # fmt: skip
