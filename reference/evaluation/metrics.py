"""Overlap metrics and surface distances of two masks.

Implemented with SciPy's distance transform instead of MONAI's metrics of the same names, for scores comparable with
published ones: MONAI's 95 % Hausdorff distance is the larger of two directed percentiles, the published one (medpy)
pools the distances of both directions, and they differ in half of the cases. MONAI also counts in float32.
tests/test_reference_metrics.py compares with both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Scores of one mask against the ground truth; NaN is a missing score, for example a distance to an empty mask.

    ``hd95`` and ``asd`` are in voxels, ``hd95_mm`` and ``asd_mm`` in the unit of the spacing (NaN without one).
    """

    dice: float
    jaccard: float
    hd95: float
    asd: float
    hd95_mm: float = float("nan")
    asd_mm: float = float("nan")


def score(prediction: NDArray, truth: NDArray, spacing: Sequence[float] | None = None) -> Scores:
    """Compute all scores of one mask.

    Args:
        prediction, truth: (*spatial) masks, nonzero is inside.
        spacing: edge lengths of a voxel in mm, one per axis; None gives no distances in mm.

    An empty prediction of a nonempty truth has Dice and Jaccard 0 and distances NaN (the authors' 0 would look like a
    perfect surface). Two empty masks have Dice NaN (0/0).

    >>> truth = np.zeros((5, 5)); truth[1:4, 1:4] = 1
    >>> shifted = np.roll(truth, 1, axis=0)
    >>> scores = score(shifted, truth, spacing=(2.0, 1.0))
    >>> round(scores.dice, 4), round(scores.jaccard, 4), scores.hd95, scores.hd95_mm
    (0.6667, 0.5, 1.0, 2.0)
    """
    prediction, truth = _as_masks(prediction, truth)
    voxel = _both_ways(prediction, truth, None)
    millimetre = _both_ways(prediction, truth, spacing) if spacing is not None else None
    return Scores(
        dice=dice(prediction, truth),
        jaccard=jaccard(prediction, truth),
        hd95=_pooled_95(voxel),
        asd=_mean(voxel[0]),
        hd95_mm=_pooled_95(millimetre) if millimetre else float("nan"),
        asd_mm=_mean(millimetre[0]) if millimetre else float("nan"),
    )


def dice(prediction: NDArray, truth: NDArray) -> float:
    """2 |A and B| / (|A| + |B|); NaN for two empty masks.

    >>> dice(np.array([1, 1, 0]), np.array([0, 1, 1]))
    0.5
    """
    prediction, truth = _as_masks(prediction, truth)
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * int(np.count_nonzero(prediction & truth)) / int(total) if total else float("nan")


def jaccard(prediction: NDArray, truth: NDArray) -> float:
    """|A and B| / |A or B|; NaN for two empty masks.

    >>> jaccard(np.array([1, 1, 0]), np.array([1, 1, 1])) == 2 / 3
    True
    """
    prediction, truth = _as_masks(prediction, truth)
    union = np.count_nonzero(prediction | truth)
    return int(np.count_nonzero(prediction & truth)) / int(union) if union else float("nan")


def hd95(prediction: NDArray, truth: NDArray, spacing: Sequence[float] | None = None) -> float:
    """95th percentile of the distances prediction -> truth and truth -> prediction, pooled; NaN if a mask is empty."""
    prediction, truth = _as_masks(prediction, truth)
    return _pooled_95(_both_ways(prediction, truth, spacing))


def asd(prediction: NDArray, truth: NDArray, spacing: Sequence[float] | None = None) -> float:
    """Mean distance from the prediction's surface to the truth's, one way as published; NaN if a mask is empty."""
    prediction, truth = _as_masks(prediction, truth)
    return _mean(_both_ways(prediction, truth, spacing)[0])


def assd(prediction: NDArray, truth: NDArray, spacing: Sequence[float] | None = None) -> float:
    """Mean of both directions' surface distances, pooled (not the mean of two means); NaN if a mask is empty."""
    prediction, truth = _as_masks(prediction, truth)
    return _mean(np.concatenate(_both_ways(prediction, truth, spacing)))


def _as_masks(prediction: NDArray, truth: NDArray) -> tuple[Mask, Mask]:
    prediction, truth = np.asarray(prediction) != 0, np.asarray(truth) != 0
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but truth has {truth.shape}; they must be equal")
    return prediction, truth


def _both_ways(prediction: Mask, truth: Mask, spacing: Sequence[float] | None) -> tuple[NDArray, NDArray]:
    """Distances of every surface voxel of one mask to the other's surface: (prediction -> truth, truth -> prediction).

    A surface voxel is inside and has a face neighbour outside, or is at the image's border. Both arrays are empty if
    either mask is.
    """
    if spacing is not None and len(spacing) != prediction.ndim:
        raise ValueError(f"spacing has {len(spacing)} numbers, expected one per axis: {prediction.ndim}")
    if not prediction.any() or not truth.any():
        return np.empty(0), np.empty(0)
    # Only the box around both masks matters; cropping to it makes the transform several times faster.
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    prediction, truth = prediction[box], truth[box]
    surface_p, surface_t = (mask & ~ndimage.binary_erosion(mask) for mask in (prediction, truth))
    to_t = ndimage.distance_transform_edt(~surface_t, sampling=spacing)
    to_p = ndimage.distance_transform_edt(~surface_p, sampling=spacing)
    return to_t[surface_p], to_p[surface_t]


def _pooled_95(distances: tuple[NDArray, NDArray]) -> float:
    pooled = np.concatenate(distances)
    return float(np.percentile(pooled, 95)) if pooled.size else float("nan")


def _mean(distances: NDArray) -> float:
    return float(distances.mean()) if distances.size else float("nan")
