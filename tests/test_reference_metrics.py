"""Metrics: exactly the golden numbers, cases worked by hand, and what happens where there is nothing to measure."""

import math

import numpy as np
import pytest
import torch
from data_paths import golden_dir

from rplib.reference.evaluation import metrics
from rplib.reference.inference.components import largest_component


def _box(shape, *ranges):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


@pytest.fixture(scope="module")
def golden():
    return np.load(golden_dir() / "metrics.npz")


@pytest.mark.parametrize("case", range(4))
def test_golden(golden, case):
    prediction, truth = golden[f"pred_{case}"], golden[f"gt_{case}"]
    spacing = tuple(golden["spacing"])
    columns = list(golden["columns"])
    expected = dict(zip(columns, golden["values"][case], strict=True))

    plain = metrics.score(prediction, truth, spacing)
    largest = largest_component(prediction)
    np.testing.assert_array_equal(largest, golden[f"largest_{case}"])
    kept = metrics.score(largest, truth)
    ours = {
        "dice": plain.dice,
        "jaccard": plain.jaccard,
        "hd95": plain.hd95,
        "asd": plain.asd,
        "hd95_spacing": plain.hd95_mm,
        "asd_spacing": plain.asd_mm,
        "asd_spacing_gt_to_pred": metrics.asd(truth, prediction, spacing),
        "assd_spacing": metrics.assd(prediction, truth, spacing),
        "dice_largest": kept.dice,
        "jaccard_largest": kept.jaccard,
        "hd95_largest": kept.hd95,
        "asd_largest": kept.asd,
    }
    assert set(ours) == set(columns)
    assert ours == expected  # to the last bit
    assert metrics.hd95(prediction, truth) == expected["hd95"]
    assert metrics.asd(prediction, truth) == expected["asd"]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
def test_the_surface_distance_is_monai_s_and_the_hausdorff_distance_is_not(golden):
    from monai.metrics import HausdorffDistanceMetric, SurfaceDistanceMetric

    different = 0
    for case in range(4):
        prediction, truth = golden[f"pred_{case}"], golden[f"gt_{case}"]
        batch = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
        mean = SurfaceDistanceMetric(include_background=True)(*batch).item()
        assert metrics.asd(prediction, truth) == pytest.approx(mean, rel=1e-6)
        directed = HausdorffDistanceMetric(include_background=True, percentile=95)(*batch).item()
        different += not math.isclose(metrics.hd95(prediction, truth), directed, rel_tol=1e-6)
    assert different > 0  # else the own code would be needless


def test_two_voxels_three_apart():
    prediction, truth = _box((9, 9, 9), (2, 3), (4, 5), (4, 5)), _box((9, 9, 9), (5, 6), (4, 5), (4, 5))
    assert metrics.score(prediction, truth, (0.5, 1, 1)) == metrics.Scores(0.0, 0.0, 3.0, 3.0, 1.5, 1.5)


def test_a_bar_one_voxel_too_long():
    # Truth: 4 voxels in a row, prediction: 5, all surface. Prediction -> truth: 0, 0, 0, 0, 1; truth -> prediction: 0.
    truth, prediction = _box((8, 3), (1, 5), (1, 2)), _box((8, 3), (1, 6), (1, 2))
    scores = metrics.score(prediction, truth)
    assert scores.dice == 8 / 9
    assert scores.jaccard == 4 / 5
    assert scores.asd == 1 / 5
    assert scores.hd95 == pytest.approx(0.6)  # sorted nine distances, position 0.95 * 8 = 7.6: 0 + 0.6 * 1
    assert metrics.asd(truth, prediction) == 0.0


def test_inner_voxels_are_no_surface_and_the_border_of_the_image_is():
    truth = np.ones((5, 5), dtype=bool)  # 16 of 25 voxels are surface
    prediction = _box((5, 5), (2, 3), (2, 3))
    assert metrics.asd(prediction, truth) == 2.0
    assert metrics.asd(truth, prediction) == pytest.approx((4 * 2 + 8 * math.sqrt(5) + 4 * math.sqrt(8)) / 16)


def test_perfect():
    mask = _box((6, 7, 8), (1, 4), (2, 6), (3, 8))
    assert metrics.score(mask, mask, (1, 2, 3)) == metrics.Scores(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("prediction_empty", "truth_empty"), [(True, False), (False, True), (True, True)])
def test_empty_masks_have_no_distances(prediction_empty, truth_empty):
    mask, empty = _box((6, 6, 6), (1, 4), (2, 6), (3, 5)), np.zeros((6, 6, 6), dtype=bool)
    scores = metrics.score(empty if prediction_empty else mask, empty if truth_empty else mask, (1, 1, 1))
    assert all(math.isnan(value) for value in (scores.hd95, scores.asd, scores.hd95_mm, scores.asd_mm))
    if prediction_empty and truth_empty:
        assert math.isnan(scores.dice)
        assert math.isnan(scores.jaccard)
    else:
        assert scores.dice == scores.jaccard == 0.0


def test_largest_component_of_nothing_is_nothing():
    assert not largest_component(np.zeros((3, 3, 3))).any()


def test_largest_component_joins_corners_and_prefers_the_first_of_equals():
    mask = np.zeros((6, 6), dtype=bool)
    mask[0, 0] = mask[1, 1] = True
    mask[4, 4] = mask[5, 5] = True
    expected = np.zeros_like(mask)
    expected[0, 0] = expected[1, 1] = True
    np.testing.assert_array_equal(largest_component(mask), expected)


def test_labels_other_than_one_count_as_inside():
    truth = np.array([0, 2, 2, 0], dtype=np.uint8)
    assert metrics.dice(truth, truth > 0) == 1.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3, 3\) but truth has \(3, 4\)"):
        metrics.dice(np.ones((3, 3)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="one per axis: 2"):
        metrics.hd95(np.ones((3, 3)), np.ones((3, 3)), (1, 1, 1))
