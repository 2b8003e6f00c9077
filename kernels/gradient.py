"""Backward pass: gradients of the logits from the record that the second pass left (see weighting.py).

    dL/dz_i(c, v) = upstream * w_ij(v) / n_ij * dCE_ij/dz_i(c, v)

in float32 before the cast to the gradient's dtype. C = 2 reads the record alone; C > 2 reads the logits again.
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import channel_offsets, load, slope, softmax_parts, voxel_offsets


@triton.jit
def _entries(record, plane, v, valid, BOTH: tl.constexpr, MASKED: tl.constexpr):
    """The record of either student, 0 where it does not learn."""
    first = load(record + v, valid, MASKED)
    if BOTH:
        return first, load(record + plane + v, valid, MASKED)
    else:
        bits = first.to(tl.int32, bitcast=True)
        value = (bits & -2).to(tl.float32, bitcast=True)
        student_is_b = (bits & 1) != 0
        return tl.where(student_is_b, 0.0, value), tl.where(student_is_b, value, 0.0)


@triton.jit
def _gradient_block(
    start, scale_a, scale_b, za, zb, record, plane, out_a, out_b,
    voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2, ga_c, ga_0, ga_1, ga_2, gb_c, gb_0, gb_1, gb_2,
    CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, BLOCK: tl.constexpr, BOTH: tl.constexpr, ON_LOGITS: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    v = start + tl.arange(0, BLOCK)
    valid = v < voxels
    cls = tl.arange(0, CLASSES_PAD)[:, None]
    inside = cls < CLASSES
    if MASKED:
        inside = inside & valid[None, :]
    ragged: tl.constexpr = CLASSES_PAD != CLASSES
    entry_a, entry_b = _entries(record, plane, v, valid, BOTH, MASKED)
    entry_a *= scale_a
    entry_b *= scale_b
    if CLASSES == 2:
        grad_a = tl.where(cls == 0, entry_a[None, :], -entry_a[None, :])
        grad_b = tl.where(cls == 0, entry_b[None, :], -entry_b[None, :])
    else:
        za_v = voxel_offsets(v, size1, size2, za_0, za_1, za_2, FLAT, WIDE)
        zb_v = voxel_offsets(v, size1, size2, zb_0, zb_1, zb_2, FLAT, WIDE)
        a = load(za + channel_offsets(cls, za_c, WIDE) + za_v[None, :], inside, MASKED or ragged)  # (CLASSES_PAD, BLOCK)
        b = load(zb + channel_offsets(cls, zb_c, WIDE) + zb_v[None, :], inside, MASKED or ragged)
        _, label_a, rest_a, e_a = softmax_parts(a, cls, CLASSES, CLASSES_PAD)
        _, label_b, rest_b, e_b = softmax_parts(b, cls, CLASSES, CLASSES_PAD)
        p_a = e_a / (1.0 + rest_a)[None, :]
        p_b = e_b / (1.0 + rest_b)[None, :]
        grad_a = slope(p_a, rest_a, label_a, label_b, cls, ON_LOGITS, CLASSES) * entry_a[None, :]
        grad_b = slope(p_b, rest_b, label_b, label_a, cls, ON_LOGITS, CLASSES) * entry_b[None, :]
    ga_v = voxel_offsets(v, size1, size2, ga_0, ga_1, ga_2, FLAT, WIDE)
    gb_v = voxel_offsets(v, size1, size2, gb_0, gb_1, gb_2, FLAT, WIDE)
    at_a = out_a + channel_offsets(cls, ga_c, WIDE) + ga_v[None, :]
    at_b = out_b + channel_offsets(cls, gb_c, WIDE) + gb_v[None, :]
    if MASKED or ragged:
        tl.store(at_a, grad_a.to(out_a.dtype.element_ty), mask=inside)
        tl.store(at_b, grad_b.to(out_b.dtype.element_ty), mask=inside)
    else:
        tl.store(at_a, grad_a.to(out_a.dtype.element_ty))
        tl.store(at_b, grad_b.to(out_b.dtype.element_ty))


@triton.jit
def gradient_kernel(
    upstream, counts, poison, record, za, zb,
    out_a, out_b,  # out: gradients (B, C, *spatial) in the logits' dtypes
    voxels, record_stride, size1, size2,
    za_b, za_c, za_0, za_1, za_2, zb_b, zb_c, zb_0, zb_1, zb_2,
    ga_b, ga_c, ga_0, ga_1, ga_2, gb_b, gb_c, gb_0, gb_1, gb_2,
    EPS: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr, BLOCK: tl.constexpr,
    BOTH: tl.constexpr, ON_LOGITS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, B)."""
    sample = tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    wide_sample = sample.to(tl.int64)
    record += wide_sample * record_stride
    plane = record_stride.to(tl.int64) * tl.num_programs(1)
    za += wide_sample * za_b
    zb += wide_sample * zb_b
    out_a += wide_sample * ga_b
    out_b += wide_sample * gb_b
    factor = tl.load(upstream).to(tl.float32) + tl.load(poison)
    scale_a = factor / (tl.load(counts).to(tl.float32) + EPS)
    scale_b = factor / (tl.load(counts + 1).to(tl.float32) + EPS)
    if start + BLOCK <= voxels:
        _gradient_block(
            start, scale_a, scale_b, za, zb, record, plane, out_a, out_b,
            voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            ga_c, ga_0, ga_1, ga_2, gb_c, gb_0, gb_1, gb_2,
            CLASSES, CLASSES_PAD, BLOCK, BOTH, ON_LOGITS, FLAT, WIDE, False,
        )  # fmt: skip
    else:
        _gradient_block(
            start, scale_a, scale_b, za, zb, record, plane, out_a, out_b,
            voxels, size1, size2, za_c, za_0, za_1, za_2, zb_c, zb_0, zb_1, zb_2,
            ga_c, ga_0, ga_1, ga_2, gb_c, gb_0, gb_1, gb_2,
            CLASSES, CLASSES_PAD, BLOCK, BOTH, ON_LOGITS, FLAT, WIDE, True,
        )  # fmt: skip
