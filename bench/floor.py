"""Lower bound on the bytes per voxel that the mutual loss of two networks moves, forward and backward.

Every weight needs a prototype, and a prototype needs the features of all voxels, so two passes are needed.

    statistics               reads  2 (C + F) s    both networks' logits and features
    weights and gradients    reads  2 C s + F s    logits again, and the features of the one network that teaches
                             writes 2 C s          the gradients

with C classes, F feature channels and elements of s bytes. Partial sums are ignored: they do not grow with the number of voxels.
"""

# The upstream gradient is known only after the forward pass; a 4-byte record per voxel, written and read, connects the two.
RECORD_BYTES = 8


def floor_bytes(classes: int, features: int, itemsize: int) -> int:
    """Bytes per voxel, without the record.

    >>> floor_bytes(2, 16, 4), floor_bytes(4, 16, 4), floor_bytes(14, 32, 4)
    (240, 288, 720)
    """
    statistics = 2 * (classes + features) * itemsize
    weighting = (2 * classes + features) * itemsize
    gradients = 2 * classes * itemsize
    return statistics + weighting + gradients


def gradient_bytes(classes: int, itemsize: int) -> int:
    """Bytes per voxel of both networks' gradients: the minimum extra memory of any implementation.

    >>> gradient_bytes(2, 4) * 4014080 / 1e6  # the paper's shape, MB
    64.22528
    """
    return 2 * classes * itemsize
