"""Checks of what a file declares (shape, size, affine), before anything is allocated."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rplib.errors import UserError, printable

LIMIT = "RPLIB_MOST_GB"  # environment variable: size limit of a volume, in GB (2^30 bytes) of memory
_USUAL_LIMIT = 8.0
_DEFLATE = 1032  # a deflate stream (gzip, zlib) expands to at most this many times its size
_SLACK = 1 << 16  # bytes


def limit() -> float:
    """The size limit of a volume, in GB.

    Raises:
        UserError: the environment variable is not a number above 0.
    """
    text = os.environ.get(LIMIT, "")
    try:
        most = float(text) if text else _USUAL_LIMIT
    except ValueError:
        most = math.nan
    if not most > 0:
        raise UserError(f"the environment variable {LIMIT} is {printable(text)[:40]!r}; expected a number of GB above 0.")
    return most


def check_size(
    path: Path, shape: Sequence[int], item: int, stored: int | None = None, compressed: bool = False, what: str = "the image"
) -> None:
    """Reject a declared size that is impossible or above the limit.

    Args:
        shape: as declared in the header.
        item: bytes per value.
        stored: bytes that the file has for the values; None if unknown.
        compressed: whether those are a deflate stream (gzip, zlib), which expands to at most 1,032 times its size.

    Raises:
        UserError: a size below 0, more values than the file can hold, or more than the limit allows.
    """
    sizes = [int(n) for n in shape]
    shown = " x ".join(map(str, sizes)) or "no"
    if any(n < 0 for n in sizes):
        raise UserError(f"{path}: the header of {what} declares {shown} voxels; copy the file again from its source.")
    declared = math.prod(sizes) * item
    most = limit()
    if max(declared, 4 * math.prod(sizes)) > most * 2**30:  # images are kept as float32
        needed = max(declared, 4 * math.prod(sizes)) / 2**30
        raise UserError(
            f"{path}: the header of {what} declares {shown} voxels, {needed:.1f} GB of memory, more than the limit of "
            f"{most:g} GB; if that is right, raise it: {LIMIT}={math.ceil(needed)}."
        )
    if stored is not None and declared > (stored * _DEFLATE + _SLACK if compressed else stored):
        raise UserError(
            f"{path}: the header of {what} declares {shown} voxels of {item} bytes, but the file has {stored} bytes; "
            "the file is truncated or its header is damaged: copy it again from its source."
        )


def checked_affine(value: Any, path: Path, what: str = "the affine", axes: int = 3) -> np.ndarray:
    """Check an affine and return it as (4, 4) float64.

    Args:
        axes: number of axes of the image; that many first columns must be independent directions.

    Raises:
        UserError: not numbers, another shape, NaN, infinity, a column of zeros, or columns that are not independent.

    >>> checked_affine(np.eye(3), Path("a.h5"))
    Traceback (most recent call last):
    rplib.errors.UserError: a.h5: the affine has shape (3, 3); expected (4, 4), from voxel indices to millimetres.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: {what} is of type {array.dtype}; expected (4, 4) real numbers.")
    if array.shape != (4, 4):
        raise UserError(f"{path}: {what} has shape {array.shape}; expected (4, 4), from voxel indices to millimetres.")
    affine = array.astype(np.float64)
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: {what} contains NaN or infinity; write the file again with a valid one.")
    directions = affine[:3, :axes]
    with np.errstate(over="ignore"):
        sizes = np.linalg.norm(directions, axis=0)
    if not (sizes > 0).all() or sizes.min() < 1e-9 * sizes.max() or np.abs(affine[:3]).max() > 1e12:
        shown = ", ".join(f"{size:.3g}" for size in sizes)
        raise UserError(f"{path}: {what} gives voxels of {shown} mm; write the file again with a valid one.")
    if np.linalg.matrix_rank(directions / sizes, tol=1e-6) < axes or not np.allclose(affine[3], (0, 0, 0, 1), atol=1e-6):
        raise UserError(f"{path}: {what} has dependent directions, so voxels coincide; write the file again with a valid one.")
    return affine
