"""Conversion of the raw 2018 Left Atrium challenge release (`rplib data left-atrium`).

Per case: the label is where laendo.nrrd is 255; the image is z-scored over its whole volume; both are cropped in x and y
to the label's box, widened to at least 112 x 112 and then by 10 to 19 voxels per side, drawn from the seed and the case's name;
all slices are kept. Axes are those of the file. A case without laendo.nrrd is not cropped.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rplib.errors import UserError
from rplib.reference.conversion.geometry import affine_of, on_grid, read_volume, xyz
from rplib.reference.conversion.releases import Prepared, Release, Source, bounds, widened, z_score
from rplib.reference.datasets.h5 import LeftAtrium

IMAGE, LABEL = "lgemri.nrrd", "laendo.nrrd"
CAVITY = 255  # in laendo.nrrd
LEAST = 112  # voxels in x and in y
MARGINS = (10, 19)  # voxels per side, both included


class LeftAtriumRelease(Release):
    """`<case>/lgemri.nrrd` and `<case>/laendo.nrrd`."""

    layout = LeftAtrium
    files = f"<case>/{IMAGE} (with <case>/{LABEL} if labelled)"
    shares: Mapping[str, float] = {"test": 20 / 100}

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @property
    def settings(self) -> dict[str, object]:
        return {"release": "left-atrium", "seed": self.seed}

    def find(self, raw: Path) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for image in sorted(raw.rglob(IMAGE)):
            name, label = image.parent.name, image.with_name(LABEL)
            if name in found:
                raise UserError(f"{image} and {found[name].image} are both case {name}; remove one of them.")
            found[name] = Source(image, label if label.is_file() else None)
        return found

    def prepare(self, name: str, source: Source) -> Prepared:
        volume = read_volume(source.image)
        image = z_score(xyz(volume), source.image)
        if source.label is None:
            return Prepared(image, None, affine_of(volume))
        stored = read_volume(source.label)
        label = (xyz(on_grid(stored, volume, source.label, source.image).label) == CAVITY).astype(np.uint8)
        if not label.any():
            raise UserError(f"{source.label} has no voxel of {CAVITY}; expected {CAVITY} inside the cavity and 0 elsewhere.")
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        box = []
        for (low, high), size in zip(bounds(label)[:2], label.shape[:2], strict=True):
            below, above = random.integers(MARGINS[0], MARGINS[1] + 1, 2).tolist()
            box.append(widened(low, high, size, LEAST, below, above))
        (x0, x1), (y0, y1) = box
        return Prepared(image[x0:x1, y0:y1], label[x0:x1, y0:y1], affine_of(volume, (x0, y0, 0)))
