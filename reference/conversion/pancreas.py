"""Conversion of the raw Pancreas-CT release (`rplib data pancreas`).

Per case: reoriented to x (left), y (back), z (up); resampled to 1 mm voxels (image by B-splines, label by nearest
neighbour); window -125..275 HU to 0..1; cropped in x and y to the label's box, widened to at least 96 x 96 and then by 25 voxels
per side, all slices are kept; z-scored after the crop. A case without a label is not cropped.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from rplib.errors import UserError
from rplib.reference.conversion.geometry import (
    Placed,
    affine_of,
    flipped,
    on_grid,
    read_volume,
    resample,
    to_lps,
    xyz,
)
from rplib.reference.conversion.releases import Prepared, Release, Source, bounds, widened, z_score
from rplib.reference.datasets.h5 import Pancreas

SPACING = 1.0  # mm
WINDOW = (-125.0, 275.0)  # HU
LEAST, MARGIN = 96, 25  # voxels in x and in y
SOFT_TISSUE = (-50.0, 250.0)  # HU: a pancreas with contrast agent; fat is about -100, air -1000
LEAST_TISSUE = 0.75  # fraction of the label

_NIFTI_IMAGE = re.compile(r"(?:pancreas|image|img)[_-]?(\d{4})(?:_0000)?\.nii(?:\.gz)?", re.IGNORECASE)
_NIFTI_LABEL = re.compile(r"label[_-]?(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_CASE_FOLDER = re.compile(r"pancreas[_-]?(\d{4})", re.IGNORECASE)


class PancreasRelease(Release):
    """`PANCREAS_<number>/.../*.dcm` or `PANCREAS_<number>.nii.gz`, with `label<number>.nii.gz`.

    Args:
        flip_labels: axes (letters of "xyz") to mirror the label files along before they are matched to the image by index.
    """

    layout = Pancreas
    files = "PANCREAS_<number>/**/*.dcm or PANCREAS_<number>.nii.gz (with label<number>.nii.gz if labelled)"
    shares: Mapping[str, float] = {"test": 20 / 82}
    withdrawn = frozenset({"image0025", "image0070"})

    def __init__(self, flip_labels: str = "") -> None:
        if set(flip_labels) - set("xyz") or len(set(flip_labels)) != len(flip_labels):
            raise UserError(f"--flip-labels is {flip_labels!r}; expected distinct letters of xyz, such as y.")
        self.flip_labels = "".join(sorted(flip_labels))

    @property
    def settings(self) -> dict[str, object]:
        return {"release": "pancreas", "flip_labels": self.flip_labels}

    def find(self, raw: Path) -> dict[str, Source]:
        images: dict[str, Path] = {}
        labels: dict[str, Path] = {}
        for path in sorted(raw.rglob("*")):
            if path.suffix.lower() == ".dcm":
                folders = [match[1] for folder in path.parts[:-1] if (match := _CASE_FOLDER.fullmatch(folder))]
                if folders:
                    _enter(images, folders[-1], path.parent)
            elif match := _NIFTI_LABEL.fullmatch(path.name):
                _enter(labels, match[1], path)
            elif match := _NIFTI_IMAGE.fullmatch(path.name):
                _enter(images, match[1], path)
        return {f"image{number}": Source(images[number], labels.get(number)) for number in sorted(images)}

    def prepare(self, name: str, source: Source) -> Prepared:
        stored = read_volume(source.image)
        volume = resample(to_lps(sitk.Cast(stored, sitk.sitkFloat32)), SPACING, sitk.sitkBSpline)
        low, high = WINDOW
        image = (np.clip(xyz(volume), low, high) - low) / (high - low)
        if source.label is None:
            return Prepared(z_score(image, source.image), None, affine_of(volume))
        placed = self._placed(stored, source.label, source.image)
        grid = resample(to_lps(sitk.Cast(placed.label != 0, sitk.sitkUInt8)), SPACING, sitk.sitkNearestNeighbor)
        label = xyz(grid).astype(np.float32)
        if not label.any():
            raise UserError(f"{source.label} contains only background; remove it if the case is unlabelled.")
        (x0, x1), (y0, y1) = (
            widened(first, last, size, LEAST, MARGIN, MARGIN)
            for (first, last), size in zip(bounds(label)[:2], label.shape[:2], strict=True)
        )
        crop = z_score(image[x0:x1, y0:y1], source.image)
        remark = "" if placed.by_header else "the label's header does not match the CT; it was placed on the CT by voxel index."
        return Prepared(crop, label[x0:x1, y0:y1], affine_of(volume, (x0, y0, 0)), remark)

    def _placed(self, image: sitk.Image, label_path: Path, image_path: Path) -> Placed:
        """Place the label on the CT's grid and check that it covers soft tissue, as a mirrored one usually does not."""
        label = read_volume(label_path)
        if self.flip_labels:
            if label.GetSize() != image.GetSize():
                sizes = f"{label_path} has the size {label.GetSize()}, {image_path} {image.GetSize()}"
                raise UserError(f"{sizes}; expected equal sizes.")
            label = flipped(label, self.flip_labels)
            label.CopyInformation(image)
        # The published label files do not always have the CT's origin; their voxels are in the CT's order.
        placed = on_grid(label, image, label_path, image_path, by_index=True)
        inside = sitk.GetArrayViewFromImage(placed.label) != 0
        if inside.any():
            values = sitk.GetArrayViewFromImage(image)[inside]
            share = float(np.mean((values >= SOFT_TISSUE[0]) & (values <= SOFT_TISSUE[1])))
            if share < LEAST_TISSUE:
                raise UserError(
                    f"{label_path} does not cover soft tissue of {image_path} ({share:.0%} of it is between "
                    f"{SOFT_TISSUE[0]:.0f} and {SOFT_TISSUE[1]:.0f} HU); it may be stored mirrored: try --flip-labels y."
                )
        return placed


def _enter(found: dict[str, Path], number: str, path: Path) -> None:
    if found.setdefault(number, path) != path:
        raise UserError(f"{path} and {found[number]} are both case {number}; remove one of them.")
