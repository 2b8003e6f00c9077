"""The three published data sets in their usual form: one h5 file per case, keys `image` and (optional) `label`."""

from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

from rplib.errors import UserError, printable, reading
from rplib.reference.datasets.cases import Case, Dataset, checked_image, checked_label, read_list
from rplib.reference.datasets.headers import check_size, checked_affine

AFFINE = "affine"  # attribute written by `rplib data left-atrium|pancreas|brats`


class H5Dataset(Dataset):
    """Common base; each subclass defines where its files are."""

    cases_folder: ClassVar[str]
    list_suffix: ClassVar[str] = ".list"

    def list_name(self, split: str) -> str:
        return f"{split}{self.list_suffix}"

    def names(self, split: str) -> list[str]:
        file = self.list_name(split)
        path = next((p for p in (self.root / file, self.root / self.cases_folder / file) if p.is_file()), None)
        if path is None:
            raise UserError(f"no {file} in {self.root} or in its folder '{self.cases_folder}'.")
        return read_list(path)

    def has_label(self, name: str) -> bool:
        try:
            with h5py.File(self.path(name), "r") as file:
                return "label" in file
        except Exception:  # a damaged file fails in many ways; `load` reports the error
            return False

    def load(self, name: str, needs_label: bool = False) -> Case:
        path = self.path(name)
        if not path.is_file():
            raise UserError(f"case {name} has no file {path}; remove its name from the list or add the file.")
        arrays, affine, keys = read_h5(path)
        if needs_label and "label" not in arrays:
            raise UserError(f"{path} lacks the key 'label' (keys found: {keys}) but is used as a labelled case.")
        image = arrays["image"]
        if image.ndim != 3 or image.size == 0:
            raise UserError(f"{path}: 'image' has shape {image.shape}; expected three axes ({', '.join(self.axes)}).")
        image = checked_image(image, path)
        label = None
        if "label" in arrays:
            label = checked_label(self._classes_of(arrays["label"]), image.shape, path, self.classes)
        return Case(name, image, label, affine)

    def _classes_of(self, label: np.ndarray) -> np.ndarray:
        """Map the values in the file to the training classes."""
        return label


def read_h5(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None, str]:
    """Read `image` and, if present, `label`; the affine or None; and the names of all keys, for messages.

    Raises:
        UserError: unreadable, or without an image.
    """
    with reading(path, "h5 file"), h5py.File(path, "r") as file:
        # Check all headers first: nothing is allocated for a file that is rejected.
        found = {key: file[key] for key in ("image", "label") if isinstance(file.get(key), h5py.Dataset)}
        for key, dataset in found.items():
            _check_header(dataset, path, key)
        keys = ", ".join(map(printable, file)) or "none"
        affine = checked_affine(file.attrs[AFFINE], path, f"the attribute {AFFINE!r}") if AFFINE in file.attrs else None
        arrays = {key: np.asarray(dataset[()]) for key, dataset in found.items()}
    if "image" not in arrays:
        raise UserError(f"{path} lacks the key 'image' (keys found: {keys}); expected 'image' and, if labelled, 'label'.")
    return arrays, affine, keys


def _check_header(dataset: h5py.Dataset, path: Path, key: str) -> None:
    """Check type and size, without reading the values."""
    if dataset.shape is None or dataset.dtype.kind not in "fiub":
        expected = "float32" if key == "image" else "uint8"
        raise UserError(f"{path}: {key!r} has type {dataset.dtype}; expected {expected}.")
    # A file may lack chunks that were never written. Without any stored value, it was never written at all.
    plain = dataset.chunks is None and not dataset.is_virtual and dataset.external is None
    stored = dataset.id.get_storage_size()
    known = stored if plain or (stored == 0 and not dataset.is_virtual and dataset.external is None) else None
    check_size(path, dataset.shape, dataset.dtype.itemsize, known, what=repr(key))


class LeftAtrium(H5Dataset):
    """The Left Atrium set as UA-MT published it (80 training cases, 20 test cases).

    DIR/train.list, DIR/test.list              one case name per line; may also be inside the folder below
    DIR/2018LA_Seg_Training Set/<name>/mri_norm2.h5
        image  float32 (X, Y, Z), z-scored
        label  uint8 (X, Y, Z), 0 background, 1 left atrial cavity; optional for unlabelled cases
    """

    layout = "left-atrium"
    cases_folder = "2018LA_Seg_Training Set"
    file_name = "mri_norm2.h5"
    expected = (
        f"train.list, test.list and '{cases_folder}/' (`rplib data phantom` generates a set in this layout, "
        "`rplib data left-atrium` converts the raw release)"
    )

    def path(self, name: str) -> Path:
        return self.root / self.cases_folder / name / self.file_name


class Pancreas(H5Dataset):
    """Pancreas-CT as commonly used in the semi-supervised literature (62 training cases, 20 test cases).

    DIR/train.list, DIR/test.list              one case name per line, such as image0001
    DIR/Pancreas_h5/<name>_norm.h5
        image  float32 (X, Y, Z), 1 mm voxels, windowed and z-scored
        label  float32 (X, Y, Z), 0 background, 1 pancreas; optional for unlabelled cases
    """

    layout = "pancreas"
    cases_folder = "Pancreas_h5"
    expected = f"train.list, test.list and '{cases_folder}/' (`rplib data pancreas` converts the raw release)"

    def path(self, name: str) -> Path:
        return self.root / self.cases_folder / f"{name}_norm.h5"


class Brats(H5Dataset):
    """BraTS-2019, FLAIR only (250 training cases, 25 for validation, 60 test cases).

        DIR/train.txt, DIR/val.txt, DIR/test.txt   one case name per line; text after a comma is ignored
        DIR/data/<name>.h5
            image  float32 (Z, Y, X), z-scored over the brain
            label  any integer type (Z, Y, X), whole tumour is label > 0; optional for unlabelled cases

    With two classes, every label above 0 becomes class 1; with more, labels are used as they are.
    """

    layout = "brats"
    cases_folder = "data"
    list_suffix = ".txt"
    splits = ("train", "val", "test")
    paper_split = "val"
    axes = ("z", "y", "x")
    expected = f"train.txt, val.txt, test.txt and '{cases_folder}/' (`rplib data brats` converts the raw release)"

    def path(self, name: str) -> Path:
        return self.root / self.cases_folder / f"{name}.h5"

    def _classes_of(self, label: np.ndarray) -> np.ndarray:
        if self.classes != 2 or label.dtype.kind not in "iuf":
            return label
        # The raw labels are 1, 2 and 4. Invalid values (negative, fractions, NaN) are kept, so that they are rejected.
        tumour = (label > 0) & np.isfinite(label) & (label == np.floor(label))
        return np.where(tumour, label.dtype.type(1), label)
