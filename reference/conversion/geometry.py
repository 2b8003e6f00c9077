"""Reading volumes, axes and affines, and placing a label on its image's grid (with SimpleITK)."""

import gzip
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from rplib.errors import UserError
from rplib.reference.datasets.dicom import affine_of as affine_of
from rplib.reference.datasets.dicom import itk_reason, read_dicom_series
from rplib.reference.datasets.dicom import xyz as xyz
from rplib.reference.datasets.headers import check_size, checked_affine
from rplib.reference.datasets.nifti import open_nifti

_SIZES = {
    sitk.sitkInt16: np.int16, sitk.sitkUInt16: np.int16, sitk.sitkInt32: np.int32, sitk.sitkUInt32: np.int32,
    sitk.sitkInt64: np.int64, sitk.sitkUInt64: np.int64, sitk.sitkFloat32: np.float32, sitk.sitkFloat64: np.float64,
}  # fmt: skip


_MOST_HEADER = 1 << 20  # bytes of an NRRD header that are read
_MOST_LINE = 500  # bytes of one of its fields


class Placed(NamedTuple):
    """A label on its image's grid, and whether its own header placed it there."""

    label: sitk.Image
    by_header: bool


def read_volume(path: Path) -> sitk.Image:
    """Read a 3-D volume with one channel: a file, or a folder with a DICOM series.

    Raises:
        UserError: unreadable, truncated, not a 3-D volume with one channel, or with NaN or infinity.
    """
    if path.is_dir():
        return read_dicom_series(path)
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            _check_nifti(path)
        else:
            _check_header(path)
        volume = sitk.ReadImage(str(path))
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways, here and in ITK
        if "orthonormal" in str(error):
            raise UserError(f"{path}: the axes in its header are not orthogonal; resample it to orthogonal axes.") from error
        raise UserError(f"{path} cannot be read ({itk_reason(error)}); copy it again from its source.") from error
    while volume.GetDimension() == 4 and volume.GetSize()[3] == 1:
        volume = volume[:, :, :, 0]
    if volume.GetDimension() != 3 or volume.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"{path} has the size {volume.GetSize()} with {volume.GetNumberOfComponentsPerPixel()} values per voxel; "
            "expected a 3-D volume with one channel."
        )
    if sitk.GetArrayViewFromImage(volume).dtype.kind not in "fiu":
        raise UserError(f"{path} has values of type {volume.GetPixelIDTypeAsString()}; expected numbers.")
    _check_finite(sitk.GetArrayViewFromImage(volume), path)
    checked_affine(affine_of(volume), path, "the grid of its header")
    return volume


def to_lps(volume: sitk.Image) -> sitk.Image:
    """Permute and flip axes without resampling, so that x points left, y back and z up, as closely as possible."""
    return sitk.DICOMOrient(volume, "LPS")


def on_grid(label: sitk.Image, image: sitk.Image, label_path: Path, image_path: Path, by_index: bool = False) -> Placed:
    """Place the label on its image's grid.

    A label in another orientation is reoriented by its header. If the header is empty (identity, origin 0), the label is
    matched by index; with `by_index`, so is any label of the same size.

    Raises:
        UserError: the grids do not match.
    """
    if _same_grid(label, image):
        return Placed(_with_grid_of(label, image), True)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    turned = sitk.DICOMOrient(label, code)
    if _same_grid(turned, image):
        return Placed(_with_grid_of(turned, image), True)
    silent = np.allclose(label.GetOrigin(), 0) and np.allclose(label.GetDirection(), np.eye(3).ravel())
    if label.GetSize() == image.GetSize() and (silent or by_index):
        return Placed(_with_grid_of(label, image), False)
    raise UserError(
        f"{label_path} is not on the grid of {image_path}: {_grid(label)} against {_grid(image)}; resample one of them."
    )


def flipped(label: sitk.Image, axes: str) -> sitk.Image:
    """Mirror voxels along axes of the file's indices; the header is kept.

    >>> volume = sitk.GetImageFromArray(np.arange(8).reshape(2, 2, 2))
    >>> int(flipped(volume, "xz")[0, 0, 0])
    5
    """
    array = sitk.GetArrayFromImage(label)
    mirrored = sitk.GetImageFromArray(np.flip(array, tuple("zyx".index(axis) for axis in axes)))
    mirrored.CopyInformation(label)
    return mirrored


