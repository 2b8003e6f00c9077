"""Generated scans whose appearance differs much from case to case: a few labelled ones do not show all of it.

Contrast, noise, sharpness, bias field and the texture of the background are drawn for every case, from a clean scan of a bright
organ to one in which noise and texture are almost as strong as its contrast. The organ is near the middle; around it are bodies
of any brightness, darker than the background or brighter than the organ, so that no threshold finds it. Slices are thick: voxels
are three times as long along the last axis.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

from rplib.errors import UserError
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.headers import check_size
from rplib.reference.datasets.phantom import (
    LEAST_SIZE,
    Phantoms,
    body,
    hidden_from_a_threshold,
    smooth_noise,
    write_cases,
)

SIZE = (32, 32, 6)
_THICKNESS = 3  # voxels of the first two axes per slice
_LEAST_SLICES = 4


def varied_case(name: str, size: tuple[int, int, int], seed: int, index: int) -> Case:
    """One generated case; the same arguments give the same voxels.

    Args:
        size: (X, Y, Z) voxels, Z slices.

    Raises:
        UserError: no attempt hid the organ from a threshold.

    Example:
        >>> case = varied_case("A", (32, 32, 6), seed=0, index=0)
        >>> case.image.shape, int(case.label.max())
        ((32, 32, 6), 1)
    """
    random = np.random.default_rng([seed, index, len(size)])
    return hidden_from_a_threshold(name, size, lambda: _draw(size, random), "32 32 6")


def write_varieties(dest: Path, cases: int, test_cases: int, size: tuple[int, int, int], seed: int) -> Phantoms:
    """Generate a data set in the Left Atrium layout.

    Raises:
        UserError: the folder is not empty, or a number is too small.
    """
    if len(size) != 3 or min(size[:2]) < LEAST_SIZE or size[2] < _LEAST_SLICES:
        raise UserError(f"size is {size}; expected X and Y of at least {LEAST_SIZE} voxels and {_LEAST_SLICES} slices.")
    check_size(dest, list(size), 4, what="--size")
    return write_cases(dest, cases, test_cases, seed, lambda name, index: varied_case(name, size, seed, index))


def _draw(size: tuple[int, int, int], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    spacing = (1, 1, _THICKNESS)
    axes = [np.arange(n, dtype=np.float32) * step for n, step in zip(size, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z)
    scale, taken = float(min(size[:2])), np.zeros(size, bool)

    def smooth(length: float) -> np.ndarray:
        return smooth_noise(size, tuple(length / step for step in spacing), random)

    organ = body(grid, scale * random.uniform(0.2, 0.28), random, taken, margin=0.38)
    others = [body(grid, scale * random.uniform(0.12, 0.22), random, taken) for _ in range(4)]
    image = random.uniform(0.05, 0.9) * smooth(3.0)
    image[organ] = random.uniform(0.7, 1.5)
    for other in others:
        image[other] = random.uniform(-0.6, 1.6)
    sharpness = random.uniform(0.4, 1.0)
    image = ndimage.gaussian_filter(image, tuple(sharpness / step for step in spacing))
    image *= 1 + random.uniform(0.05, 0.3) * smooth(scale / 3)
    image += random.uniform(0.1, 0.6) * random.standard_normal(size)
    image = (image - image.mean()) / image.std()
    return image.astype(np.float32), organ.astype(np.uint8)
