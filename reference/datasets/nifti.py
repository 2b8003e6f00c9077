"""Your own data: a plain folder of NIfTI files or DICOM series, C classes, one or more channels, 3-D or 2-D."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np

from rplib.errors import UserError, printable, reading
from rplib.reference.datasets.cases import Case, Dataset, checked_image, checked_label, read_list
from rplib.reference.datasets.dicom import holds_series, read_series
from rplib.reference.datasets.headers import check_size, checked_affine
from rplib.reference.files import name_mistake

nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # else it reports every header that it repairs on stderr

NORMALISATIONS = ("z-score", "z-score-nonzero", "percentiles", "none")
_SUFFIXES = (".nii.gz", ".nii")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # case_0001: the second channel of `case`, as nnU-Net names files
_HELD_OUT_SEED = 1337  # for the split without lists; independent of the training's seed, so the test cases never change


class NiftiFolder(Dataset):
    """A plain folder of NIfTI files (.nii.gz or .nii) or DICOM series; the recipe `generic` reads it.

        DIR/images/<name>.nii.gz                         one file per case; channels as an additional last axis
        DIR/images/<name>_0000.nii.gz, <name>_0001...    or one file per channel, as in nnU-Net
        DIR/images/<name>/...                            or a folder with one DICOM series (per channel: <name>_0000/)
        DIR/labels/<name>.nii.gz                         0 background, 1..C-1; an image without a label is unlabelled
        DIR/train.list, DIR/test.list                    optional: one case name per line

    3-D images have the axes (X, Y, Z), 2-D images (X, Y) or (X, Y, 1); with channels in one file (X, Y, Z, channels), or
    for 2-D (X, Y, 1, channels) or (X, Y, channels). Image and label share one grid (shape and affine). Nothing is
    resampled or reoriented: outputs keep the affine of the input.

    Without lists, a fifth of the labelled cases (at least one; drawn with a fixed seed) is used for testing and all
    others for training, labelled ones first. With only a test.list, all other cases are used for training.

    Args:
        channels, dims: of the images, 2 or 3 dims; None infers them from the majority of the images.
        normalisation: per channel of each image: ``"z-score"``, ``"z-score-nonzero"`` (mean and deviation of the voxels
            other than 0, which stay 0), ``"percentiles"`` (clipped at the 0.5th and 99.5th, then z-score), ``"none"``.

    Raises:
        UserError: no such folder, no images in it, or inconsistent channels.
    """

    layout = "generic"
    expected = "images/ and labels/ of NIfTI files or DICOM series"
    images_folder: ClassVar[str] = "images"
    labels_folder: ClassVar[str] = "labels"
    label_names: dict[int, str]  # value -> name, if the data set defines names

    def __init__(
        self,
        root: str | Path,
        classes: int = 2,
        channels: int | None = None,
        dims: int | None = None,
        normalisation: str = "z-score",
    ) -> None:
        super().__init__(root, classes)
        if normalisation not in NORMALISATIONS:
            raise UserError(f"unknown normalisation {normalisation!r}; expected one of: {', '.join(NORMALISATIONS)}.")
        self.normalisation = normalisation
        self.label_names = {}
        folder = self.root / self.images_folder
        images = image_files(folder)
        if not images:
            raise UserError(f"no .nii or .nii.gz file in {folder}, and no folder of a DICOM series; expected {self.expected}.")
        self._labels = image_files(self.root / self.labels_folder, series=False)
        self._images = group_channels(images, self._labels, channels, folder)
        self.dims, self.channels = self._guess(dims, channels)
        self._grids: dict[str, tuple[str, tuple[float, ...]]] = {}  # case -> orientation, voxel size
        strangers = sorted(set(self._labels) - set(self._images))
        if strangers:
            raise UserError(
                f"{self._labels[strangers[0]]} has no matching image in {folder} "
                f"({len(strangers)} such labels); give image and label the same name."
            )

    def list_name(self, split: str) -> str:
        found = self._list(split)
        return found.name if found else f"{split}.list"

    def names(self, split: str) -> list[str]:
        path = self._list(split)
        if path is not None:
            return read_list(path)
        if split == "test" and self._list("train") is not None:
            raise UserError(f"{self.root} has a train.list but no test.list; write one, or remove both lists.")
        labelled = [name for name in self._images if name in self._labels]
        held_out = set(self._held_out(labelled))
        if split == "test":
            return [name for name in labelled if name in held_out]
        return sorted(set(self._images) - held_out, key=lambda name: (name not in self._labels, name))

    def path(self, name: str) -> Path:
        return self._images.get(name, [self.root / self.images_folder / f"{name}.nii.gz"])[0]

    def has_label(self, name: str) -> bool:
        return name in self._labels

    def load(self, name: str, needs_label: bool = False) -> Case:
        if name not in self._images:
            raise UserError(f"case {name} has no file {self.path(name)}; remove its name from the list or add the file.")
        if needs_label and name not in self._labels:
            raise UserError(f"case {name} has no label in {self.root / self.labels_folder} but is used as a labelled case.")
        image, affine = read_image(self._images[name], self.dims, self.channels, self.normalisation, name)
        files, shape = self._images[name], image.shape[1:]
        label = None
        if name in self._labels:
            file = self._labels[name]
            nifti = open_nifti(file)
            values = _values(nifti, file)
            values = values.reshape(shape) if values.size == np.prod(shape) and _squeezed(values.shape) == shape else values
            _check_grid(values.shape, nifti.affine, shape, affine, file, files[0])
            label = checked_label(values, shape, file, self.classes, "the label")
        orientation = "".join(str(code) for code in nibabel.aff2axcodes(affine))
        sizes = tuple(round(float(size), 3) for size in nibabel.affines.voxel_sizes(affine)[: self.dims])
        self._grids[name] = orientation, sizes
        return Case(name, image[0] if self.channels == 1 else image, label, affine)

    def remarks(self) -> list[str]:
        remarks = []
        if self._list("test") is None:
            kept = ", ".join(self.names("test"))
            remarks.append(
                f"{self.root} has no test.list: a fifth of the labelled cases is held out for testing ({kept}); "
                "write train.list and test.list to choose the split."
            )
        if not self._grids:  # nothing was read yet
            return remarks
        orientations = Counter(orientation for orientation, _ in self._grids.values())
        if len(orientations) > 1:
            (usual, times), *_ = orientations.most_common()
            odd = [f"{name} ({orientation})" for name, (orientation, _) in self._grids.items() if orientation != usual]
            remarks.append(
                f"{times} of {len(self._grids)} images are stored in orientation {usual}; different: {_some(odd)}. Nothing is "
                "reoriented."
            )
        sizes = {name: np.array(size) for name, (_, size) in self._grids.items()}
        middle = np.quantile(np.array(list(sizes.values())), 0.5, axis=0, method="lower")
        odd = [
            f"{name} ({' x '.join(f'{n:g}' for n in size)})"
            for name, size in sizes.items()
            if (np.maximum(size, middle) > 1.5 * np.minimum(size, middle)).any()
        ]
        if odd:
            common = " x ".join(f"{n:g}" for n in middle)
            remarks.append(
                f"{len(odd)} of {len(sizes)} images have voxel sizes more than 1.5 times larger or smaller than the usual "
                f"{common} mm: {_some(odd)}. Nothing is resampled."
            )
        return remarks

    def _list(self, split: str) -> Path | None:
        return next((p for suffix in ("list", "txt") if (p := self.root / f"{split}.{suffix}").is_file()), None)

    def _held_out(self, labelled: list[str]) -> list[str]:
        """The test cases if no list defines them."""
        if (path := self._list("test")) is not None:
            return read_list(path)
        if len(labelled) < 2:
            raise UserError(
                f"{self.root} has {len(labelled)} labelled cases; expected at least two, one for training and one for testing."
            )
        order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(labelled))
        return [labelled[i] for i in order[: max(1, round(len(labelled) / 5))]]

    def _guess(self, dims: int | None, channels: int | None) -> tuple[int, int]:
        """Infer dims and channels from the majority of the images; damaged files are reported on loading."""
        if dims is not None and channels is not None:
            return dims, channels
        seen: Counter[tuple[int, int]] = Counter()
        for files in self._images.values():
            if files[0].is_dir():  # a DICOM series, which is a volume of one channel
                seen[dims or 3, channels or len(files)] += 1
                continue
            try:
                shape = open_nifti(files[0]).shape
            except UserError:
                continue
            flat = len(shape) == 2 or shape[2] == 1 or (len(shape) == 3 and shape[2] == channels)
            axes = dims or (2 if flat else 3)
            seen[axes, channels or len(files) * (shape[-1] if len(_squeezed(shape)) > axes else 1)] += 1
        return seen.most_common(1)[0][0] if seen else (dims or 3, channels or 1)


def read_image(files: Sequence[Path], dims: int, channels: int, normalisation: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an image from one or more files as (channels, *spatial) float32, each channel normalised; and its affine.

    Args:
        files: one file, or one per channel.
        dims, channels: expected values.
        normalisation: one of `NORMALISATIONS`.
        name: of the case, for messages.

    Raises:
        UserError: unreadable files, unexpected shape or number of channels, channels on different grids, NaN or infinity.
    """
    opened = [open_nifti(file) for file in files]
    parts = [_channels_first(_values(nifti, file), file, dims, channels) for nifti, file in zip(opened, files, strict=True)]
    shape, affine = parts[0].shape[1:], np.asarray(opened[0].affine, np.float64)
    for part, nifti, file in zip(parts[1:], opened[1:], files[1:], strict=True):
        _check_grid(part.shape[1:], nifti.affine, shape, affine, file, files[0])
    image = np.concatenate(parts)
    if image.shape[0] != channels:
        raise UserError(
            f"{files[0]} has {image.shape[0]} channels; expected {channels} (in_channels), as an additional last axis or as "
            f"files {name}_0000.nii.gz, {name}_0001.nii.gz, ..."
        )
    return np.stack([normalised(checked_image(c, files[0], "the image"), normalisation) for c in image]), affine


