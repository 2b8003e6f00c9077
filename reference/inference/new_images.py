"""New images: grouping files into images, and preprocessing them for the network.

NIfTI files are raw images: they are preprocessed as by `rplib data` or the recipe `generic`, and predictions are mapped
back to their grid. h5 files hold preprocessed images.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rplib.errors import UserError
from rplib.reference.config import Config
from rplib.reference.conversion.brats import BratsRelease
from rplib.reference.conversion.geometry import affine_of, read_volume
from rplib.reference.conversion.pancreas import PancreasRelease
from rplib.reference.conversion.releases import Release, Source
from rplib.reference.datasets.cases import checked_image
from rplib.reference.datasets.dicom import holds_series
from rplib.reference.datasets.h5 import LeftAtrium, read_h5
from rplib.reference.datasets.nifti import CHANNEL, NiftiFolder, open_nifti, read_image
from rplib.reference.datasets.nifti_writing import diagonal_affine

_NIFTI, _H5 = (".nii.gz", ".nii"), (".h5", ".hdf5")
# Releases that are reoriented, resampled or cropped; Left Atrium is only z-scored, on reading (`normalisation`).
_RELEASES: dict[str, Callable[[], Release]] = {
    "pancreas": PancreasRelease,
    "brats": BratsRelease,
}


class Input(NamedTuple):
    """One image to segment."""

    name: str  # of the output files
    files: tuple[Path, ...]  # one, or one per channel; for a DICOM series its folder


class Refused(NamedTuple):
    """An input that cannot be segmented, and why."""

    name: str
    reason: str


class Ready(NamedTuple):
    """A preprocessed image, and the mapping back to the grid of its file."""

    image: NDArray[np.float32]  # (channels, *spatial)
    back: Callable[[NDArray], NDArray]  # from (*spatial) to the grid of the file
    affine: NDArray[np.float64]  # (4, 4), of that grid
    header: nibabel.Nifti1Header | None
    placed: bool  # whether the file has an affine


def find_inputs(paths: Sequence[Path]) -> tuple[list[Input], list[Refused]]:
    """One image per file or DICOM folder, named after it; and the paths that are neither.

    Files of the Left Atrium layout all have the same name and are named after their folders.
    """
    inputs, refused = [], []
    for path in paths:
        try:
            inputs.append(_input(path))
        except UserError as error:
            refused.append(Refused(path.name, str(error)))
    return inputs, refused


def _input(path: Path) -> Input:
    if path.is_dir():
        if not holds_series(path):
            raise UserError(
                f"{path} is a folder without DICOM files; name the images in it, for example {path / '*.nii.gz'}, or the folder "
                "of a series."
            )
        return Input(path.absolute().name, (path,))
    if not path.is_file():
        raise UserError(f"no file {path}.")
    suffix = next((s for s in (*_NIFTI, *_H5) if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path} is neither NIfTI (.nii.gz, .nii) nor h5 nor the folder of a DICOM series; convert it to NIfTI.")
    name = path.name[: -len(suffix)]
    if path.name == LeftAtrium.file_name and path.absolute().parent.name:
        name = path.absolute().parent.name
    return Input(name, (path,))


def group_inputs(inputs: Sequence[Input], channels: int) -> tuple[list[Input], list[Refused]]:
    """Group `<name>_0000`, `<name>_0001`, ... of one folder, if the network has several input channels.

    Returns:
        The images, and the incomplete ones.

    Raises:
        UserError: two images have the same output file.
    """
    refused = []
    grouped: dict[tuple[Path, str], list[Input]] = {}
    for item in inputs:
        match = CHANNEL.fullmatch(item.name) if channels > 1 else None
        grouped.setdefault((item.files[0].parent, match[1] if match else item.name), []).append(item)
    found: dict[str, Input] = {}
    expected = [f"{number:04d}" for number in range(channels)]
    for (_, name), items in grouped.items():
        numbers = sorted(re.sub(r".*_", "", item.name) for item in items if item.name != name)
        if numbers and numbers != expected:
            reason = f"the channels {', '.join(numbers)} of {name} were given; expected {', '.join(expected)}."
            refused.append(Refused(name, reason))
            continue
        merged = [Input(name, tuple(sorted(path for item in items for path in item.files)))] if numbers else items
        for item in merged:
            if item.name in found:
                raise UserError(
                    f"{found[item.name].files[0]} and {item.files[0]} are both called {item.name}; segment them separately, "
                    "into different folders."
                )
            found[item.name] = item
    return list(found.values()), refused


def read(item: Input, config: Config, spacing: Sequence[float] | None = None, prepared: bool = False) -> Ready:
    """Read and preprocess an image for a network with these settings.

    Raises:
        UserError: unreadable, constant, or with an unexpected shape or number of channels.
    """
    ready = _read(item, config, spacing, prepared)
    if ready.image.size == 0 or (ready.image == ready.image.flat[0]).all():
        raise UserError(f"{item.files[0]} is constant; there is nothing to segment.")
    return ready


def _read(item: Input, config: Config, spacing: Sequence[float] | None, prepared: bool) -> Ready:
    dims = len(config.patch)
    if item.files[0].name.lower().endswith(_H5):
        return _from_h5(item, config, spacing)
    if prepared or config.dataset not in _RELEASES:
        usual = config.normalisation if config.dataset == NiftiFolder.layout else "z-score"
        how = "none" if prepared else usual
        image, affine = read_image(item.files, dims, config.in_channels, how, item.name)
        nifti = open_nifti(item.files[0])
        # (X, Y, 1) is a common shape of 2-D images; the label map has it too.
        shape = (*image.shape[1:], 1) if dims == 2 and len(nifti.shape) > 2 and nifti.shape[2] == 1 else image.shape[1:]
        return Ready(image, lambda volume: volume.reshape(shape), affine, nifti.header, True)
    return _as_converted(item, _RELEASES[config.dataset]())


def _from_h5(item: Input, config: Config, spacing: Sequence[float] | None) -> Ready:
    path, dims = item.files[0], len(config.patch)
    if len(item.files) > 1:
        raise UserError(f"{path}: expected one h5 file with the channels as first axis of 'image', not one file per channel.")
    arrays, affine, _ = read_h5(path)
    image = arrays["image"]
    image = image[None] if image.ndim == dims else image
    if image.ndim != dims + 1 or image.shape[0] != config.in_channels or image.size == 0:
        wanted = f"{dims} axes" if config.in_channels == 1 else f"the channels ({config.in_channels}) and {dims} axes"
        raise UserError(f"{path}: 'image' has shape {arrays['image'].shape}; expected {wanted}.")
    placed = affine is not None or spacing is not None
    affine = diagonal_affine(spacing) if affine is None else affine
    return Ready(checked_image(image, path), lambda volume: volume, affine, None, placed)


def _as_converted(item: Input, release: Release) -> Ready:
    """Preprocess a raw image as `rplib data` does for unlabelled cases (without cropping to the organ)."""
    (path,) = item.files
    nifti = open_nifti(path)
    stored = read_volume(path)
    ready = release.prepare(item.name, Source(path, None))
    assert ready.affine is not None
    # Both affines come from SimpleITK; together they map file indices to indices of the converted volume.
    to_ready = np.linalg.inv(ready.affine) @ affine_of(stored)
    shape = tuple(stored.GetSize())

    def back(volume: NDArray) -> NDArray:
        # Nearest neighbour, with a margin of background: voxels outside the converted volume are background.
        offset = to_ready[:3, 3] + 1
        on_file = ndimage.affine_transform(np.pad(volume, 1), to_ready[:3, :3], offset, shape, order=0, mode="nearest")
        return on_file.reshape(nifti.shape)

    return Ready(ready.image[None], back, np.asarray(nifti.affine, np.float64), nifti.header, True)
