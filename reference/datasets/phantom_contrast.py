"""Generated scans whose contrast differs from case to case: a task in which unlabelled cases know what labelled ones do not.

The organ is known by two cues. In the first training cases its neighbours are dark and its own stripes are blurred: brightness
tells. Case by case the neighbours take up more contrast agent and the stripes get sharper; in the last cases the neighbours are
as bright as the organ, and the stripes tell. In between both cues agree. A recipe labels the first cases of the list: labels
show one end, the unlabelled and the test cases the whole range. Bones, brighter than any organ, keep a single threshold from
solving a case. Slices are thick: voxels are three times as long along the last axis.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

from rplib.errors import UserError
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.headers import check_size
from rplib.reference.datasets.phantom import (
    LEAST_SIZE,
    MOST_THRESHOLD_DICE,
    Phantoms,
    best_threshold_dice,
    body,
    smooth_noise,
    stripes,
    write_cases,
)

SIZE = (48, 48, 10)
_NEIGHBOURS = (0.1, 1.0)  # brightness in the first and in the last case; background 0, organ 1
_STRIPES = 0.6  # amplitude in the last case; 0 in the first
_BONE = 1.7
_THICKNESS = 3  # voxels of the first two axes per slice
_LEAST_SLICES = 4
_ATTEMPTS = 40


def contrast_case(name: str, size: tuple[int, int, int], seed: int, index: int, phase: float) -> Case:
    """One generated case; the same arguments give the same voxels.

    Args:
        size: (X, Y, Z) voxels, Z slices.
        phase: from 0, where only brightness tells the organ, to 1, where only its stripes do.

    Raises:
        UserError: no attempt hid the organ from a threshold.

    Example:
        >>> case = contrast_case("A", (48, 48, 10), seed=0, index=0, phase=0.5)
        >>> case.image.shape, int(case.label.max())
        ((48, 48, 10), 1)
    """
    random = np.random.default_rng([seed, index, len(size)])
    for _ in range(_ATTEMPTS):
        image, label = _draw(size, phase, random)
        if best_threshold_dice(image, label) < MOST_THRESHOLD_DICE:
            return Case(name, image, label)
    raise UserError(f"no phantom of size {size} hides its organ; choose axes of similar length, such as 48 48 10.")


def write_contrasts(dest: Path, cases: int, test_cases: int, size: tuple[int, int, int], seed: int) -> Phantoms:
    """Generate a data set in the Left Atrium layout; both lists go from phase 0 to 1 in even steps.

    Raises:
        UserError: the folder is not empty, or a number is too small.
    """
    if len(size) != 3 or min(size[:2]) < LEAST_SIZE or size[2] < _LEAST_SLICES:
        raise UserError(f"size is {size}; expected X and Y of at least {LEAST_SIZE} voxels and {_LEAST_SLICES} slices.")
    check_size(dest, list(size), 4, what="--size")

    def draw(name: str, index: int) -> Case:
        place, number = (index, cases) if index < cases else (index - cases, test_cases)
        return contrast_case(name, size, seed, index, place / max(1, number - 1))

    return write_cases(dest, cases, test_cases, seed, draw)


def _draw(size: tuple[int, int, int], phase: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    spacing = (1, 1, _THICKNESS)
    axes = [np.arange(n, dtype=np.float32) * step for n, step in zip(size, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z)
    scale, taken = float(min(size[:2])), np.zeros(size, bool)
    organ = body(grid, scale * random.uniform(0.2, 0.26), random, taken, margin=0.3)
    bones = [body(grid, scale * random.uniform(0.2, 0.24), random, taken) for _ in range(2)]
    neighbours = [body(grid, scale * random.uniform(0.15, 0.22), random, taken) for _ in range(4)]

    image = np.zeros(size, np.float32)
    image[organ] = (1 + _STRIPES * phase * stripes(grid[:2], random, (4.0, 5.5)))[organ]
    image[np.any(bones, axis=0)] = _BONE
    first, last = _NEIGHBOURS
    for neighbour in neighbours:
        image[neighbour] = (first + (last - first) * phase) * random.uniform(0.9, 1.1)

    def in_slices(sigma: float) -> tuple[float, ...]:
        return tuple(sigma / step for step in spacing)

    image = ndimage.gaussian_filter(image, in_slices(0.5)) + 0.1 * smooth_noise(size, in_slices(4.0), random)
    image *= 1 + 0.12 * smooth_noise(size, in_slices(scale / 3), random)
    image += 0.2 * random.standard_normal(size)
    image = (image - image.mean()) / image.std()
    return image.astype(np.float32), organ.astype(np.uint8)
