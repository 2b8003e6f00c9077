"""Block sizes: plain arithmetic on the shapes, so that nothing is tuned in the middle of a training.

The figures behind the choices (registers, spills, widths of loads per target) come from
``python -m rplib.bench.ahead_of_time``.
"""

from typing import NamedTuple

SECTOR = 32  # bytes: what the memory of a GPU moves at least
RECORD_ALIGNMENT = 32  # the record's rows are padded to a multiple of this many float32 values


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> [power_of_two(n) for n in (1, 2, 3, 16, 17)]
    [1, 2, 4, 16, 32]
    """
    return 1 << (n - 1).bit_length()


class StatisticsTiles(NamedTuple):
    """Tiles of statistics_kernel.

    dot: sums per class by products with one-hot labels, see statistics.py; else block // vector rows of vector voxels.
    voxel_groups, feature_groups: of warps, with dot.
    """

    block: int
    classes_pad: int
    classes_dot: int
    feature_block: int
    dot: bool
    warps: int
    vector: int
    voxel_groups: int = 1
    feature_groups: int = 1


class WeightingTiles(NamedTuple):
    """Tiles of weighting_kernel: groups x group voxels, a group being one sector of features; unroll: the loop over blocks of
    features."""

    groups: int
    group: int
    classes_pad: int
    feature_block: int
    unroll: bool
    warps: int


class GradientTiles(NamedTuple):
    """Tiles of gradient_kernel: groups x group voxels, a group being one sector of logits."""

    groups: int
    group: int
    classes_pad: int
    warps: int


def statistics_tiles(
    classes: int, features: int, itemsize: int, *, channels_last: bool = False, aligned: bool = True, dice: bool = False
) -> StatisticsTiles:
    """Tiles for C classes and at most this many features per network (0: none are read) of ``itemsize`` bytes.

    Args:
        channels_last: the features of a voxel lie side by side.
        aligned: every row of voxels begins at a multiple of 16 elements.
        dice: the sums of Dice are kept as well, which takes registers.
    """
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if classes <= 4:
        # A thread keeps one number per class and feature of its row: at most 128 for both networks, or the features of a row are
        # shared by two warps or more.
        feature_block = min(widest, 32)
        rows = min(max(128 * 32 // (pad * feature_block), 32), 128)
        vector = 1
        if aligned and not channels_last:
            vector = 4 if classes == 2 else 16 // itemsize
            rows = 128 if pad * feature_block <= 32 else 64 if pad * feature_block <= 64 else 32
            rows = max(rows // 2, 32) if dice else rows
        return StatisticsTiles(rows * vector, pad, 16, feature_block, False, 4, vector)
    # Sums by products: a thread keeps pad x feature_block / (32 x feature_groups) numbers per network.
    feature_block = min(max(widest, 16), 128)
    classes_dot = max(pad, 16)
    feature_groups = min(max(classes_dot * feature_block // (256 if dice else 1024), 1), feature_block // 16, 4)
    run = 16 if dice else 32  # voxels of a product
    vector = min(16 // itemsize, run // 4)
    if channels_last:
        vector = 2 if itemsize == 4 else min(vector, feature_block // feature_groups // 8)
    elif not aligned:
        vector = 1
    warps = 4 if feature_groups < 4 else 8
    voxel_groups = warps // feature_groups
    return StatisticsTiles(run * voxel_groups, pad, classes_dot, feature_block, True, warps, vector, voxel_groups, feature_groups)


def weighting_tiles(
    classes: int,
    features: int,
    itemsize: int,
    *,
    channels_last: bool = False,
    aligned: bool = True,
    plain: bool = True,
    dice: bool = False,
    detailed: bool = False,
) -> WeightingTiles:
    """Tiles for features of ``itemsize`` bytes (the wider of the two networks' types).

    Args:
        channels_last: the features of a voxel lie side by side.
        aligned: every row of voxels begins at a multiple of 16 elements.
        plain: one stride leads through all voxels, and a record is written: the variant that trainings use.
        dice: the record of labelled samples carries the gradient of Dice too, which takes registers.
        detailed: the sums of the weights are kept as well.
    """
    group = SECTOR // itemsize
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if channels_last:
        block = 64 if detailed and classes > 4 else 128
        return WeightingTiles(block // group, group, pad, min(widest, 8 if itemsize == 4 else 16), classes <= 4, 4)
    block = 2048 // itemsize if aligned else 256  # 16 bytes a thread: the features of a block lie in no other thread's registers
    if classes > 16:  # one voxel a thread: the logits of both networks alone take 2 C registers
        return WeightingTiles(128 // group, group, pad, min(widest, 8), False, 4)
    feature_block = 8 if classes <= 4 else 2
    if detailed and 2 < classes <= 4:
        feature_block = 4
    return WeightingTiles(block // group, group, pad, min(widest, feature_block), False, 4)


def gradient_tiles(
    classes: int, itemsize: int, *, aligned: bool = True, channels_last: bool = False, dice: bool = False
) -> GradientTiles:
    """Tiles for C classes and logits of ``itemsize`` bytes.

    Many classes with Dice or channels last: one voxel a thread, whose logits of both networks fill the registers.
    """
    pad = power_of_two(classes)
    group = SECTOR // itemsize
    block = 1024 if classes == 2 else 128 if classes > 4 and (dice or channels_last) else 512
    return GradientTiles(block // group, group, pad, 4)
