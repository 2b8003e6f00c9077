"""Backward pass: gradients of the logits from the record that the second pass stored (see weighting.py).

    dL/dz_i(c, v) = upstream * (cw * w_ij(v) / n_ij * dCE_ij/dz_i(c, v) + dice_weight * dDice_i/dz_i(c, v))

in float32 before the cast to the gradient's dtype. C = 2 reads the record alone. C > 2 reads the student's logits again (by
32-byte sectors of GROUP voxels, as the second pass reads features); both networks' where both learn: at labelled voxels, and
everywhere with ``confidence=None``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from rplib.kernels.dice import Coefficients, load_target, supervised_coefficients, supervised_slope
from rplib.kernels.voxels import (
    SIZES,
    kept,
    load,
    load_logits,
    load_mask,
    member_of,
    opinion,
    sample_offset,
    sectors,
    slope,
    store_logits,
    strides_of,
    voxel_offsets,
    voxels_of,
)


class Tensors(NamedTuple):
    """Inputs and outputs of a program: pointers to its sample, strides, sizes, and the factors of its results."""

    za: tl.tensor
    zb: tl.tensor
    target: tl.tensor
    mask: tl.tensor
    record: tl.tensor
    second_plane: tl.tensor
    code: tl.tensor
    out_a: tl.tensor
    out_b: tl.tensor
    za_strides: tl.tuple
    zb_strides: tl.tuple
    target_strides: tl.tuple
    mask_strides: tl.tuple
    out_a_strides: tl.tuple
    out_b_strides: tl.tuple
    labelled: tl.tensor
    voxels: tl.tensor
    size1: tl.tensor
    size2: tl.tensor
    factor: tl.tensor
    supervised_a: Coefficients
    supervised_b: Coefficients


class Options(NamedTuple):
    """Constants of gradient_kernel that a block needs."""

    CLASSES: tl.constexpr
    CLASSES_PAD: tl.constexpr
    GROUPS: tl.constexpr
    GROUP: tl.constexpr
    RULES: tl.constexpr
    LAYOUT: tl.constexpr
    M_LAYOUT: tl.constexpr
    FLAT: tl.constexpr
    WIDE: tl.constexpr


@triton.jit
def _both_planes(i, v, valid, MASKED: tl.constexpr):
    return load(i.record + v, valid, MASKED), load(i.record + i.second_plane + v, valid, MASKED)


@triton.jit
def _one_plane(i, v, valid, MASKED: tl.constexpr):
    """The record of either student, 0 where it does not learn; C = 2."""
    packed = load(i.record + v, valid, MASKED)
    bits = packed.to(tl.int32, bitcast=True)
    value = (bits & -2).to(tl.float32, bitcast=True)
    student_is_b = (bits & 1) != 0
    return tl.where(student_is_b, 0.0, value), tl.where(student_is_b, value, 0.0)


@triton.jit
def _weight_and_code(i, v, valid, MASKED: tl.constexpr):
    weight = load(i.record + v, valid, MASKED)
    if MASKED:
        bits = tl.load(i.code + v, mask=valid, other=0).to(tl.int32)
    else:
        bits = tl.load(i.code + v).to(tl.int32)
    return weight, bits


@triton.jit
def _student_alone(i, v, za_v, zb_v, valid, o, MASKED: tl.constexpr):
    """Gradients of both networks where at most one learns; reads that one's logits, by sectors."""
    weight, bits = _weight_and_code(i, v, valid, MASKED)
    is_b = (bits & 64) != 0
    is_a = (bits >= 128) & (is_b == 0)
    read_a = sectors(is_a, valid, MASKED)
    read_b = sectors(is_b, valid, MASKED)
    za = load_logits(i.za, za_v, i.za_strides.channel, read_a, o.CLASSES, o.CLASSES_PAD, o.LAYOUT, o.WIDE, True)
    zb = load_logits(i.zb, zb_v, i.zb_strides.channel, read_b, o.CLASSES, o.CLASSES_PAD, o.LAYOUT, o.WIDE, True)
    z = ()
    for c in tl.static_range(o.CLASSES):
        z = z + (tl.where(is_b, zb[c], za[c]),)
    grad = slope(opinion(z, o.CLASSES, True), bits & 63, o.RULES.on_logits, o.CLASSES)
    weight *= i.factor
    grad_a = ()
    grad_b = ()
    for c in tl.static_range(o.CLASSES):
        value = grad[c] * weight
        grad_a = grad_a + (tl.where(is_a, value, 0.0),)
        grad_b = grad_b + (tl.where(is_b, value, 0.0),)
    return grad_a, grad_b