def normalised(image: np.ndarray, how: str) -> np.ndarray:
    """Normalise one channel; a constant one becomes 0.

    >>> normalised(np.array([0.0, 1.0, 3.0]), "z-score-nonzero").tolist()
    [0.0, -1.0, 1.0]
    """
    if how == "none":
        return image
    inside = image != 0 if how == "z-score-nonzero" else np.ones(image.shape, bool)
    if how == "percentiles":
        image = np.clip(image, *np.percentile(image, (0.5, 99.5)))
    if not inside.any():
        return np.zeros_like(image)
    values = image[inside].astype(np.float64)
    deviation = values.std()
    scaled = (image - values.mean()) / (deviation if deviation > 0 else 1.0)
    return np.where(inside, scaled, 0).astype(image.dtype)


def image_files(folder: Path, series: bool = True) -> dict[str, Path]:
    """Files by name without suffix, sorted; with `series` also folders that contain a DICOM series.

    Raises:
        UserError: duplicate or invalid names.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
        if path.name.startswith("."):
            continue
        if series and path.is_dir():
            suffix = "" if holds_series(path) else None
        elif not path.is_file():
            continue
        if suffix is None:
            continue
        name = path.name.removesuffix(suffix)
        if (expected := name_mistake(name)) is not None:
            raise UserError(f"{folder} contains {printable(path.name)[:80]!r}, which is not a case name; expected {expected}.")
        if name in files:
            raise UserError(f"{path} and {files[name].name} have the same name; remove one of them.")
        files[name] = path
    return files


def group_channels(images: dict[str, Path], labels: dict[str, Path], channels: int | None, folder: Path) -> dict[str, list[Path]]:
    """Files of every case, in channel order.

    Raises:
        UserError: a case lacks a channel.
    """
    matches = {stem: CHANNEL.fullmatch(stem) for stem in images}
    bases: dict[str, list[int]] = {}
    for match in matches.values():
        if match:
            bases.setdefault(match[1], []).append(int(match[2]))
    # A trailing number may also be a patient number: then labels have it as well, or only one channel is expected.
    suffixed = all(matches.values()) and not any(stem in labels for stem in images)
    plausible = all(n == [0] for n in bases.values()) if channels == 1 else any(0 in n for n in bases.values())
    if not (suffixed and plausible):
        return {stem: [path] for stem, path in images.items()}
    expected = list(range(channels or max(map(len, bases.values()))))
    for base, numbers in bases.items():
        if sorted(numbers) != expected:
            raise UserError(
                f"{folder} has the channels {', '.join(f'{n:04d}' for n in sorted(numbers))} of case {base}; expected "
                f"{', '.join(f'{n:04d}' for n in expected)}."
            )
    return {base: [images[f"{base}_{number:04d}"] for number in expected] for base in bases}


def _channels_first(values: np.ndarray, path: Path, dims: int, channels: int) -> np.ndarray:
    """The values of one file as (channels, *spatial)."""
    if values.ndim == 5 and values.shape[3] == 1:  # NIfTI stores vectors along the fifth axis
        values = values[:, :, :, 0]
    if dims == 3 and values.ndim in (3, 4):
        return np.moveaxis(values, 3, 0) if values.ndim == 4 else values[None]
    if dims == 2 and values.ndim == 2:
        return values[None]
    if dims == 2 and values.ndim == 3 and (values.shape[2] == 1 or values.shape[2] == channels):
        return np.moveaxis(values, 2, 0)
    if dims == 2 and values.ndim == 4 and values.shape[2] == 1:
        return np.moveaxis(values[:, :, 0], 2, 0)
    raise UserError(f"{path} has shape {values.shape}; expected a {dims}-D image (patch has {dims} numbers).")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop axes of length 1 after the second: NIfTI files of 2-D images often have one."""
    return (*shape[:2], *(n for n in shape[2:] if n != 1))


