"""Two-stream batches: labelled samples first, then unlabelled ones, as random crops of volumes in memory.

The protocols differ: `paper` reproduces the authors' loader, for comparable scores; `held-out` has no such quirks.

|          | `paper`                                               | `held-out`                                       |
|----------|-------------------------------------------------------|--------------------------------------------------|
| mirror   | always one of the first two axes: never the identity  | every one of the 8 symmetries is equally likely  |
| crop     | the last offset of an axis is never drawn             | every offset is equally likely                   |
| padding  | if an axis is <= patch: all short axes, 3 voxels more | to the patch size, and by `crop_margin`          |
| streams  | the unlabelled order restarts with each labelled      | each stream has its own permutations             |
|          | epoch, whose incomplete last batch is dropped         |                                                  |

Random choices are made in `draw`, which takes microseconds; `cut` copies the voxels, with NumPy from RAM or with torch on the
device that holds the volumes. With several ranks, each draws the whole batch and cuts its own part.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rplib.errors import UserError
from rplib.reference.config import Config
from rplib.reference.datasets.cases import Case

Volume = np.ndarray | Tensor


class Crop(NamedTuple):
    """A crop of a case and its symmetry.

    The first two axes may be swapped, then each may be reversed; `start` is the patch's offset in the transformed
    volume. The patch may extend beyond the volume; it is zero there.
    """

    case: int  # index in the stream
    swapped: bool
    reversed: tuple[bool, bool]
    start: tuple[int, ...]


class BatchPlan(NamedTuple):
    """The crops of one batch by stream, and the case names, labelled ones first."""

    crops: list[list[Crop]]
    names: list[str]


class Batch(NamedTuple):
    """The inputs of one training step.

    Attributes:
        images: (B, channels, *patch) float32, labelled samples first; only this rank's part.
        labels: (B_l, *patch) uint8, of the labelled samples.
        names: case names of the whole batch, in the same order.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


class TwoStreamBatches:
    """Endless batches whose state can be saved and restored exactly.

    Labelled and unlabelled samples have separate generators: with the same seed, labelled-only and semi-supervised
    training see the same labelled crops.

    Args:
        labelled: cases with labels.
        unlabelled: the other cases; unused if all samples of a batch are labelled.
        rank, ranks: process ``rank`` of ``ranks`` cuts samples ``rank``, ``rank + ranks``, ... of each batch.
        device: where volumes are stored and cropped; None is RAM.

    Raises:
        UserError: a required stream is empty, or too short for one batch under ``paper``; fewer samples than
            ranks.
    """

    def __init__(
        self,
        labelled: Sequence[Case],
        unlabelled: Sequence[Case],
        config: Config,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | None = None,
    ) -> None:
        streams = [(list(labelled), config.labelled_per_batch, "labelled")]
        if not config.labelled_only:
            streams.append((list(unlabelled), config.batch_size - config.labelled_per_batch, "unlabelled"))
        for cases, number, what in streams:
            if len(cases) < (number if config.protocol == "paper" else 1):
                raise UserError(
                    f"there are {len(cases)} {what} cases for {number} {what} samples in a batch; "
                    "change labelled, labelled_per_batch or batch_size."
                )
        if config.batch_size < ranks:
            raise UserError(
                f"a batch of {config.batch_size} samples cannot be shared by {ranks} processes; raise batch_size or start fewer."
            )
        self._config = config
        self._as_authors = config.protocol == "paper"
        self._rank, self._ranks = rank, ranks
        self._streams = [
            _Stream(cases, number, np.random.default_rng([config.seed, index]), self._as_authors and index == 0)
            for index, (cases, number, _) in enumerate(streams)
        ]
        self._volumes = [[_volumes(case, len(config.patch), device) for case in stream.cases] for stream in self._streams]

    def next(self) -> Batch:
        """The next batch."""
        return self.cut(self.draw())

    def draw(self) -> BatchPlan:
        """Draw the next batch and advance the state."""
        labelled, *others = self._streams
        if self._as_authors and labelled.epoch_ends():
            for stream in others:
                stream.restart()
        crops = [[self._crop(stream, case) for case in stream.take()] for stream in self._streams]
        names = [stream.cases[crop.case].name for stream, found in zip(self._streams, crops, strict=True) for crop in found]
        return BatchPlan(crops, names)

    def cut(self, plan: BatchPlan, pinned: bool = False) -> Batch:
        """This rank's part of a drawn batch; does not change the state or synchronise the device.

        Args:
            pinned: use page-locked memory, for asynchronous copies to a GPU (volumes in RAM only).
        """
        mine = [(s, crop) for s, found in enumerate(plan.crops) for crop in found][self._rank :: self._ranks]
        first, _ = self._volumes[0][0]
        patch, known = self._config.patch, sum(s == 0 for s, _ in mine)
        on_device = isinstance(first, Tensor)
        where: dict[str, Any] = {"device": first.device} if isinstance(first, Tensor) else {"pin_memory": pinned}
        images = torch.empty(len(mine), len(first), *patch, **where)
        labels = torch.empty(known, 1, *patch, dtype=torch.uint8, **where)
        for i, (s, crop) in enumerate(mine):
            image, label = self._volumes[s][crop.case]
            cut(image, crop, patch, images[i] if on_device else images[i].numpy())
            if s == 0:
                assert label is not None
                cut(label, crop, patch, labels[i] if on_device else labels[i].numpy())
        return Batch(images, labels[:, 0], plan.names)

    def state(self) -> str:
        """Position and generators of all streams, JSON-serialisable."""
        return json.dumps([stream.state() for stream in self._streams])

    def restore(self, state: str) -> None:
        """Restore a state of the same cases and configuration.

        Raises:
            ValueError: the number of streams differs.
        """
        for stream, saved in zip(self._streams, json.loads(state), strict=True):
            stream.restore(saved)

    def _crop(self, stream: "_Stream", case: int) -> Crop:
        """A random symmetry of the first two axes, and a random position in the padded volume."""
        random, patch = stream.random, self._config.patch
        swapped, back = False, [False, False]
        if self._config.augmentation == "mirror-rotate":
            quarters, axis = int(random.integers(4)), int(random.integers(2))
            # A quarter turn swaps the axes and reverses the first; three of them, the second; two reverse both.
            swapped, back = quarters % 2 == 1, [quarters in (1, 2), quarters in (2, 3)]
            back[axis] ^= self._as_authors or bool(random.integers(2))
        shape = list(stream.cases[case].image.shape[-len(patch) :])
        if swapped:
            shape[:2] = shape[1::-1]
        start = []
        for size, edge, (before, after) in zip(shape, patch, padding(shape, patch, self._as_authors), strict=True):
            margin = self._config.crop_margin if edge > 1 else 0  # no margin across slices
            before, after = before + margin, after + margin
            spare = before + size + after - edge
            start.append(int(random.integers(spare if self._as_authors else spare + 1)) - before)
        return Crop(case, swapped, (back[0], back[1]), tuple(start))