@triton.jit
def _one_of_both(student, label, weight, coefficients, t, known, factor, o):
    """Gradient of a network whose supervised term counts as well."""
    grad = slope(student, label, o.RULES.on_logits, o.CLASSES)
    result = ()
    if o.RULES.supervised:
        taught = supervised_slope(student, coefficients, t, o.CLASSES, o.RULES)
        for c in tl.static_range(o.CLASSES):
            result = result + ((grad[c] * weight + tl.where(known, taught[c], 0.0)) * factor,)
    else:
        for c in tl.static_range(o.CLASSES):
            result = result + (grad[c] * weight * factor,)
    return result


@triton.jit
def _both_networks(i, v, za_v, zb_v, valid, o, MASKED: tl.constexpr):
    """Gradients of both networks from both networks' logits."""
    za = load_logits(i.za, za_v, i.za_strides.channel, valid, o.CLASSES, o.CLASSES_PAD, o.LAYOUT, o.WIDE, MASKED)
    zb = load_logits(i.zb, zb_v, i.zb_strides.channel, valid, o.CLASSES, o.CLASSES_PAD, o.LAYOUT, o.WIDE, MASKED)
    keep = load_mask(i.mask, v, i.size1, i.size2, i.mask_strides, valid, o.RULES, o.M_LAYOUT, o.FLAT, o.WIDE, MASKED)
    if o.RULES.masked:  # the weights are 0 there, but 0 times NaN is not
        za = kept(za, keep, o.CLASSES)
        zb = kept(zb, keep, o.CLASSES)
    a = opinion(za, o.CLASSES, True)
    b = opinion(zb, o.CLASSES, True)
    if not o.RULES.compare:
        w_a, w_b = _both_planes(i, v, valid, MASKED)
    else:
        weight, bits = _weight_and_code(i, v, valid, MASKED)
        is_b = (bits & 64) != 0
        w_a = tl.where(is_b, 0.0, weight)
        w_b = tl.where(is_b, weight, 0.0)
    t = v
    known = valid
    if o.RULES.supervised:
        t_v = voxel_offsets(v, i.size1, i.size2, i.target_strides, 0, o.FLAT, o.WIDE)
        t, known = load_target(i.target, t_v, i.labelled, valid, keep, o.RULES, MASKED)
    grad_a = _one_of_both(a, b.label, w_a, i.supervised_a, t, known, i.factor, o)
    grad_b = _one_of_both(b, a.label, w_b, i.supervised_b, t, known, i.factor, o)
    return grad_a, grad_b


@triton.jit
def _two_classes(entry, factor):
    entry *= factor
    return entry, -entry


