"""Block sizes: plain arithmetic on the shapes and the GPU, so nothing is tuned during a training.

``architecture`` is ten times the compute capability. The tiles are those of 90; where the compiler for 80 (8.0 to 8.9) or for 100
and later needs more registers than a thread has, they are smaller there (BLACKWELL, AMPERE).

The figures behind the choices (registers, spills, widths of loads per target) come from
``python -m rplib.bench.ahead_of_time``.
"""

from typing import NamedTuple

SECTOR = 32  # bytes: the smallest transfer of a GPU's memory
BLACKWELL = 100  # this and later
AMPERE = range(80, 90)
RECORD_ALIGNMENT = 32  # the record's rows are padded to a multiple of this many float32 values


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> [power_of_two(n) for n in (1, 2, 3, 16, 17)]
    [1, 2, 4, 16, 32]
    """
    return 1 << (n - 1).bit_length()


class StatisticsTiles(NamedTuple):
    """Tiles of statistics_kernel.

    dot: sums per class by products with one-hot labels; else block // vector rows of vector voxels. in_registers: those products
    on the tensor cores, see statistics.py. voxel_groups, feature_groups: of warps, with in_registers.
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
    in_registers: bool = False


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
    classes: int,
    features: int,
    itemsize: int,
    *,
    channels_last: bool = False,
    aligned: bool = True,
    plain: bool = True,
    dice: bool = False,
    architecture: int = 90,
) -> StatisticsTiles:
    """Tiles for C classes and at most this many features per network (0: none are read) of ``itemsize`` bytes.

    Args:
        channels_last: the features of a voxel lie side by side.
        aligned: every row of voxels begins at a multiple of 16 elements.
        plain: one stride leads through all voxels of all tensors, in 32 bits; else addresses take registers.
        dice: the sums of Dice are kept as well, which takes registers.
    """
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if classes <= 4:
        # A thread keeps one number per class and feature of its row: at most 128 for both networks (channels last without Dice
        # 256), or the features of a row are shared by two warps or more.
        feature_block = min(widest, 32)
        most = 256 if channels_last and plain and not dice else 128
        rows = min(max(most * 32 // (pad * feature_block), 32), 128)
        vector = 1
        if aligned and not channels_last:
            vector = 4 if classes == 2 else 16 // itemsize
            rows = 128 if pad * feature_block <= 32 else 64 if pad * feature_block <= 64 else 32
            rows = max(rows // 2, 32) if dice or not plain or architecture >= BLACKWELL else rows
        return StatisticsTiles(rows * vector, pad, 16, feature_block, False, 4, vector)
    feature_block = min(max(widest, 16), 128)
    classes_dot = max(pad, 16)
    if classes_dot > 16 or feature_block > 32:
        # Through shared memory, of which gfx942 has 64 KB: in registers (32, 256) spills 93 and takes minutes to compile.
        if feature_block <= 32:
            block, warps = (32, 4) if itemsize == 4 or dice or channels_last else (64, 8)  # as large as registers allow
            block = 16 if dice and itemsize == 4 else block
        else:
            block, warps = 32 if feature_block == 64 else 16, 8
        return StatisticsTiles(block, pad, classes_dot, feature_block, True, warps, 1)
    # In registers: a thread keeps 16 x feature_block / (32 x feature_groups) numbers per network.
    feature_groups = min(max(classes_dot * feature_block // (256 if dice else 1024), 1), feature_block // 16)
    run = 16 if dice else 32  # voxels of a product
    vector = min(16 // itemsize, run // 4)
    if channels_last:
        vector = 2 if itemsize == 4 or architecture >= BLACKWELL else min(vector, feature_block // feature_groups // 8)
    elif not aligned:
        vector = 1
    elif dice and itemsize == 4 and architecture >= BLACKWELL:
        vector = 2
    warps = 4
    voxel_groups = warps // feature_groups
    return StatisticsTiles(
        run * voxel_groups, pad, classes_dot, feature_block, True, warps, vector, voxel_groups, feature_groups, True
    )  # fmt: skip


def weighting_tiles(
    classes: int,
    features: int,
    itemsize: int,
    *,
    channels_last: bool = False,
    aligned: bool = True,
    plain: bool = True,
    detailed: bool = False,
    masked: bool = False,
    architecture: int = 90,
) -> WeightingTiles:
    """Tiles for features of ``itemsize`` bytes (the wider of the two networks' types).

    Args:
        channels_last: the features of a voxel lie side by side.
        aligned: every row of voxels begins at a multiple of 16 elements.
        plain: one stride leads through all voxels of all tensors, in 32 bits, and a record is written: what trainings use. Else
            addresses and results take registers.
        detailed: the sums of the weights are kept as well.
        masked: some voxels do not count.
    """
    group = SECTOR // itemsize
    pad = power_of_two(classes)
    widest = power_of_two(max(features, 1))
    if channels_last or classes > 4:
        # One voxel a thread, and 16 bytes of its features or of its teacher's prototypes a load: a thread holds whole products.
        feature_block = 16 // itemsize if channels_last else 4 if classes <= 16 else 8
        return WeightingTiles(128 // group, group, pad, min(widest, feature_block), classes <= 4, 4)
    block = 2048 // itemsize if aligned else 256  # 16 bytes a thread: the features of a block lie in no other thread's registers
    half = itemsize == 2
    tight = classes > 2 and (detailed or architecture in AMPERE or (half and masked))
    if half and aligned and (tight or not plain):
        block //= 2
    feature_block = 4 if tight and not (half and aligned) else 8
    return WeightingTiles(block // group, group, pad, min(widest, feature_block), False, 4)


def gradient_tiles(
    classes: int,
    itemsize: int,
    *,
    aligned: bool = True,
    channels_last: bool = False,
    dice: bool = False,
    architecture: int = 90,
) -> GradientTiles:
    """Tiles for C classes and logits of ``itemsize`` bytes.

    Many classes with Dice or channels last: one voxel a thread, whose logits of both networks fill the registers.
    """
    pad = power_of_two(classes)
    group = SECTOR // itemsize
    block = 1024 if classes == 2 else 128 if classes > 4 and (dice or channels_last) else 512
    if architecture in AMPERE and channels_last and dice and classes > 2:
        block = min(block, 256)
    return GradientTiles(block // group, group, pad, 4)
