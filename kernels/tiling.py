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
    """Tiles of weighting_kernel: groups x group voxels, a group being one sector of features; unroll: the loops over
    classes and blocks of features."""

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


def statistics_tiles(classes: int, features: int, itemsize: int) -> StatisticsTiles:
    """Tiles for C classes and at most this many features per network (0: none are read) of ``itemsize`` bytes."""
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if classes <= 4:
        # Running sums of both networks: 2 tiles (pad, feature_block, block) of 4096 values, 64 registers a thread.
        feature_block = min(widest, 32)
        block = min(max(4096 // (pad * feature_block), 32), 512)
        return StatisticsTiles(block, pad, 16, feature_block, False, 4)
    # Sums by a product: (pad, feature_block) per network; operands go through shared memory, of which gfx942 has 64 KB.
    feature_block = min(max(widest, 16), 128)
    if feature_block <= 32:
        block, warps = (32, 4) if itemsize == 4 else (64, 8)  # 128-bit loads of either type, no spills
        return StatisticsTiles(block, pad, max(pad, 16), feature_block, True, warps)
    return StatisticsTiles(32 if feature_block == 64 else 16, pad, max(pad, 16), feature_block, True, 8)


def weighting_tiles(
    classes: int,
    features: int,
    itemsize: int,
    *,
    channels_last: bool,
    aligned: bool = True,
    plain: bool = True,
    dice: bool = False,
) -> WeightingTiles:
    """Tiles for features of ``itemsize`` bytes (the wider of the two networks' types).

    Args:
        channels_last: the features of a voxel lie side by side.
        aligned: every row of voxels begins at a multiple of 16 elements. Elsewhere (an odd number of voxels) a 128-bit load
            falls into four of 32 bits, each with an address in registers.
        plain: one stride leads through all voxels, and a record is written: the variant that trainings use.
        dice: the record of labelled samples carries the gradient of Dice too, which takes registers.
    """
    group = SECTOR // itemsize
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if classes > 4:
        # Prototypes are read once a block: small blocks would read them more often than features. Loops stay rolled.
        many = pad >= 32 or (pad == 16 and (channels_last or not aligned or not plain))
        block = {8: 128 if channels_last else 256, 16: 128, 32: 256, 64: 64}[pad]
        feature_block = 16
        if channels_last and pad < 32:
            feature_block = 32
        elif (pad == 32 and itemsize == 2 and not channels_last) or (pad == 16 and not plain):
            feature_block = 8  # 16 spill: the first on sm_100, the second in slices and with offsets of 64 bits
        return WeightingTiles(block // group, group, pad, min(widest, feature_block), False, 8 if many else 4)
    if channels_last:  # a sector or two of every voxel
        block = (512 if plain or itemsize == 4 else 256) // itemsize // pad
        return WeightingTiles(block // group, group, pad, min(widest, 8 if dice and itemsize == 2 else 16), True, 4)
    large = itemsize == 4 and aligned and plain
    block = 1024 if large else 512
    if (dice and not large) or (itemsize == 2 and not plain):
        block = 256
    return WeightingTiles(block // pad // group, group, pad, min(widest, 8), True, 4)


def gradient_tiles(classes: int, itemsize: int) -> GradientTiles:
    """Tiles for C classes and logits of ``itemsize`` bytes."""
    pad = power_of_two(classes)
    group = SECTOR // itemsize
    # C > 4: one 128-bit load a thread; larger tiles at C = 14 keep the compiler for gfx942 (triton 3.7.1) busy for minutes.
    block = 2048 // pad if classes <= 4 else max(512 // pad, 32)
    return GradientTiles(block // group, group, pad, 4)
