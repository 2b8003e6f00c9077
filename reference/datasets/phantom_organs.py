"""Generated images of several organs, 3-D or 2-D, that differ in texture and size but not in brightness."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from rplib.errors import UserError
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.nifti_writing import diagonal_affine, write_nifti
from rplib.reference.datasets.phantom import (
    LEAST_SIZE,
    MOST_THRESHOLD_DICE,
    Phantoms,
    best_threshold_dice,
    body,
    check_new,
    smooth_noise,
    stripes,
)
from rplib.reference.progress import progress

MOST_ORGAN_CLASSES = 5
_ATTEMPTS = 40
# By class: radius as a share of the shortest axis, and range of the stripes' period in voxels (0: crossed; None: smooth).
_ORGANS = ((0.20, (3.5, 5.0)), (0.17, (8.0, 11.0)), (0.14, None), (0.12, 0.0))


def organs_case(name: str, size: tuple[int, ...], classes: int, seed: int, index: int) -> Case:
    """One generated case with one body of each class; the same arguments give the same voxels.

    Args:
        size: (X, Y, Z) or (X, Y) voxels; the first two vary by up to a quarter between cases.
        classes: number of classes, background included.

    Raises:
        UserError: an invalid number, or no attempt hid every organ from a threshold.
    """
    if not 3 <= classes <= MOST_ORGAN_CLASSES:
        raise UserError(f"classes is {classes}; expected 3 to {MOST_ORGAN_CLASSES} for several organs, 2 for one.")
    if len(size) not in (2, 3) or min(size) < LEAST_SIZE:
        raise UserError(f"size is {size}; expected two or three axes of at least {LEAST_SIZE} voxels.")
    random = np.random.default_rng([seed, index, classes, len(size)])
    for _ in range(_ATTEMPTS):
        image, label = _draw(size, classes, random)
        organs = [label == k for k in range(1, classes)]
        if all(organ.sum() >= 8 and best_threshold_dice(image, organ) < MOST_THRESHOLD_DICE for organ in organs):
            return Case(name, image, label)
    raise UserError(f"no phantom of size {size} hides its {classes - 1} organs; choose larger axes of similar length.")


def write_organs(dest: Path, cases: int, test_cases: int, size: tuple[int, ...], classes: int, seed: int) -> Phantoms:
    """Write a generated data set as a folder of NIfTI files, the layout of the recipe `generic`.

    Args:
        cases, test_cases: number in train.list and in test.list.

    Raises:
        UserError: the folder is not empty, or a number is invalid.
    """
    check_new(dest, cases, test_cases)
    names = [f"organs{index:03d}" for index in range(cases + test_cases)]
    easiest = 0.0
    for index, name in enumerate(progress(names, "generating phantoms")):
        case = organs_case(name, size, classes, seed, index)
        assert case.label is not None
        easiest = max(easiest, *(best_threshold_dice(case.image, case.label == k) for k in range(1, classes)))
        for folder, volume in (("images", case.image), ("labels", case.label)):
            (dest / folder).mkdir(parents=True, exist_ok=True)
            write_nifti(dest / folder / f"{name}.nii.gz", volume, diagonal_affine(None))
    (dest / "test.list").write_text("".join(f"{name}\n" for name in names[cases:]))
    (dest / "train.list").write_text("".join(f"{name}\n" for name in names[:cases]))
    return Phantoms(names[:cases], names[cases:], easiest)


def _draw(size: tuple[int, ...], classes: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(n + int(random.integers(n // 4 + 1)) if axis < 2 else n for axis, n in enumerate(size))
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))  # (dims, *shape)
    scale, taken = float(min(shape)), np.zeros(shape, bool)
    image, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    contrast, strength = random.uniform(0.9, 1.3), random.uniform(0.4, 0.6)

    for k, (radius, period) in enumerate(_ORGANS[: classes - 1], start=1):
        organ = body(grid, scale * radius * random.uniform(0.9, 1.1), random, taken, margin=0.2)
        label[organ] = k
        texture = np.zeros(shape)
        if isinstance(period, tuple):
            texture = np.sqrt(2.0) * stripes(grid, random, period)
        elif period is not None:
            texture = 2.0 * stripes(grid, random, (3.5, 5.0)) * stripes(grid, random, (3.5, 5.0))
        image[organ] = contrast + strength * texture[organ]
    for _ in range(2):  # as bright as the organs, but mottled
        other = body(grid, scale * random.uniform(0.12, 0.18), random, taken)
        image[other] = contrast + strength * smooth_noise(shape, 3.0, random)[other]
    dark = body(grid, scale * random.uniform(0.12, 0.16), random, taken)  # with the first organ's texture
    image[dark] = strength * np.sqrt(2.0) * stripes(grid, random, (3.5, 5.0))[dark]

    image = ndimage.gaussian_filter(image, 0.5) + 0.2 * smooth_noise(shape, 4.0, random)
    image *= 1 + 0.25 * smooth_noise(shape, scale / 4, random)
    image += 0.2 * random.standard_normal(shape)
    image = (image - image.mean()) / image.std()
    return image.astype(np.float32), label
