"""One case in memory, and the interface of all data sets."""

from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from rplib.errors import UserError, printable, reading
from rplib.reference.files import name_mistake

MOST_CLASSES = 255  # background included: labels are uint8


class Case(NamedTuple):
    """One image in memory.

    Attributes:
        name: its name in the list.
        image: (*spatial) float32; with several channels (channels, *spatial).
        label: (*spatial) uint8 in 0..C-1, or None for an unlabelled case.
        affine: (4, 4) from voxel indices to millimetres (x to the right, y to the front, z upwards, as in NIfTI), or
            None if the files do not contain it.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray | None = None


def voxel_sizes(case: Case) -> tuple[float, ...] | None:
    """Edge lengths of a voxel in mm, one per axis of the image; None if the files do not contain them.

    >>> voxel_sizes(Case("a", np.zeros((4, 4)), np.zeros((4, 4)), np.diag([2.0, 0.5, 1.0, 1.0])))
    (2.0, 0.5)
    """
    if case.affine is None:
        return None
    axes = case.image.ndim if case.label is None else case.label.ndim
    return tuple(float(size) for size in np.linalg.norm(case.affine[:3, :3], axis=0)[:axes])


class Dataset(ABC):
    """Cases in a folder, and lists of their names.

    Args:
        root: folder of the data set.
        classes: C, background included; labels outside 0..C-1 are rejected.

    Raises:
        UserError: ``root`` is not a folder.
    """

    layout: ClassVar[str]
    expected: ClassVar[str]  # contents of the folder, for error messages
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    paper_split: ClassVar[str] = "test"  # the list that the published weights were selected on
    axes: ClassVar[tuple[str, ...]] = ("x", "y", "z")  # axis names of the arrays, for pictures

    def __init__(self, root: str | Path, classes: int = 2) -> None:
        self.root = Path(root)
        self.classes = classes
        if not self.root.is_dir():
            raise UserError(f"no data folder {self.root}; expected a folder with {self.expected}.")

    @abstractmethod
    def names(self, split: str) -> list[str]:
        """Case names of one of `splits`, in order.

        Raises:
            UserError: the list is missing, unreadable, empty, or contains a case twice.
        """

    @abstractmethod
    def list_name(self, split: str) -> str:
        """Name of the list in messages, such as `train.list`."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """The image file of a case (the first, if there are several)."""

    @abstractmethod
    def has_label(self, name: str) -> bool:
        """Whether the case has a label, without reading it."""

    @abstractmethod
    def load(self, name: str, needs_label: bool = False) -> Case:
        """Read one case; the label is None if the files have none.

        Raises:
            UserError: names the file and what is wrong with it.
        """

    def remarks(self) -> list[str]:
        """Remarks that are not errors, available once cases have been read (for `rplib data check`)."""
        return []


def read_list(path: Path) -> list[str]:
    """Read case names, one per line; empty lines, byte order marks and text after a comma are ignored.

    Raises:
        UserError: unreadable, empty, with duplicate names or invalid ones (``..``, separators, control characters, too long).
    """
    with reading(path, "list", "expected one case name per line, in UTF-8"):
        text = path.read_text(encoding="utf-8")  # universal newlines: CRLF and CR too
    names = [name for line in text.split("\n") if (name := line.replace("\ufeff", "").partition(",")[0].strip())]
    if not names:
        raise UserError(f"{path} is empty; expected one case name per line.")
    for name in names:
        if (expected := name_mistake(name)) is not None:
            raise UserError(f"{path} contains {printable(name)[:80]!r}, which is not a case name; expected {expected}.")
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise UserError(f"{path} lists {', '.join(twice[:3])} more than once; remove the duplicates.")
    return names


def checked_image(image: np.ndarray, path: Path, what: str = "'image'") -> np.ndarray:
    """The image as contiguous float32.

    Raises:
        UserError: not numeric, or with NaN or infinity.
    """
    if image.dtype.kind not in "fiu":
        raise UserError(f"{path}: {what} has type {image.dtype}; expected float32.")
    image = np.ascontiguousarray(image, dtype=np.float32)
    bad = int(image.size - np.count_nonzero(np.isfinite(image)))
    if bad:
        raise UserError(f"{path}: {what} contains {bad} NaN or infinite values; write the file again without them.")
    return image


def checked_label(label: np.ndarray, shape: tuple[int, ...], path: Path, classes: int, what: str = "'label'") -> np.ndarray:
    """The label as contiguous uint8.

    Raises:
        UserError: the shape differs from the image's, not numeric, or values outside 0..C-1.
    """
    if label.shape != shape:
        raise UserError(f"{path}: {what} has shape {label.shape} but 'image' has {shape}; expected equal shapes.")
    if label.dtype.kind not in "fiub":
        raise UserError(f"{path}: {what} has type {label.dtype}; expected uint8.")
    label = label.astype(np.uint8) if label.dtype == bool else label
    whole = np.isfinite(label) & (label == np.floor(label)) if label.dtype.kind == "f" else True
    outside = ~((label >= 0) & (label < classes) & whole)
    if outside.any():
        example = label[outside][0]
        raise UserError(
            f"{path}: {what} has {int(outside.sum())} voxels outside the classes 0..{classes - 1} "
            f"(the first is {example}); relabel them or set classes."
        )
    return np.ascontiguousarray(label, dtype=np.uint8)
