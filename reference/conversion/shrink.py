"""Downsampling of a data set (`rplib data shrink`), for small machines and quick experiments.

Per case, blocks of N x N x N voxels are replaced by their mean (image) and their most frequent value (label; ties: the
largest). Incomplete blocks at the end of an axis are dropped. Intensities are not normalised again.
"""

from pathlib import Path

import numpy as np

from rplib.errors import UserError
from rplib.reference.conversion.releases import Prepared, Release, Source
from rplib.reference.datasets.cases import MOST_CLASSES, checked_image, checked_label
from rplib.reference.datasets.h5 import H5Dataset, read_h5
from rplib.reference.datasets.layouts import guess_layout, open_dataset


class Shrunk(Release):
    """A converted data set in one of the h5 layouts, downsampled by N along each axis.

    Raises:
        UserError: another layout, or N below 2.
    """

    published = False

    def __init__(self, root: Path, by: int) -> None:
        if by < 2:
            raise UserError(f"--by is {by}; expected 2 or more voxels along each edge of a block.")
        dataset = open_dataset(root, guess_layout(root))
        if not isinstance(dataset, H5Dataset):
            raise UserError(f"{root} contains NIfTI files; expected h5 files. Resample NIfTI files with your own tools.")
        self.dataset, self.by = dataset, by
        self.layout, self.files = type(dataset), dataset.expected
        self.shares = {}  # the existing lists are used

    @property
    def settings(self) -> dict[str, object]:
        return {"release": f"{self.dataset.layout}, shrunk", "by": self.by}

    @property
    def lists(self) -> Path:
        """The folder that contains the lists.

        Raises:
            UserError: one is missing.
        """
        root = self.dataset.root
        names = [self.dataset.list_name(split) for split in self.dataset.splits]
        folders = (root, root / self.dataset.cases_folder)
        folder = next((f for f in folders if all((f / name).is_file() for name in names)), None)
        if folder is None:
            raise UserError(f"{root} lacks one of {', '.join(names)}; see `rplib data check {root}`.")
        return folder

    def find(self, raw: Path) -> dict[str, Source]:
        names = [name for split in self.dataset.splits for name in self.dataset.names(split)]
        paths = {name: self.dataset.path(name) for name in names}
        return {
            name: Source(path, path if self.dataset.has_label(name) else None) for name, path in paths.items() if path.is_file()
        }

    def prepare(self, name: str, source: Source) -> Prepared:
        arrays, affine, _ = read_h5(source.image)
        image, label = checked_image(arrays["image"], source.image), arrays.get("label")
        if image.ndim != 3 or (label is not None and label.shape != image.shape):
            raise UserError(f"{source.image}: 'image' has shape {image.shape}; expected three axes, and a label of that shape.")
        if label is not None:  # reject labels that no data set accepts; keep the dtype
            checked_label(label, image.shape, source.image, MOST_CLASSES)
        if min(image.shape) < self.by:
            raise UserError(f"{source.image} has {' x '.join(map(str, image.shape))} voxels; --by {self.by} leaves none.")
        if affine is not None:  # a block's centre is (N - 1) / 2 voxels from its first voxel's
            first = np.diag([self.by, self.by, self.by, 1.0])
            first[:3, 3] = (self.by - 1) / 2
            affine = affine @ first
        return Prepared(
            blocks(image, self.by).mean(1, dtype=np.float64).reshape(self._shape(image)).astype(np.float32),
            None if label is None else most_frequent(blocks(label, self.by)).reshape(self._shape(image)),
            affine,
        )

    def _shape(self, image: np.ndarray) -> tuple[int, ...]:
        return tuple(size // self.by for size in image.shape)


def blocks(volume: np.ndarray, by: int) -> np.ndarray:
    """Blocks (blocks, voxels per block) of a volume (X, Y, Z), in the order of the volume.

    >>> blocks(np.arange(12).reshape(2, 2, 3), 2).tolist()
    [[0, 1, 3, 4, 6, 7, 9, 10]]
    """
    x, y, z = (size // by for size in volume.shape)
    cut = volume[: x * by, : y * by, : z * by].reshape(x, by, y, by, z, by)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(x * y * z, by**3)


def most_frequent(votes: np.ndarray) -> np.ndarray:
    """The most frequent value of each row, (rows, voxels) to (rows); ties give the largest; the dtype is kept.

    >>> most_frequent(np.array([[0, 0, 4, 4], [1, 1, 1, 2], [0, 0, 0, 3]])).tolist()
    [4, 1, 0]
    """
    values = np.unique(votes)[::-1]
    counts = np.stack([np.count_nonzero(votes == value, axis=1) for value in values])  # (values, rows)
    return np.asarray(values[counts.argmax(0)])
