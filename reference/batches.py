"""Two-stream batches: labelled samples first, unlabelled after them, cut at random from volumes in memory.

The protocols differ (`paper` repeats what the authors' loader does, so that numbers compare; `held-out` does it right):

|          | `paper`                                               | `held-out`                                       |
|----------|-------------------------------------------------------|--------------------------------------------------|
| mirror   | always one of the first two axes: never the identity  | every one of the 8 symmetries is equally likely  |
| crop     | the last offset of an axis is never drawn             | every offset is equally likely                   |
| padding  | where an axis is <= patch: all short axes, 3 spare    | to the patch, nothing spare                      |
| streams  | the unlabelled order starts anew with each labelled   | each stream runs through its own permutations    |
|          | epoch, whose incomplete last batch is dropped         |                                                  |
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rplib.errors import UserError
from rplib.reference.cases import Case
from rplib.reference.config import Config


class Batch(NamedTuple):
    """What one training step sees.

    Attributes:
        images: (B, channels, *patch) float32, labelled samples first.
        labels: (B_l, *patch) uint8, of those.
        names: B case names, in the same order.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


class TwoStreamBatches:
    """Endless batches whose state can be saved and restored to the bit.

    Labelled and unlabelled samples have generators of their own, seeded apart: a labelled-only training with the same
    seed sees the same labelled crops as a semi-supervised one.

    Args:
        labelled: cases with labels.
        unlabelled: the others; not used where every sample of a batch is labelled.

    Raises:
        UserError: a stream that the batch needs is empty, or too short for one batch under ``paper``.
    """

    def __init__(self, labelled: Sequence[Case], unlabelled: Sequence[Case], config: Config) -> None:
        streams = [(list(labelled), config.labelled_per_batch, "labelled")]
        if not config.labelled_only:
            streams.append((list(unlabelled), config.batch_size - config.labelled_per_batch, "unlabelled"))
        for cases, number, what in streams:
            if len(cases) < (number if config.protocol == "paper" else 1):
                raise UserError(
                    f"there are {len(cases)} {what} cases for {number} {what} samples in a batch; "
                    "change labelled, labelled_per_batch or batch_size."
                )
        self._config = config
        self._as_authors = config.protocol == "paper"
        self._streams = [
            _Stream(cases, number, np.random.default_rng([config.seed, index]), drop_rest=self._as_authors and index == 0)
            for index, (cases, number, _) in enumerate(streams)
        ]

    def next(self) -> Batch:
        """The next batch."""
        labelled, *others = self._streams
        if self._as_authors and labelled.epoch_ends():
            for stream in others:
                stream.restart()
        images, labels, names = [], [], []
        for stream in self._streams:
            for case in stream.take():
                image, label = self._sample(case, stream.random)
                images.append(image)
                names.append(case.name)
                if stream is labelled:
                    labels.append(label)
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), names)

    def state(self) -> str:
        """Position and generators of all streams, as JSON."""
        return json.dumps([stream.state() for stream in self._streams])

    def restore(self, state: str) -> None:
        """Go on from a state of the same cases and configuration.

        Raises:
            ValueError: the state has another number of streams.
        """
        for stream, saved in zip(self._streams, json.loads(state), strict=True):
            stream.restore(saved)

    def _sample(self, case: Case, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image (channels, *patch) and label (*patch) of one random crop."""
        image = case.image if case.image.ndim > len(self._config.patch) else case.image[None]  # (channels, *spatial)
        label = case.label if case.label is not None else np.broadcast_to(np.uint8(0), image.shape[1:])
        arrays = [image, label[None]]
        # Turning the whole volume is free (views) and keeps the patch's own shape after a quarter turn.
        if self._config.augmentation == "mirror-rotate":
            quarters = int(random.integers(4))
            axis = int(random.integers(2))
            mirrored = self._as_authors or bool(random.integers(2))
            arrays = [np.rot90(a, quarters, axes=(1, 2)) for a in arrays]
            arrays = [np.flip(a, axis + 1) for a in arrays] if mirrored else arrays
        arrays = [pad(a, self._config.patch, as_authors=self._as_authors) for a in arrays]
        start = [
            int(random.integers(size - edge if self._as_authors else size - edge + 1))
            for size, edge in zip(arrays[0].shape[1:], self._config.patch, strict=True)
        ]
        window = (slice(None), *(slice(s, s + edge) for s, edge in zip(start, self._config.patch, strict=True)))
        return np.ascontiguousarray(arrays[0][window]), np.ascontiguousarray(arrays[1][window][0])


def pad(volume: np.ndarray, patch: Sequence[int], as_authors: bool = False) -> np.ndarray:
    """Zeros around a volume that is smaller than the patch, so that a patch fits.

    Args:
        volume: (*spatial), or (channels, *spatial): axes before the last ``len(patch)`` are left alone.
        as_authors: they pad as soon as one axis is not *larger* than the patch, and leave 3 voxels more than needed.
    """
    others = [(0, 0)] * (volume.ndim - len(patch))
    short = [edge - size for edge, size in zip(patch, volume.shape[len(others) :], strict=True)]
    if as_authors:
        if max(short) < 0:
            return volume
        return np.pad(volume, others + [(max(s // 2 + 3, 0),) * 2 for s in short])
    if max(short) <= 0:
        return volume
    return np.pad(volume, others + [(max(s, 0) // 2, max(s, 0) - max(s, 0) // 2) for s in short])


class _Stream:
    """Cases in random order without end: permutation after permutation."""

    def __init__(self, cases: list[Case], number: int, random: np.random.Generator, drop_rest: bool) -> None:
        self.cases, self.number, self.random, self.drop_rest = cases, number, random, drop_rest
        self.left: list[int] = []  # what is left of the present permutation

    def epoch_ends(self) -> bool:
        return len(self.left) < self.number

    def restart(self) -> None:
        self.left = []

    def take(self) -> list[Case]:
        if self.drop_rest and self.epoch_ends():
            self.left = []
        while len(self.left) < self.number:
            self.left += self.random.permutation(len(self.cases)).tolist()
        taken, self.left = self.left[: self.number], self.left[self.number :]
        return [self.cases[i] for i in taken]

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "random": self.random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        self.left = [int(i) for i in state["left"]]
        self.random.bit_generator.state = state["random"]
