"""A DICOM series as one volume (by SimpleITK), and which folders hold one."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from rplib.errors import UserError
from rplib.reference.datasets.headers import checked_affine

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK prints multi-line warnings to stderr


def series_folder(path: Path) -> Path | None:
    """The folder with the slices of a case, `path` itself or one below it; None if there are no DICOM files.

    Raises:
        UserError: several folders contain DICOM files.
    """
    folders = [folder for folder in (path, *sorted(path.rglob("*"))) if folder.is_dir() and _holds_dicom(folder)]
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders[:3])
        raise UserError(f"{path} contains {len(folders)} folders of DICOM files ({names}); keep one series.")
    return folders[0] if folders else None


def holds_series(path: Path) -> bool:
    """Whether a file in or below a folder is DICOM."""
    return any(_is_dicom(file) for file in path.rglob("*"))


def read_dicom_series(folder: Path) -> sitk.Image:
    """Read the DICOM series in a folder; slices ordered by position, slope and intercept applied.

    Raises:
        UserError: no series, more than one, a damaged file, or a missing slice.
    """
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise UserError(f"{folder} contains {len(series)} DICOM series; expected one: remove the others.")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    names = {Path(file).name for file in files}
    strangers = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".dcm" and path.name not in names]
    if strangers:  # GDCM skips unreadable files
        raise UserError(f"{strangers[0]} is not a readable slice of the series ({len(strangers)} such files); copy it again.")
    positions = []
    header = sitk.ImageFileReader()
    for file in files:
        header.SetFileName(file)
        try:
            header.ReadImageInformation()
        except RuntimeError as error:
            raise UserError(f"{file} cannot be read ({itk_reason(error)}); copy it again from its source.") from error
        positions.append(header.GetOrigin())
    steps = np.linalg.norm(np.diff(np.array(positions), axis=0), axis=1)
    if len(steps) and steps.max() - steps.min() > 0.05 * np.median(steps):
        gap = int(np.abs(steps - np.median(steps)).argmax())
        raise UserError(
            f"{folder}: the slices {Path(files[gap]).name} and {Path(files[gap + 1]).name} are {steps[gap]:.2f} mm apart, the "
            f"others {np.median(steps):.2f} mm; a slice is missing or duplicated: copy the series again from its source."
        )
    try:
        return sitk.ReadImage(list(files))
    except RuntimeError as error:
        raise UserError(f"{folder} cannot be read ({itk_reason(error)}); copy it again from its source.") from error


def read_series(path: Path) -> nibabel.Nifti1Image:
    """Read the series in or below a folder, with the axes (X, Y, Z) and the affine of NIfTI.

    Raises:
        UserError: see `series_folder` and `read_dicom_series`; also several values per voxel, or an invalid grid.
    """
    folder = series_folder(path)
    if folder is None:
        raise UserError(f"{path} is a folder without DICOM files; expected a series or a NIfTI file.")
    volume = read_dicom_series(folder)
    if volume.GetDimension() != 3 or volume.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"{folder} has the size {volume.GetSize()} with {volume.GetNumberOfComponentsPerPixel()} values per voxel; expected "
            "a series of greyscale slices."
        )
    values, affine = xyz(volume), checked_affine(affine_of(volume), folder, "the grid of the series")
    image = nibabel.Nifti1Image(values.astype(np.float64) if values.dtype.itemsize == 8 else values, affine)
    image.header.set_xyzt_units("mm")
    return image


def xyz(volume: sitk.Image) -> np.ndarray:
    """Voxels as (X, Y, Z), in the file's index order."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(volume).transpose(2, 1, 0))


def affine_of(volume: sitk.Image, start: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Affine (4, 4) from the indices (x, y, z) of a crop that begins at `start` to millimetres, as in NIfTI (ITK flips x
    and y)."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(volume.GetDirection()).reshape(3, 3) * np.array(volume.GetSpacing())
    affine[:3, 3] = volume.TransformContinuousIndexToPhysicalPoint([float(s) for s in start])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def itk_reason(error: Exception) -> str:
    """The reason of an error in ITK, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    reason = lines[-1] if isinstance(error, RuntimeError) else lines[0]  # ITK gives the reason at the end
    return reason.removeprefix("sitk::ERROR: ")[:160]


def _holds_dicom(folder: Path) -> bool:
    return any(_is_dicom(path) for path in sorted(folder.iterdir()))


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its suffix, or if it has none, by the letters DICM after the preamble."""
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    if path.suffix.lower() in (".gz", ".nii", ".h5"):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
