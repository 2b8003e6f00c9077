"""The row of pictures on the front page: which case and slice it takes, what each panel shows."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from rplib.reference.config import load_recipe
from rplib.reference.datasets.cases import Case
from rplib.reference.evaluation.metrics import Scores
from rplib.reference.evaluation.reliability import ReliabilityMaps
from rplib.reference.evaluation.scoring import CaseScores, Report
from rplib.reference.inference.windows import DECODER_1
from rplib.reference.reporting.decisions import decision_panels, median_case, write_decisions

SIZE = (20, 16, 8)


@pytest.fixture
def report():
    """Four cases with Dice 0.9, 0.2, 0.6, 0.4; their organ is largest in slice 5."""
    label = np.zeros(SIZE, np.uint8)
    label[5:9, 4:8, 3:7] = 1
    label[4:12, 4:12, 5] = 1
    image = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    dice = dict(zip("abcd", (0.9, 0.2, 0.6, 0.4), strict=True))
    rows = [CaseScores(name, DECODER_1, 1, Scores(value, value, 1.0, 1.0)) for name, value in dice.items()]
    maps = ReliabilityMaps(np.ones(SIZE, np.float32), np.full(SIZE, 0.7, np.float32), label, (label, label))
    dataset = SimpleNamespace(load=lambda name, needs_label=False: Case(name, image, label), axes=("x", "y", "z"))
    predictions = dict.fromkeys(dice, label)
    config = load_recipe("la-8")
    return Report(rows, predictions, {}, config, dataset, config.stride, ["note"], maps=dict.fromkeys(dice, maps))


def test_the_case_is_the_median_and_not_the_best(report):
    assert median_case(report) == "d"


def test_panels_show_image_which_how_prediction_on_one_slice(report):
    panels = decision_panels(report, "d")
    assert [panel.overlay is not None for panel in panels] == [False, True, True, False]
    assert {(panel.axis, panel.position) for panel in panels} == {(2, 5)}
    assert panels[1].overlay.values is report.maps["d"].which
    assert panels[2].overlay.values is report.maps["d"].how
    assert [len(panel.outlines) for panel in panels] == [1, 0, 0, 2]


def test_the_picture_is_drawn(report, tmp_path):
    write_decisions(report, tmp_path / "row.png")
    picture = imread(tmp_path / "row.png")
    assert picture.shape[1] > 3 * picture.shape[0]  # one row
    assert picture[..., :3].std() > 0.1


def test_a_case_without_maps_is_named(report, tmp_path):
    report.maps.pop("d")
    with pytest.raises(KeyError, match="'d'"):
        write_decisions(report, tmp_path / "row.png")
