"""End of the first pass: the partial results of all programs become prototypes, counts and the sums of the supervised term.

Sums are in a fixed order, so that a run is reproducible to the bit.
"""

import triton
import triton.language as tl

from rplib.kernels.voxels import SIZES


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
    """Sum of n values, ``stride`` apart, in a fixed order."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, n, BLOCK):
        at = start + i
        total += tl.load(values + at.to(tl.int64) * stride, mask=at < n, other=0).to(DTYPE)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=SIZES)
def prototypes_kernel(
    sums_a, sums_b, members, counts, nonfinite, dice,  # what statistics_kernel wrote
    prototypes_a, prototypes_b,  # out: (B, C, F) float32
    all_counts,  # out: (2,) int64, or detailed (3 + 2 C,): and the voxels whose labels differ, those of each class of a and b
    all_sums,  # out: (1 + 5 C or with cross-entropy 3 + 5 C,) float32, or (1,) without labels: the vector of dice.py
    batch, programs, flags, labelled,
    CLASSES: tl.constexpr, FEATURES_A: tl.constexpr, FEATURES_B: tl.constexpr,
    FEATURES_PAD: tl.constexpr, ROWS: tl.constexpr, COUNT_BLOCK: tl.constexpr,
    WITH_FEATURES: tl.constexpr, RULES: tl.constexpr,
):  # fmt: skip
    """Grid: (2 B C with features + the length of ``all_sums`` + 2 C detailed,): the prototypes, the counts and the nonfinite, the
    supervised sums, the voxels of each pseudo-class."""
    program = tl.program_id(0)
    rows = batch * CLASSES
    plane = batch * programs * CLASSES
    ENTROPIES: tl.constexpr = 2 if RULES.entropy else 0
    SUPERVISED: tl.constexpr = 5 * CLASSES + ENTROPIES if RULES.supervised else 0
    if WITH_FEATURES:
        after = program - 2 * rows
    else:
        after = program
    if after == 0:
        n = batch * programs
        tl.store(all_counts, _column_sum(counts, n, 1, tl.int64, COUNT_BLOCK))
        tl.store(all_counts + 1, _column_sum(counts + n, n, 1, tl.int64, COUNT_BLOCK))
        tl.store(all_sums, _column_sum(nonfinite, flags, 1, tl.float32, COUNT_BLOCK))
        if RULES.detailed:
            tl.store(all_counts + 2, _column_sum(counts + 2 * n, n, 1, tl.int64, COUNT_BLOCK))
    elif after > SUPERVISED:
        if RULES.detailed:
            n = batch * programs
            column = after - 1 - SUPERVISED
            of_b = column // CLASSES
            voxels = _column_sum(members + of_b * plane + column % CLASSES, n, CLASSES, tl.int64, COUNT_BLOCK)
            tl.store(all_counts + 3 + column, voxels)
    elif after > 0:
        if RULES.supervised:
            n = labelled * programs
            column = after - 1
            WIDTH: tl.constexpr = 4 * CLASSES + ENTROPIES
            if column < 4 * CLASSES:
                if RULES.dice:
                    tl.store(all_sums + after, _column_sum(dice + column, n, WIDTH, tl.float32, COUNT_BLOCK))
                else:
                    tl.store(all_sums + after, 0.0)
            elif column >= 5 * CLASSES:
                tl.store(all_sums + after, _column_sum(dice + column - CLASSES, n, WIDTH, tl.float32, COUNT_BLOCK))
            else:
                truth = _column_sum(members + 2 * plane + column - 4 * CLASSES, n, CLASSES, tl.int64, COUNT_BLOCK)
                tl.store(all_sums + after, truth.to(tl.float32))
    elif WITH_FEATURES:
        if program < rows:
            _prototype(sums_a, members, prototypes_a, program, programs, RULES.eps, CLASSES, FEATURES_A, FEATURES_PAD, ROWS)
        else:
            row = program - rows
            _prototype(sums_b, members + plane, prototypes_b, row, programs, RULES.eps, CLASSES, FEATURES_B, FEATURES_PAD, ROWS)
