"""Generated volumes with an organ that cannot be segmented by intensity.

A case shows bright bodies on a darker, noisy background under a smooth bias field. One of them is the organ: a body with
two veins and fine internal stripes of random direction. The others (distractors) have the same shape and brightness, but a
coarse mottled texture, and some dark bodies have the organ's stripes. Neither intensity nor texture alone identifies the
organ, only both together; strength and direction vary between cases.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from scipy import ndimage

from rplib.errors import UserError
from rplib.reference.datasets.headers import check_size
from rplib.reference.datasets.layouts import Case, LeftAtrium
from rplib.reference.files import is_empty, output_folder, write_atomically, write_text_atomically
from rplib.reference.progress import progress

MOST_THRESHOLD_DICE = 0.6  # upper bound for any single threshold on any case
LEAST_SIZE = 32  # voxels per axis
_ATTEMPTS = 40


class Phantoms(NamedTuple):
    """Result of `write_phantoms`: case names, and the best single-threshold Dice on the easiest case."""

    train: list[str]
    test: list[str]
    threshold_dice: float


def best_threshold_dice(image: np.ndarray, label: np.ndarray) -> float:
    """The highest Dice of `image >= t` or `image <= t` over all thresholds t.

    Args:
        image: any shape.
        label: the same shape; non-zero is the organ, at least one voxel.

    Example:
        >>> best_threshold_dice(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1, 1, 0, 0]))
        1.0
    """
    values, organ = np.ravel(image), np.ravel(label) > 0
    order = np.argsort(values, kind="stable")
    best = 0.0
    for ranked in (order, order[::-1]):
        hits = np.cumsum(organ[ranked])
        dice = 2 * hits / (np.arange(1, hits.size + 1) + hits[-1])
        ends = np.append(np.diff(values[ranked]) != 0, True)  # equal values fall on the same side of every threshold
        best = max(best, float(dice[ends].max()))
    return best


def phantom_case(name: str, size: tuple[int, int, int], seed: int, index: int) -> Case:
    """Generate one case; equal arguments give equal voxels.

    Args:
        size: (X, Y, Z) voxels; the first two vary by up to a quarter between cases, like patients.

    Raises:
        UserError: the organ could not be hidden well enough (axes of very different length).
    """
    random = np.random.default_rng([seed, index])
    return hidden_from_a_threshold(name, size, lambda: _draw(size, random), "48 48 40")


def hidden_from_a_threshold(
    name: str, size: tuple[int, ...], draw: Callable[[], tuple[np.ndarray, np.ndarray]], example: str
) -> Case:
    """The first drawing whose organ no threshold finds.

    Raises:
        UserError: no attempt gave one; the message suggests the size ``example``.
    """
    for _ in range(_ATTEMPTS):
        image, label = draw()
        if best_threshold_dice(image, label) < MOST_THRESHOLD_DICE:
            return Case(name, image, label)
    raise UserError(f"no phantom of size {size} hides its organ; choose axes of similar length, such as {example}.")


def write_phantoms(dest: Path, cases: int, test_cases: int, size: tuple[int, int, int], seed: int) -> Phantoms:
    """Generate a data set in the layout of the Left Atrium data (`LeftAtrium`).

    Args:
        cases: number in train.list.
        test_cases: number in test.list.

    Raises:
        UserError: the folder is not empty, or a number is too small.
    """
    check_new(dest, cases, test_cases)
    if min(size) < LEAST_SIZE:
        raise UserError(f"size is {size}; expected at least {LEAST_SIZE} voxels per axis.")
    check_size(dest, [size[0] * 5 // 4, size[1] * 5 // 4, size[2]], 4, what="--size")
    return write_cases(dest, cases, test_cases, seed, lambda name, index: phantom_case(name, size, seed, index))


def write_cases(dest: Path, cases: int, test_cases: int, seed: int, draw: Callable[[str, int], Case]) -> Phantoms:
    """Write generated cases in the Left Atrium layout; what was written is removed if it fails.

    Args:
        draw: called with the name and the index of a case, test cases last.

    Raises:
        UserError: the folder is not empty, or a number is too small.
    """
    check_new(dest, cases, test_cases)
    names = [_name(seed, index) for index in range(cases + test_cases)]
    made: list[Path] = []
    with output_folder(dest, f"DEST {dest}"):
        try:
            easiest = _write(dest, names, cases, draw, made)
        except BaseException:  # remove an incomplete set, so that the command can be run again
            for path in made:
                path.unlink(missing_ok=True)
                if path.parent != dest:
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
            with contextlib.suppress(OSError):
                (dest / LeftAtrium.cases_folder).rmdir()
            raise
    return Phantoms(names[:cases], names[cases:], easiest)


def _write(dest: Path, names: list[str], cases: int, draw: Callable[[str, int], Case], made: list[Path]) -> float:
    """Draw and write all cases and the lists, and return the best Dice of a threshold. Every path is first added to `made`."""
    easiest = 0.0
    for index, name in enumerate(progress(names, "generating phantoms")):
        case = draw(name, index)
        assert case.label is not None
        dice = best_threshold_dice(case.image, case.label)
        assert dice < MOST_THRESHOLD_DICE, f"{name}: a threshold finds the organ with Dice {dice:.2f}"
        easiest = max(easiest, dice)
        path = dest / LeftAtrium.cases_folder / name / LeftAtrium.file_name
        made.append(path)
        path.parent.mkdir(parents=True)
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            file.create_dataset("image", data=case.image, compression="gzip", compression_opts=1)
            file.create_dataset("label", data=case.label, compression="gzip", compression_opts=1)
        write_atomically(path, lambda target, content=content: target.write(content.getbuffer()))  # type: ignore[misc]
    # The lists are written last, so that an interrupted folder is not mistaken for a data set.
    for split, listed in (("test", names[cases:]), ("train", names[:cases])):
        made.append(dest / f"{split}.list")
        write_text_atomically(made[-1], "".join(f"{name}\n" for name in listed))
    return easiest


def check_new(dest: Path, cases: int, test_cases: int) -> None:
    """Reject a folder that is not empty, and sets without a case.

    Raises:
        UserError: in either case.
    """
    if dest.exists() and (not dest.is_dir() or not is_empty(dest)):
        raise UserError(f"{dest} exists and is not an empty folder; choose another DEST or empty it.")
    if cases < 1 or test_cases < 1:
        raise UserError(f"{cases} training and {test_cases} test cases requested; expected at least 1 each.")


def _name(seed: int, index: int) -> str:
    """20 characters, like the real case names."""
    letters = np.random.default_rng([seed, index, 1]).choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), 10)
    return f"PHANTOM{index % 1000:03d}{''.join(letters)}"


def _draw(size: tuple[int, int, int], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = (
        size[0] + int(random.integers(size[0] // 4 + 1)),
        size[1] + int(random.integers(size[1] // 4 + 1)),
        size[2],
    )
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))  # (3, X, Y, Z)
    scale = float(min(shape))
    taken = np.zeros(shape, bool)

    organ = body(grid, scale * random.uniform(0.2, 0.25), random, taken, margin=0.25)
    bright = [body(grid, scale * random.uniform(0.18, 0.25), random, taken) for _ in range(4)]
    dark = [body(grid, scale * random.uniform(0.15, 0.2), random, taken) for _ in range(2)]

    contrast = random.uniform(0.9, 1.3)
    strength = random.uniform(0.4, 0.6)
    fine = strength * np.sqrt(2.0) * stripes(grid, random)
    mottle = strength * smooth_noise(shape, 3.0, random)
    bodies = np.any([organ, *bright], axis=0)
    striped = np.any([organ, *dark], axis=0)
    image = contrast * bodies + np.where(striped, fine, 0) + np.where(np.any(bright, axis=0) & ~organ, mottle, 0)
    image = ndimage.gaussian_filter(image, 0.5) + 0.2 * smooth_noise(shape, 4.0, random)
    image *= 1 + 0.25 * smooth_noise(shape, scale / 4, random)
    image += 0.2 * random.standard_normal(shape)
    image = (image - image.mean()) / image.std()
    return image.astype(np.float32), organ.astype(np.uint8)


def body(grid: np.ndarray, radius: float, random: np.random.Generator, taken: np.ndarray, margin: float = 0.1) -> np.ndarray:
    """An ellipsoid with two veins, in a free place if one is found; marks it in `taken`."""
    dims = len(grid)
    shape = grid.reshape(dims, -1)[:, -1] + 1  # in the units of the grid
    for _ in range(30):
        centre = shape * random.uniform(margin, 1 - margin, dims)
        axes = radius * random.uniform(0.75, 1.25, dims)
        mask = sum(((grid[a] - centre[a]) / axes[a]) ** 2 for a in range(dims)) < 1
        for _ in range(2):
            direction = random.standard_normal(dims)
            direction /= np.linalg.norm(direction)
            offset = grid - centre.reshape(dims, *[1] * dims)
            along = np.tensordot(direction, offset, 1)
            across = (offset**2).sum(0) - along**2
            mask |= (across < (0.3 * radius) ** 2) & (along > 0) & (along < 1.7 * radius)
        if not (mask & taken).any():
            break
    mask &= ~taken
    taken |= mask
    return mask


def stripes(grid: np.ndarray, random: np.random.Generator, periods: tuple[float, float] = (3.5, 5.0)) -> np.ndarray:
    direction = random.standard_normal(len(grid))
    direction /= np.linalg.norm(direction)
    period = random.uniform(*periods)
    return np.sin(2 * np.pi / period * np.tensordot(direction, grid, 1) + random.uniform(0, 2 * np.pi))


def smooth_noise(shape: tuple[int, ...], sigma: float | tuple[float, ...], random: np.random.Generator) -> np.ndarray:
    """Noise with standard deviation 1 and a correlation length of `sigma` voxels (of each axis)."""
    noise = ndimage.gaussian_filter(random.standard_normal(shape).astype(np.float32), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()