def resample(volume: sitk.Image, spacing: float, interpolator: int) -> sitk.Image:
    """Resample to cubic voxels of `spacing` mm from the same first voxel; size floor(size * old spacing / spacing).

    Beyond the centre of the last voxel, its value is repeated.
    """
    # The tolerance keeps 240 slices of 1 mm, stored as 0.9999999, from becoming 239.
    size = [max(1, int(n * old / spacing + 1e-6)) for n, old in zip(volume.GetSize(), volume.GetSpacing(), strict=True)]
    filter_ = sitk.ResampleImageFilter()
    filter_.SetSize(size)
    filter_.SetOutputSpacing([spacing] * 3)
    filter_.SetOutputOrigin(volume.GetOrigin())
    filter_.SetOutputDirection(volume.GetDirection())
    filter_.SetInterpolator(interpolator)
    filter_.UseNearestNeighborExtrapolatorOn()
    return filter_.Execute(volume)


def _check_nifti(path: Path) -> None:
    """Check a NIfTI file: ITK silently reads zeros for truncated data and NaN."""
    stored = open_nifti(path)
    if path.name.endswith(".nii.gz"):
        with gzip.open(path) as file:
            while file.read(1 << 24):  # reading to the end verifies length and checksum
                pass
    if path.suffix == ".nii" or stored.get_data_dtype().kind == "f":
        _check_finite(np.asanyarray(stored.dataobj), path)


def _check_header(path: Path) -> None:
    """Check what an NRRD file (or another format that ITK reads) declares, before the voxels are read."""
    stored, compressed = _check_nrrd(path)
    header = sitk.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    item = np.dtype(_SIZES.get(header.GetPixelID(), np.uint8)).itemsize * max(header.GetNumberOfComponents(), 1)
    check_size(path, header.GetSize(), item, stored, compressed)


def _check_nrrd(path: Path) -> tuple[int | None, bool]:
    """The most bytes that an NRRD file has for its voxels, and whether they are compressed; None for other formats.

    Raises:
        UserError: a header line that would crash ITK, whose parser overflows a buffer on long lines.
    """
    with open(path, "rb") as file:
        content = file.read(_MOST_HEADER)
    if not content.startswith(b"NRRD"):
        return None, False
    head = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[0]
    fields = [line for line in head.splitlines() if not line.startswith(b"#") and b":=" not in line]
    longest = max(map(len, fields))
    if longest > _MOST_LINE:
        raise UserError(
            f"{path} has a header line of {longest} bytes; expected at most {_MOST_LINE}. It is damaged: copy it again from its "
            "source."
        )
    encoding = re.search(rb"^encoding:\s*(\w+)", head.lower(), re.MULTILINE)
    if encoding is None or re.search(rb"^data ?file:", head.lower(), re.MULTILINE):
        return None, False
    if encoding[1] in (b"raw", b"gzip", b"gz"):
        return path.stat().st_size, encoding[1] != b"raw"
    return None, False  # text needs at least two bytes per value, bzip2 has no bound


def _check_finite(values: np.ndarray, path: Path) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{path} contains NaN or infinite values; copy it again from its source.")


def _same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    """Equal sizes, and all corners within a quarter of a voxel of each other."""
    if a.GetSize() != b.GetSize():
        return False
    ends = np.array(np.meshgrid(*[(0.0, n - 1.0) for n in a.GetSize()])).reshape(3, -1).T
    corners = [np.array([v.TransformContinuousIndexToPhysicalPoint(end.tolist()) for end in ends]) for v in (a, b)]
    distance = np.linalg.norm(corners[0] - corners[1], axis=1).max()
    return bool(distance <= 0.25 * min(b.GetSpacing()))


def _with_grid_of(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    label = sitk.Image(label)
    label.CopyInformation(image)
    return label


def _grid(volume: sitk.Image) -> str:
    numbers = [", ".join(f"{value:g}" for value in values) for values in (volume.GetSpacing(), volume.GetOrigin())]
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.GetDirection())
    return f"{' x '.join(map(str, volume.GetSize()))} voxels of {numbers[0]} mm from {numbers[1]}, orientation {code}"