def padding(shape: Sequence[int], patch: Sequence[int], as_authors: bool = False) -> list[tuple[int, int]]:
    """Padding before and after each axis of a volume, so that a patch fits.

    Args:
        as_authors: pad if any axis is not *larger* than the patch, with 3 voxels more than needed.
    """
    short = [edge - size for size, edge in zip(shape, patch, strict=True)]
    if as_authors:
        spare = [max(s // 2 + 3, 0) if max(short) >= 0 else 0 for s in short]
        return [(s, s) for s in spare]
    return [(max(s, 0) // 2, max(s, 0) - max(s, 0) // 2) for s in short]


def cut(volume: Any, crop: Crop, patch: Sequence[int], out: Any) -> None:
    """Fill `out` (channels, *patch) with a crop of `volume` (channels, *spatial), both in RAM or both on a device."""
    flip: Any = torch.flip if isinstance(volume, Tensor) else np.flip
    shape = list(volume.shape[1:])
    if crop.swapped:
        shape[:2] = shape[1::-1]
    # The box in the transformed volume, then the same box before the transform: only these voxels are read.
    turned = [(max(s, 0), min(s + edge, size)) for s, edge, size in zip(crop.start, patch, shape, strict=True)]
    box = turned.copy()
    for axis, back in enumerate(crop.reversed):
        if back:
            low, high = box[axis]
            box[axis] = shape[axis] - high, shape[axis] - low
    if crop.swapped:
        box[:2] = box[1::-1]
    piece = volume[(slice(None), *(slice(low, high) for low, high in box))]
    if crop.swapped:
        piece = piece.swapaxes(1, 2)
    backwards = tuple(1 + axis for axis, back in enumerate(crop.reversed) if back)
    if backwards:
        piece = flip(piece, backwards)
    if tuple(piece.shape[1:]) != tuple(patch):
        out[:] = 0
    place = (slice(low - s, high - s) for (low, high), s in zip(turned, crop.start, strict=True))
    out[(slice(None), *place)] = piece


def _volumes(case: Case, dims: int, device: torch.device | None) -> tuple[Volume, Volume | None]:
    """Image (channels, *spatial) and label (1, *spatial), on the device if given."""
    image: Volume = case.image if case.image.ndim > dims else case.image[None]
    label: Volume | None = None if case.label is None else case.label[None]
    if device is None:
        return image, label
    return torch.from_numpy(image).to(device), None if label is None else torch.from_numpy(label).to(device)


class _Stream:
    """An endless random order of cases: one permutation after another."""

    def __init__(self, cases: list[Case], number: int, random: np.random.Generator, drop_rest: bool) -> None:
        self.cases, self.number, self.random, self.drop_rest = cases, number, random, drop_rest
        self.left: list[int] = []  # rest of the current permutation

    def epoch_ends(self) -> bool:
        return len(self.left) < self.number

    def restart(self) -> None:
        self.left = []

    def take(self) -> list[int]:
        if self.drop_rest and self.epoch_ends():
            self.left = []
        while len(self.left) < self.number:
            self.left += self.random.permutation(len(self.cases)).tolist()
        taken, self.left = self.left[: self.number], self.left[self.number :]
        return taken

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "random": self.random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        self.left = [int(i) for i in state["left"]]
        self.random.bit_generator.state = state["random"]