@triton.jit
def _gradient_block(start, i, o, MASKED: tl.constexpr):
    """Gradients of the block of voxels that begins at ``start``; i: `Tensors`, o: `Options`."""
    v = start + tl.arange(0, o.GROUPS)[:, None] * o.GROUP + tl.arange(0, o.GROUP)[None, :]  # (GROUPS, GROUP)
    valid = v < i.voxels
    if o.CLASSES == 2:
        if not o.RULES.compare:
            entry_a, entry_b = _both_planes(i, v, valid, MASKED)
        elif o.RULES.supervised:
            if i.labelled:
                entry_a, entry_b = _both_planes(i, v, valid, MASKED)
            else:
                entry_a, entry_b = _one_plane(i, v, valid, MASKED)
        else:
            entry_a, entry_b = _one_plane(i, v, valid, MASKED)
        grad_a = _two_classes(entry_a, i.factor)
        grad_b = _two_classes(entry_b, i.factor)
    else:
        za_v = voxel_offsets(v, i.size1, i.size2, i.za_strides, o.LAYOUT, o.FLAT, o.WIDE)
        zb_v = voxel_offsets(v, i.size1, i.size2, i.zb_strides, o.LAYOUT, o.FLAT, o.WIDE)
        if not o.RULES.compare:
            grad_a, grad_b = _both_networks(i, v, za_v, zb_v, valid, o, MASKED)
        elif o.RULES.supervised:
            if i.labelled:
                grad_a, grad_b = _both_networks(i, v, za_v, zb_v, valid, o, MASKED)
            else:
                grad_a, grad_b = _student_alone(i, v, za_v, zb_v, valid, o, MASKED)
        else:
            grad_a, grad_b = _student_alone(i, v, za_v, zb_v, valid, o, MASKED)
    a_v = voxel_offsets(v, i.size1, i.size2, i.out_a_strides, o.LAYOUT, o.FLAT, o.WIDE)
    b_v = voxel_offsets(v, i.size1, i.size2, i.out_b_strides, o.LAYOUT, o.FLAT, o.WIDE)
    if o.RULES.learns_a:
        store_logits(i.out_a, a_v, i.out_a_strides.channel, valid, grad_a, o.CLASSES, o.CLASSES_PAD, o.LAYOUT, o.WIDE, MASKED)
    if o.RULES.learns_b:
        store_logits(i.out_b, b_v, i.out_b_strides.channel, valid, grad_b, o.CLASSES, o.CLASSES_PAD, o.LAYOUT, o.WIDE, MASKED)


@triton.jit
def _whole_or_tail(start, i, o):
    if start + o.GROUPS * o.GROUP <= i.voxels:
        _gradient_block(start, i, o, False)
    else:
        _gradient_block(start, i, o, True)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    upstream, sums, record, code, za, zb, target, mask, order,
    out_a, out_b,  # out: gradients (B, C, *spatial) in the logits' dtypes, of the networks that learn
    dice_weight, labelled, voxels, record_stride, size1, size2, t_b, t_0, t_1, t_2, m_b, m_0, m_1, m_2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    ga_b, ga_c, ga_0, ga_1, ga_2, gb_b, gb_c, gb_0, gb_1, gb_2,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    RULES: tl.constexpr, LAYOUT: tl.constexpr, M_LAYOUT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks * B,)."""
    BLOCK: tl.constexpr = GROUPS * GROUP
    blocks = tl.cdiv(voxels, BLOCK)
    sample = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    samples = tl.num_programs(0) // blocks
    row = sample_offset(sample, record_stride, 1, 1)
    supervised_a = Coefficients((), (), ())
    supervised_b = Coefficients((), (), ())
    if RULES.supervised:
        target += sample_offset(sample, t_b, 1, 0)
        if CLASSES > 2:
            supervised_a = supervised_coefficients(sums, 0, dice_weight, CLASSES, RULES)
            supervised_b = supervised_coefficients(sums, 1, dice_weight, CLASSES, RULES)
    member = member_of(order, sample, RULES)
    if RULES.masked:
        mask += sample_offset(member, m_b, 1, M_LAYOUT)
    tensors = Tensors(
        za + sample_offset(member, za_b, CLASSES, LAYOUT), zb + sample_offset(member, zb_b, CLASSES, LAYOUT), target, mask,
        record + row, sample_offset(samples, record_stride, 1, 1), code + row,
        out_a + sample_offset(member, ga_b, CLASSES, LAYOUT), out_b + sample_offset(member, gb_b, CLASSES, LAYOUT),
        strides_of(za_c, za_0, za_1, za_2, CLASSES, LAYOUT), strides_of(zb_c, zb_0, zb_1, zb_2, CLASSES, LAYOUT),
        strides_of(0, t_0, t_1, t_2, 1, 0), strides_of(0, m_0, m_1, m_2, 1, M_LAYOUT),
        strides_of(ga_c, ga_0, ga_1, ga_2, CLASSES, LAYOUT), strides_of(gb_c, gb_0, gb_1, gb_2, CLASSES, LAYOUT),
        sample < labelled, voxels_of(voxels, LAYOUT), size1, size2,
        tl.load(upstream).to(tl.float32) + tl.load(sums), supervised_a, supervised_b,
    )  # fmt: skip
    _whole_or_tail(start, tensors, Options(CLASSES, CLASSES_PAD, GROUPS, GROUP, RULES, LAYOUT, M_LAYOUT, FLAT, WIDE))
