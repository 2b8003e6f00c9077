"""Data sets on disk, in the layouts that people have.

`open_dataset(folder)` gives an object with `names("train")`, `names("test")`, `path(name)` and `load(name)`. A further
layout is one more class with these four and one more line in `LAYOUTS`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

from rplib.errors import UserError


class Case(NamedTuple):
    """One volume in memory.

    Attributes:
        name: its name in the list.
        image: (X, Y, Z) float32.
        label: (X, Y, Z) uint8 in 0..C-1, or None for an unlabelled case.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None


class LeftAtrium:
    """The Left Atrium set as UA-MT published it (80 training cases, 20 test cases).

        DIR/train.list, DIR/test.list              one case name a line; may also lie inside the folder below
        DIR/2018LA_Seg_Training Set/<name>/mri_norm2.h5
            image  float32 (X, Y, Z), z-scored
            label  uint8 (X, Y, Z), 0 background, 1 left atrial cavity; unlabelled cases need none

    Args:
        root: DIR.
        classes: C; a label outside 0..C-1 is refused.

    Raises:
        UserError: ``root`` is no folder.
    """

    layout = "left-atrium"
    cases_folder = "2018LA_Seg_Training Set"
    file_name = "mri_norm2.h5"

    def __init__(self, root: str | Path, classes: int = 2) -> None:
        self.root = Path(root)
        self.classes = classes
        if not self.root.is_dir():
            raise UserError(
                f"no data folder {self.root}; expected a folder with train.list, test.list and "
                f"'{self.cases_folder}/' (`rplib data phantom {self.root}` writes a generated one)."
            )

    def names(self, split: str) -> list[str]:
        """Case names of the ``"train"`` or ``"test"`` list, in the order of the file.

        Raises:
            UserError: the list is missing, unreadable, empty, or names a case twice.
        """
        candidates = [self.root / f"{split}.list", self.root / self.cases_folder / f"{split}.list"]
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            raise UserError(f"no {split}.list in {self.root} or in its folder '{self.cases_folder}'.")
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not readable as text ({error}); expected one case name a line.") from error
        if not names:
            raise UserError(f"{path} is empty; expected one case name a line.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path} names {', '.join(twice[:3])} more than once; remove the repetition.")
        return names

    def path(self, name: str) -> Path:
        return self.root / self.cases_folder / name / self.file_name

    def load(self, name: str, needs_label: bool = False) -> Case:
        """Read one case whole; a label that the file lacks is None.

        Raises:
            UserError: names the file and what is wrong with it.
        """
        return read_h5_case(self.path(name), name, self.classes, needs_label)


LAYOUTS = {LeftAtrium.layout: LeftAtrium}


def open_dataset(root: str | Path, layout: str = LeftAtrium.layout, classes: int = 2) -> LeftAtrium:
    """The data set in a folder, by the name of its layout.

    Raises:
        UserError: unknown layout, or no such folder.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown data layout {layout!r}; expected one of: {', '.join(LAYOUTS)}.")
    return LAYOUTS[layout](root, classes)


def load_cases(dataset: LeftAtrium, names: Sequence[str], needs_label: bool, what: str = "cases") -> list[Case]:
    """Read cases once into memory, with a progress bar on stderr."""
    with tqdm(names, desc=f"reading {what}", unit="case", leave=False, disable=not names) as shown:
        return [dataset.load(name, needs_label) for name in shown]


def read_h5_case(path: Path, name: str, classes: int, needs_label: bool) -> Case:
    """One case from an h5 file with the keys `image` and (optional) `label`, checked.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"case {name} has no file {path}; take its name out of the list or add the file.")
    try:
        with h5py.File(path, "r") as file:
            arrays = {key: file[key][()] for key in ("image", "label") if isinstance(file.get(key), h5py.Dataset)}
            keys = ", ".join(file) or "none"
    except (OSError, RuntimeError, KeyError) as error:  # h5py raises these for truncated and damaged files
        raise UserError(f"{path} is not a readable h5 file ({error}); copy it again from its source.") from error
    if "image" not in arrays:
        raise UserError(f"{path} lacks the key 'image' (keys found: {keys}); expected 'image' and, if labelled, 'label'.")
    if needs_label and "label" not in arrays:
        raise UserError(f"{path} lacks the key 'label' (keys found: {keys}) but is used as a labelled case.")
    image = _checked_image(np.asarray(arrays["image"]), path)
    label = _checked_label(np.asarray(arrays["label"]), image.shape, path, classes) if "label" in arrays else None
    return Case(name, image, label)


def _checked_image(image: np.ndarray, path: Path) -> np.ndarray:
    if image.ndim != 3 or image.size == 0:
        raise UserError(f"{path}: 'image' has shape {image.shape}; expected three axes (X, Y, Z).")
    if image.dtype.kind not in "fiu":
        raise UserError(f"{path}: 'image' is of type {image.dtype}; expected float32.")
    image = np.ascontiguousarray(image, dtype=np.float32)
    bad = int(image.size - np.count_nonzero(np.isfinite(image)))
    if bad:
        raise UserError(f"{path}: 'image' holds {bad} values that are NaN or infinite; write the file again without them.")
    return image


def _checked_label(label: np.ndarray, shape: tuple[int, ...], path: Path, classes: int) -> np.ndarray:
    if label.shape != shape:
        raise UserError(f"{path}: 'label' has shape {label.shape} and 'image' has {shape}; expected the same.")
    if label.dtype.kind not in "fiub":
        raise UserError(f"{path}: 'label' is of type {label.dtype}; expected uint8.")
    label = label.astype(np.uint8) if label.dtype == bool else label
    whole = np.isfinite(label) & (label == np.floor(label)) if label.dtype.kind == "f" else True
    outside = ~((label >= 0) & (label < classes) & whole)
    if outside.any():
        example = label[outside][0]
        raise UserError(
            f"{path}: 'label' holds {int(outside.sum())} voxels outside the classes 0..{classes - 1} "
            f"(the first is {example}); relabel them or set classes."
        )
    return np.ascontiguousarray(label, dtype=np.uint8)