def open_nifti(path: Path) -> nibabel.Nifti1Image:
    """Open a file without reading its voxels; if it is a folder, read the DICOM series in it.

    Raises:
        UserError: missing, damaged, or not NIfTI.
    """
    if path.is_dir():
        return read_series(path)
    with reading(path, "NIfTI file", "write it again"):
        nifti = nibabel.load(path)
    if not isinstance(nifti, nibabel.Nifti1Image):  # NIfTI-2 is a subclass
        raise UserError(f"{path} is a {type(nifti).__name__}; expected NIfTI.")
    with reading(path, "NIfTI file", "write it again"):
        compressed = path.name.lower().endswith(".gz")
        proxy: Any = nifti.dataobj
        offset = 0 if compressed else int(proxy.offset)
        stored = max(path.stat().st_size - offset, 0)
        check_size(path, nifti.shape, nifti.get_data_dtype().itemsize, stored, compressed)
        flat = len(_squeezed(nifti.shape)) < 3 or nifti.shape[2] == 1
        checked_affine(nifti.affine, path, "the affine of its header", 2 if flat else 3)
        scaling = [number for number in (proxy.slope, proxy.inter) if not np.isfinite(number)]
    if scaling:
        raise UserError(f"{path}: the header scales its values by {scaling[0]}; write it again.")
    return nifti


