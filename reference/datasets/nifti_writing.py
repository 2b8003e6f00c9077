"""Writing NIfTI files: atomic, and with identical bytes for identical voxels."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from rplib.reference.files import write_atomically


def write_nifti(
    path: Path,
    volume: NDArray,
    affine: NDArray[np.float64],
    *,
    millimetres: bool = True,
    header: nibabel.Nifti1Header | None = None,
    description: str = "",
) -> None:
    """Writes a volume as .nii.gz.

    Args:
        volume: (*spatial), or with channels last.
        affine: (4, 4).
        millimetres: whether the affine is known to be in mm.
        header: header of the source image, whose description of the grid (both transforms and their codes, units)
            is kept.
        description: up to 79 characters for the header.
    """
    image = nibabel.Nifti1Image(volume, affine, None if header is None else _of_the_grid(header), dtype=volume.dtype)
    if header is None:
        image.header.set_xyzt_units("mm" if millimetres else "unknown")
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    content = gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
    write_atomically(path, lambda file: file.write(content))


def diagonal_affine(spacing: Sequence[float] | None) -> NDArray[np.float64]:
    """An affine for files without one: the voxel size on the diagonal, 1 where unknown.

    >>> diagonal_affine((2.0, 0.5)).diagonal().tolist()
    [2.0, 0.5, 1.0, 1.0]
    """
    return np.diag([*([*spacing, 1.0, 1.0][:3] if spacing is not None else (1.0, 1.0, 1.0)), 1.0])


def with_spacing(affine: NDArray[np.float64], spacing: Sequence[float] | None) -> NDArray[np.float64]:
    """An affine with new voxel sizes and unchanged directions and origin; None changes nothing.

    >>> with_spacing(np.array([[0.0, -2, 0, 9], [1, 0, 0, 8], [0, 0, 3, 7], [0, 0, 0, 1]]), (5.0, 4.0)).tolist()
    [[0.0, -4.0, 0.0, 9.0], [5.0, 0.0, 0.0, 8.0], [0.0, 0.0, 3.0, 7.0], [0.0, 0.0, 0.0, 1.0]]
    """
    if spacing is None:
        return affine
    changed, axes = affine.astype(np.float64), len(spacing)
    changed[:3, :axes] *= np.asarray(spacing) / np.linalg.norm(affine[:3, :axes], axis=0)
    return changed


def _of_the_grid(header: nibabel.Nifti1Header) -> nibabel.Nifti1Header:
    kept = nibabel.Nifti1Header()
    for key in ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):  # fmt: skip
        kept[key] = header[key]
    return kept
