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
    """Tiles of statistics_kernel; dot: sums per class by a product with one-hot labels."""

    block: int
    classes_pad: int
    classes_dot: int
    feature_block: int
    dot: bool
    warps: int


class WeightingTiles(NamedTuple):
    """Tiles of weighting_kernel: groups x group voxels, a group being one sector of features."""

    groups: int
    group: int
    classes_pad: int
    feature_block: int
    dot: bool
    warps: int


class GradientTiles(NamedTuple):
    """Tiles of gradient_kernel."""

    block: int
    classes_pad: int
    warps: int


def statistics_tiles(classes: int, features: int) -> StatisticsTiles:
    """Tiles for C classes and at most this many features per network (0: no features are read)."""
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if classes == 2:
        feature_block = min(widest, 64)
        # 4 running tiles (2 networks x 2 classes) of 2048 values: 64 registers a thread
        block = min(max(2048 // feature_block, 32), 512)
        return StatisticsTiles(block, pad, 16, feature_block, False, 4)
    feature_block = min(max(widest, 16), 64)
    block = 128 if pad * feature_block <= 512 else 64
    return StatisticsTiles(block, pad, max(pad, 16), feature_block, True, 4)


def weighting_tiles(classes: int, features: int, itemsize: int) -> WeightingTiles:
    """Tiles for features of ``itemsize`` bytes (the wider of the two networks' types)."""
    group = SECTOR // itemsize
    widest = power_of_two(max(features, 1))
    if classes <= 4:
        pad = power_of_two(classes)
        block = 1024 // pad
        return WeightingTiles(block // group, group, pad, min(widest, 8), False, 4)
    pad = max(power_of_two(classes), 16)
    block = max(2048 // pad, 32)
    return WeightingTiles(block // group, group, pad, min(max(widest, 16), 32), True, 4)


def gradient_tiles(classes: int) -> GradientTiles:
    """Tiles for C classes."""
    pad = power_of_two(classes)
    return GradientTiles(max(2048 // pad, 32), pad, 4)