def _values(nifti: nibabel.Nifti1Image, path: Path) -> np.ndarray:
    if nifti.get_data_dtype().kind not in "fiu":
        raise UserError(f"{path} has values of type {nifti.get_data_dtype()}; expected numbers.")
    with reading(path, "NIfTI file", "write it again"), np.errstate(all="ignore"):
        return np.asarray(nifti.dataobj)


def _check_grid(
    shape: tuple[int, ...], affine: np.ndarray, wanted_shape: tuple[int, ...], wanted: np.ndarray, path: Path, other: Path
) -> None:
    """Check that the corners of both grids are within a quarter of a voxel of each other."""
    if shape != wanted_shape:
        raise UserError(f"{path} has shape {shape} but {other} has {wanted_shape}; resample them to one grid.")
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in (*shape, 1, 1)[:3]])).reshape(3, -1)
    corners = np.vstack([ends, np.ones(ends.shape[1])])
    distance = np.linalg.norm((affine @ corners - wanted @ corners)[:3], axis=0).max()
    if distance > 0.25 * nibabel.affines.voxel_sizes(wanted)[: len(shape)].min():
        raise UserError(f"{path} and {other} have affines that differ by {distance:.2f} mm at the corners; resample one of them.")


def _some(names: Sequence[str]) -> str:
    """The first three names, and the number of further ones.

    >>> _some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
