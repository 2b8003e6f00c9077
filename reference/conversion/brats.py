"""Conversion of the raw BraTS-2019 release (`rplib data brats`): FLAIR and the whole tumour.

Per case: axes z, y, x; cropped to the box of nonzero voxels; clipped at the 99.9th percentile of that box; z-scored
by the mean and deviation of voxels above 0; the label is 1 where *_seg is above 0.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from rplib.errors import UserError
from rplib.reference.conversion.geometry import affine_of, on_grid, read_volume, to_lps
from rplib.reference.conversion.releases import Prepared, Release, Source, bounds, z_score
from rplib.reference.datasets.h5 import Brats

PERCENTILE = 99.9
_SUFFIXES = (".nii.gz", ".nii")


class BratsRelease(Release):
    """`<case>_flair.nii.gz` next to `<case>_seg.nii.gz`, both HGG and LGG."""

    layout = Brats
    files = "<case>_flair.nii.gz (with <case>_seg.nii.gz if labelled)"
    shares: Mapping[str, float] = {"val": 25 / 335, "test": 60 / 335}

    @property
    def settings(self) -> dict[str, object]:
        return {"release": "brats"}

    def find(self, raw: Path) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for image in sorted(raw.rglob("*_flair.nii*")):
            suffix = next((s for s in _SUFFIXES if image.name.endswith(f"_flair{s}")), None)
            if suffix is None:
                continue
            name = image.name.removesuffix(f"_flair{suffix}")
            if name in found:
                raise UserError(f"{image} and {found[name].image} are both case {name}; remove one of them.")
            labels = [label for s in _SUFFIXES if (label := image.with_name(f"{name}_seg{s}")).is_file()]
            found[name] = Source(image, labels[0] if labels else None)
        return found

    def prepare(self, name: str, source: Source) -> Prepared:
        stored = read_volume(source.image)
        volume = to_lps(stored)
        image = sitk.GetArrayFromImage(volume)  # (Z, Y, X)
        if not (image > 0).any():
            raise UserError(f"{source.image} has no voxel above 0; copy it again from its source.")
        box = bounds(image != 0)
        window = tuple(slice(*edges) for edges in box)
        crop = image[window].astype(np.float32)
        crop = np.minimum(crop, np.percentile(crop, PERCENTILE))
        label = None
        if source.label is not None:
            placed = on_grid(read_volume(source.label), stored, source.label, source.image).label
            label = (sitk.GetArrayFromImage(to_lps(placed))[window] > 0).astype(np.uint8)
        # Columns in the order of the written axes z, y, x.
        affine = affine_of(volume, [edges[0] for edges in reversed(box)])[:, [2, 1, 0, 3]]
        return Prepared(z_score(crop, source.image, crop > 0), label, affine)
