"""The page of an evaluation, the reliability maps on it, and the curves: what they hold, and that they need nothing else."""

import base64
import csv
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from reference_tools import TINY, write_dataset

import rplib
from rplib import cli
from rplib.reference.config import KEYS, load_recipe
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.evaluation.reliability import ReliabilityMaps, map_stride, reliability_maps, verdict
from rplib.reference.evaluation.scoring import evaluate
from rplib.reference.inference.windows import DECODER_1
from rplib.reference.network import MutualVNet
from rplib.reference.reporting import pictures
from rplib.reference.reporting.curves import binned, curves_png, curves_svg
from rplib.reference.reporting.page import page
from rplib.reference.reporting.run_log import LogRow
from rplib.reference.reporting.sheets import map_panels, scales
from rplib.reference.reporting.tables import mean_cell, shown
from rplib.reference.training.trainer import train

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page and checks that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images, self.ids, self.text = [], [], [], set(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[key] for key in ("src", "href", "srcset", "xlink:href", "action", "data") if key in found]
        self.ids.add(found.get("id"))
        if tag == "img":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, train=5, test=3)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = ["protocol=paper", "validate_from=4", "validate_every=4", "name=<b>mine</b>", "learning_rate=0.05"]
    train(load_recipe("la-4", [*TINY, *changes]), data, folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def out(run, data):
    assert cli.main(["evaluate", str(run), "--data", str(data), "--pictures", "2", "--nifti", "none", "--device", "cpu"]) == 0
    return run / "evaluation-test"


@pytest.fixture(scope="module")
def report(run, data):
    return evaluate(run, data, device="cpu", maps=2)


def test_the_page_needs_no_other_file(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert "<script" not in text and "@import" not in text and "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert found.links
    for link in found.links:
        assert link.startswith("data:image/png;base64,") or (link.startswith("#") and link[1:] in found.ids)
    names_alone = r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>'  # addresses that only name a format
    assert "://" not in re.sub(names_alone, "", text, flags=re.DOTALL)
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text


def test_the_page_holds_all_of_it(out, report):
    found = Page((out / "report.html").read_text(encoding="utf-8"))
    text = " ".join(found.text)
    assert "<b>mine</b>: 3 test cases" in text  # as text, not as a tag
    assert "WEIGHTS SELECTED ON THE TEST LIST" in text
    for note in report.notes:
        assert note in text
    for metric in ("dice", "jaccard", "hd95", "asd"):
        for method in report.methods:
            assert mean_cell(report, method, metric) in text
    for row in report.rows:
        if row.method == DECODER_1:
            assert row.case in text and shown(row.scores.hd95, "hd95") in text
    for key in KEYS:
        assert key in found.text
    assert "Dice of decoder 1 on the TEST list" in text  # the curve
    assert str(torch.__version__) in text
    # two cases: three planes as they are, three with which, three with how; and the colours of both maps
    pixels = [imread(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) for image in found.images]
    assert len(pixels) == 2 * 9 + 2
    assert all(image["alt"] for image in found.images)
    worst = report.worst_first()[:2]
    named = [image["alt"].split(",")[0] for image in found.images if "," in image["alt"]]
    assert named == [worst[0]] * 3 + [worst[1]] * 3 + [worst[0]] * 6 + [worst[1]] * 6


def test_without_run_maps_or_pictures_their_sections_are_left_out(report):
    bare = Page(page(replace(report, run=None, maps={}), pictures=0))
    assert bare.images == []
    assert {"results", "cases", "settings"} <= bare.ids
    assert not {"curves", "reliability", "pictures"} & bare.ids


def test_a_damaged_metrics_file_is_reported_on_the_page(report, tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    assert "No curves: " in page(replace(report, run=tmp_path, maps={}), pictures=0)


def test_the_settings_name_what_differs_from_the_recipe(report):
    config = load_recipe("la-4", ["seed=7", "filters=4"])
    text = page(replace(report, config=config, run=None, maps={}), pictures=0)
    assert "2 settings differ from the recipe la-4" in text
    assert re.findall(r"<tr class=changed><td>(\w+)</td><td>(\w+)</td><td>(\w+)</td>", text) == [
        ("filters", "4", "16"),
        ("seed", "7", "1337"),
    ]


# --- the maps


def test_maps_of_one_window_are_what_the_loss_takes():
    config = load_recipe("la-8", ["patch=16,16,16", "stride=16,16,16", "filters=2"])
    torch.manual_seed(0)
    network = MutualVNet(filters=2).eval()
    image = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    maps = reliability_maps(network, image, config, (16, 16, 16))
    with torch.no_grad():
        logits, features = network(torch.from_numpy(image)[None, None])
    student_0, student_1 = rplib.reliability(logits, features)
    assert 0.02 < student_0.mask.float().mean() < 0.98
    np.testing.assert_array_equal(maps.which, (student_1.mask.float() - student_0.mask.float())[0].numpy())
    taught = torch.where(student_0.mask, student_0.pseudo_label, student_1.pseudo_label)[0].numpy()
    somebody = (student_0.mask | student_1.mask)[0].numpy()
    np.testing.assert_array_equal(maps.taught[somebody], taught[somebody])
    weight = (student_0.weight + student_1.weight)[0].numpy()
    np.testing.assert_allclose(maps.how[somebody], weight[somebody], rtol=1e-5)
    assert np.isnan(maps.how[~somebody]).all()
    for decoder in (0, 1):
        np.testing.assert_array_equal(maps.labels[decoder], logits[decoder].argmax(1)[0].numpy())


def test_overlapping_windows_are_averaged():
    config = load_recipe(
        "la-8", ["patch=16,16,16", "stride=8,16,16", "filters=2", "method=cross-pseudo-supervision"]
    )  # asked all the same
    torch.manual_seed(0)
    network = MutualVNet(filters=2).eval()
    image = np.random.default_rng(1).normal(size=(24, 16, 16)).astype(np.float32)
    single, together = (reliability_maps(network, image, config, (8, 16, 16), batch=n) for n in (1, 2))
    np.testing.assert_allclose(single.which, together.which, atol=1e-6)
    first, second = (reliability_maps(network, image[start : start + 16], config, (16, 16, 16)) for start in (0, 8))
    np.testing.assert_array_equal(single.which[:8], first.which[:8])
    np.testing.assert_allclose(single.which[8:16], (first.which[8:] + second.which[:8]) / 2, atol=1e-6)
    np.testing.assert_allclose(single.how[8:16], (first.how[8:] + second.how[:8]) / 2, atol=1e-6)
    assert 0.02 < (first.which[8:] != second.which[:8]).mean() < 0.98


def test_the_stride_of_the_maps_is_no_finer_than_half_a_patch():
    config = load_recipe("pancreas-6")
    assert map_stride(config, config.stride) == (48, 48, 48)
    assert map_stride(config, (96, 64, 16)) == (96, 64, 48)


def test_no_voxel_to_judge():
    empty = np.zeros((2, 2), np.uint8)
    found = verdict(ReliabilityMaps(np.zeros((2, 2)), np.full((2, 2), np.nan), empty, (empty, empty)), empty)
    assert found.disagreement == 0
    assert all(math.isnan(value) for name, value in found._asdict().items() if name != "disagreement")


def test_reliability_csv_is_the_verdict_of_the_maps(out, report, data):
    with open(out / "reliability.csv", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert list(rows) == report.worst_first()[:2]
    for name, maps in report.maps.items():
        found = verdict(maps, open_dataset(data).load(name).label)
        assert int(rows[name]["disagreement"]) == found.disagreement
        assert float(rows[name]["weight_right"]) == pytest.approx(found.weight_right)


def test_map_panels_are_the_slices_of_the_pictures(report, data):
    case: Case = open_dataset(data).load(report.worst_first()[0])
    which, how = map_panels(report, case)
    assert [panel.axis for panel in which] == [panel.axis for panel in how] == [2, 1, 0]
    assert all(panel.overlay.scale == scales(report)[0] for panel in which)
    assert (imread(io.BytesIO(pictures.panel_png(which[0]))) != imread(io.BytesIO(pictures.panel_png(how[0])))).any()


# --- colours and curves


def test_colours_of_a_map():
    plain, fading = (pictures.Scale("gray", 0.5, 1.0, "", ("", ""), fades) for fades in (False, True))
    values = np.array([0.2, 0.5, 0.75, 1.0, np.nan])
    np.testing.assert_allclose(plain.rgba(values)[:4, 0], [0, 0, 0.5, 1], atol=0.01)
    assert (plain.rgba(values)[:4, 3] == plain.rgba(values)[0, 3]).all() and plain.rgba(values)[4, 3] == 0
    np.testing.assert_allclose(fading.rgba(values)[:, 3], [0.9, 0.9, 0.45, 0, 0])


def test_a_panel_has_the_proportions_of_its_voxels():
    image = np.random.default_rng(0).random((10, 20, 30), np.float32)
    panel = pictures.Panel(image, [], 1, 3, "", (2.0, 1.0, 0.5))
    assert imread(io.BytesIO(pictures.panel_png(panel, zoom=2))).shape[:2] == (60, 80)  # 15 mm high, 20 mm wide


def test_a_long_title_is_wrapped_and_not_cut(tmp_path):
    image = np.random.default_rng(0).random((8, 9), np.float32)
    sheets = []
    for arguments in (10, 40):
        rows = [("caption", pictures.three_planes(image, image > 0.5, image > 0.4))]
        pictures.write_sheet(tmp_path / "sheet.png", rows, "title " * arguments, {"truth": "red"})
        sheets.append(imread(tmp_path / "sheet.png"))
    assert sheets[0].shape[1] == sheets[1].shape[1]
    assert sheets[0].shape[0] < sheets[1].shape[0]
    assert (sheets[1][:, -20:, :3] == 1).all()  # nothing reaches the edge


def rows(number, validated=False):
    def dice(t):
        return 0.4 + t / 1e4 if validated and t % 50 == 0 else None

    return [LogRow(t, 1 / t, math.nan if t == 3 else 2 / t, 3 / t, t / number, 0.01, 0.5, dice(t)) for t in range(1, number + 1)]


@pytest.mark.parametrize(("number", "validated"), [(0, False), (1, False), (5, False), (700, True)])
def test_curves_of_any_length_and_with_nan(number, validated):
    config = load_recipe("brats-25", ["protocol=paper"])
    root = ElementTree.fromstring(curves_svg(rows(number, validated), config))
    text = " ".join(root.itertext())
    assert ("on the VAL list; best 47.00 % at 700" in text) == validated
    assert "currentColor" in ElementTree.tostring(root, encoding="unicode")
    picture = imread(io.BytesIO(curves_png(rows(number, validated), config)))
    assert picture.shape[:2] == ((704 if validated else 385), 1210)


def test_ranges_of_a_curve():
    at, mean, low, high = binned([*range(1, 121)], [float(t) for t in range(1, 121)])
    assert (at[0], mean[0], low[0], high[0], len(at)) == (1.5, 1.5, 1.0, 2.0, 60)
    assert binned([1, 2], [math.nan, 1.0]) == ([2.0], [1.0], [1.0], [1.0])
