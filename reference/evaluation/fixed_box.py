"""A trivial baseline: one fixed box, placed where the organ usually is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GRID = 64  # box edges are multiples of 1/64 of the volume


class FixedBox(NamedTuple):
    """An axis-aligned box in fractions of a volume's size, since volumes differ in size.

    ``low`` and ``high`` are in 0..1, one per axis; in a volume of n voxels the box covers round(low * n) to
    round(high * n) - 1.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    training_dice: float  # mean over the cases that it was fitted to

    def mask(self, shape: Sequence[int]) -> NDArray[np.uint8]:
        """The box in a volume of this shape: 1 inside, 0 outside.

        >>> FixedBox((0.25, 0.0), (0.75, 0.5), 1.0).mask((4, 2)).tolist()
        [[0, 0], [1, 0], [1, 0], [0, 0]]
        """
        inside = np.zeros(tuple(shape), dtype=np.uint8)
        inside[tuple(slice(_voxel(a, n), _voxel(b, n)) for a, b, n in zip(self.low, self.high, shape, strict=True))] = 1
        return inside

    def __str__(self) -> str:
        return " x ".join(f"{a:.3f}..{b:.3f}" for a, b in zip(self.low, self.high, strict=True))


def fit_box(labels: Sequence[NDArray]) -> FixedBox:
    """The box with the largest mean Dice over labelled cases, in coordinates relative to each volume.

    Coordinate ascent: all pairs of edges of one axis are tried with the other axes fixed, until nothing improves, starting
    from the whole volume, the mean bounding box, and the box of each case. No change of a single axis can improve the
    result; an exhaustive search would try 64^6 boxes.

    Args:
        labels: nonempty sequence of (*spatial) masks of any sizes; nonzero is inside.

    >>> label = np.zeros((64, 64, 64)); label[16:32, 8:24, 8:40] = 1
    >>> fit_box([label])
    FixedBox(low=(0.25, 0.125, 0.125), high=(0.5, 0.375, 0.625), training_dice=1.0)
    """
    masks = [np.asarray(label) != 0 for label in labels]
    masks = [mask for mask in masks if mask.any()]
    if not masks:
        raise ValueError("labels has no foreground voxel in any case; a box needs one")
    best_edges, best = None, -1.0
    for start in _starts(masks):
        edges, dice = _ascend(masks, start)
        if dice > best:
            best_edges, best = edges, dice
    assert best_edges is not None
    low, high = (best_edges / GRID).T
    return FixedBox(tuple(low.tolist()), tuple(high.tolist()), best)


def _voxel(fraction: float, size: int) -> int:
    return int(np.floor(fraction * size + 0.5))


def _starts(masks: list[NDArray]) -> list[NDArray]:
    """Starting points, each with (axes, 2) edges on the grid."""
    own = []
    for mask in masks:
        edges = []
        for axis, size in enumerate(mask.shape):
            where = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
            edges.append((where[0] / size, (where[-1] + 1) / size))
        own.append(edges)
    guesses = np.rint(np.array([*own, np.mean(own, axis=0)]) * GRID).astype(int)
    whole = np.tile([0, GRID], (masks[0].ndim, 1))
    return [whole, *np.unique(guesses, axis=0)]


def _ascend(masks: list[NDArray], edges: NDArray) -> tuple[NDArray, float]:
    edges, best = edges.copy(), -1.0
    while True:
        before = best
        for axis in range(len(edges)):
            dice = _dice_of_all_edges(masks, edges, axis)  # (GRID + 1, GRID + 1)
            if dice.max() > best:
                best = float(dice.max())
                edges[axis] = np.unravel_index(dice.argmax(), dice.shape)
        if best <= before:
            return edges, best


def _dice_of_all_edges(masks: list[NDArray], edges: NDArray, axis: int) -> NDArray:
    """Mean Dice for every (low, high) of one axis, with the other axes' edges fixed."""
    total = np.zeros((GRID + 1, GRID + 1))
    for mask in masks:
        others = [a for a in range(mask.ndim) if a != axis]
        window: list[slice] = [slice(None)] * mask.ndim
        area = 1
        for a in others:
            start, stop = (_voxel(edge / GRID, mask.shape[a]) for edge in edges[a])
            window[a], area = slice(start, stop), area * (stop - start)
        profile = np.count_nonzero(mask[tuple(window)], axis=tuple(others))  # (size of the axis,)
        size = mask.shape[axis]
        inside = np.concatenate([[0], np.cumsum(profile)])
        positions = np.array([_voxel(i / GRID, size) for i in range(GRID + 1)])
        lengths = positions[None, :] - positions[:, None]  # high minus low
        hits = inside[positions][None, :] - inside[positions][:, None]
        total += np.where(lengths > 0, 2 * hits / (np.maximum(lengths, 0) * area + np.count_nonzero(mask)), 0)
    return total / len(masks)
