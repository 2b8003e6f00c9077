"""`rplib evaluate`: its numbers, its files, the fixed box, the picture sheet, and its mistakes."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from reference_tools import TINY, mistake, write_case, write_dataset

from rplib import cli
from rplib.reference.checkpoint import load_network
from rplib.reference.datasets.layouts import LeftAtrium, open_dataset
from rplib.reference.evaluation import metrics
from rplib.reference.evaluation import scoring as evaluation
from rplib.reference.evaluation.fixed_box import GRID, FixedBox, fit_box
from rplib.reference.evaluation.scoring import BOX, evaluate
from rplib.reference.inference import components
from rplib.reference.inference.windows import DECODER_1, MEAN, OUTPUTS, segment
from rplib.reference.reporting import pictures
from rplib.reference.reporting.report import nifti_writer, write
from rplib.reference.reporting.tables import render, scores_csv, summary_csv
from rplib.reference.training.trainer import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, train=5, test=3)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    from rplib.reference.config import load_recipe

    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load_recipe("la-4", TINY), data, folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def evaluated(run, data):
    """Through the command line, once; tests read what it wrote."""
    arguments = ["evaluate", run, "--data", data, "--spacing", "0.5", "1", "2", "--nifti", "all", "--stride", "8", "8", "8"]
    assert cli.main([*map(str, arguments), "--device", "cpu"]) == 0
    return run / "evaluation-test"


def _read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("maps", [[], ["--no-maps"]], ids=["maps", "no-maps"])
def test_a_report_reads_every_case_once(run, data, tmp_path, monkeypatch, maps):
    loaded = []
    load = LeftAtrium.load

    def counted(self, name, *args, **keywords):
        loaded.append(name)
        return load(self, name, *args, **keywords)

    monkeypatch.setattr(LeftAtrium, "load", counted)
    arguments = ["evaluate", run, "--data", data, "--out", tmp_path / "out", "--pictures", "2", "--nifti", "none", *maps]
    assert cli.main([*map(str, arguments)]) == 0
    dataset = open_dataset(data)
    assert sorted(loaded) == sorted([*dataset.names("train")[: load_network(run)[1].labelled], *dataset.names("test")])


def test_the_worst_cases_stay_in_memory_for_the_pictures(run, data):
    report = evaluate(run, data, device="cpu", pictures=2)
    assert sorted(report.kept) == sorted(report.worst_first()[:2])
    assert report.case(report.worst_first()[-1]).label is not None  # read on demand


def test_files(evaluated, data):
    names = open_dataset(data).names("test")
    assert {path.name for path in evaluated.iterdir()} == {
        "scores.csv",
        "summary.csv",
        "report.txt",
        "report.html",
        "pictures.png",
        "reliability.png",
        "reliability.csv",
        "nifti",
    }
    expected = {f"{name}_{what}.nii.gz" for name in names for what in ("prediction", "score", "image", "truth")}
    assert {path.name for path in (evaluated / "nifti").iterdir()} == expected


def test_scores_are_those_of_the_segmentation_by_hand(evaluated, run, data):
    network, config = load_network(run)
    rows = {(row["case"], row["method"]): row for row in _read(evaluated / "scores.csv")}
    names = open_dataset(data).names("test")
    assert set(rows) == {(name, method) for name in names for method in (*OUTPUTS, BOX)}
    box = fit_box([open_dataset(data).load(name).label for name in open_dataset(data).names("train")[: config.labelled]])
    for name in names:
        case = open_dataset(data).load(name)
        masks = {out: segment(network, case.image, config.patch, (8, 8, 8), output=out).label for out in OUTPUTS}
        masks[BOX] = box.mask(case.image.shape)
        for method, mask in masks.items():
            expected = metrics.score(mask, case.label, (0.5, 1, 2))
            for metric in evaluation.METRICS:
                text = rows[name, method][metric]
                assert (float(text) if text else math.nan) == pytest.approx(getattr(expected, metric), nan_ok=True)


def test_summary_is_the_mean_of_the_cases(evaluated):
    rows = _read(evaluated / "scores.csv")
    summary = {(row["method"], row["metric"]): row for row in _read(evaluated / "summary.csv")}
    for method in (*OUTPUTS, BOX):
        for metric in evaluation.METRICS:
            values = [float(row[metric]) for row in rows if row["method"] == method and row[metric]]
            assert float(summary[method, metric]["mean"]) == pytest.approx(np.mean(values))
            assert float(summary[method, metric]["standard_deviation"]) == pytest.approx(np.std(values), abs=1e-12)
            assert int(summary[method, metric]["missing"]) == 3 - len(values)


def test_nifti_keeps_labels_and_voxel_size(evaluated, run, data):
    name = open_dataset(data).names("test")[0]
    case = open_dataset(data).load(name)
    network, config = load_network(run)
    prediction = nibabel.load(evaluated / "nifti" / f"{name}_prediction.nii.gz")
    assert prediction.get_data_dtype() == np.uint8
    assert prediction.header.get_zooms() == (0.5, 1.0, 2.0)
    np.testing.assert_array_equal(prediction.affine, np.diag([0.5, 1, 2, 1]))
    expected = segment(network, case.image, config.patch, (8, 8, 8))
    np.testing.assert_array_equal(np.asarray(prediction.dataobj), expected.label)
    truth = nibabel.load(evaluated / "nifti" / f"{name}_truth.nii.gz")
    np.testing.assert_array_equal(np.asarray(truth.dataobj), case.label)
    score = nibabel.load(evaluated / "nifti" / f"{name}_score.nii.gz")
    np.testing.assert_allclose(np.asarray(score.dataobj), expected.score, atol=1e-6)


def test_report_says_what_was_scored(evaluated):
    text = (evaluated / "report.txt").read_text(encoding="utf-8")
    assert "Recipe la-4, protocol held-out; weights of iteration 12 of 12 (last iteration)." in text
    assert "Scored: 3 cases of the test list." in text
    assert "stride 8 x 8 x 8; all components kept" in text
    assert "over the 3 labelled training" in " ".join(text.split())
    assert "TEST LIST" not in text


def test_picture_sheet_is_a_picture(evaluated):
    from matplotlib.image import imread

    sheet = imread(evaluated / "pictures.png")
    assert sheet.shape[0] > 700  # three rows
    for colour in (pictures.TRUTH, pictures.PREDICTION):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(sheet[..., :3] - rgb).max(-1) < 0.02).sum() > 100  # its outlines and its line in the legend


def test_without_a_voxel_size_there_are_no_millimetres_and_the_report_says_so(run, data):
    report = evaluate(run, data, cases=2, device="cpu")
    assert "No distances in mm for 2 of 2 cases" in report.notes[-2]
    assert " mm" not in render(report, per_case=True).replace("in mm for", "")


def test_pictures_show_the_worst_first(run, data, monkeypatch, tmp_path):
    shown = {}
    report = evaluate(run, data, device="cpu")
    monkeypatch.setattr("rplib.reference.reporting.sheets.write_sheet", lambda path, rows, *rest: shown.update(rows=rows))
    write(report, tmp_path, pictures=2)
    dice = {row.case: row.scores.dice for row in report.rows if row.method == DECODER_1}
    worst = sorted(dice, key=dice.__getitem__)[:2]
    assert [caption.split("\n")[0] for caption, _ in shown["rows"]] == worst
    assert [panel.axis for panel in shown["rows"][0][1]] == [2, 1, 0]


@pytest.mark.slow
def test_the_script_accepts_the_same_options(run, data, tmp_path):
    arguments = ["--data", data, "--out", tmp_path, "--cases", "1", "--nifti", "none", "--pictures", "0", "--device", "cpu"]
    script = [sys.executable, ROOT / "reference" / "evaluate.py", run, *arguments]
    done = subprocess.run([*map(str, script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Scored: the first 1 cases of the test list" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "summary.csv", "report.txt", "report.html"}


class _Threshold(torch.nn.Module):
    """Predicts foreground where the image is above a value."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    def forward(self, x):
        logits = torch.cat([torch.zeros_like(x), x - self.value], 1)
        return [logits, logits], [x, x]


def test_an_empty_prediction_has_dice_0_and_no_distance(run, data, monkeypatch):
    _, config = load_network(run)
    monkeypatch.setattr(evaluation.checkpoint, "load_network", lambda *_: (_Threshold(1e6), config))
    report = evaluate(run, data, device="cpu")
    assert report.mean(DECODER_1, "dice") == evaluation.Mean(0.0, 0.0, 0)
    assert report.mean(DECODER_1, "hd95").missing == 3
    assert math.isnan(report.mean(DECODER_1, "hd95").mean)
    assert not math.isnan(report.mean(BOX, "hd95").mean)
    text = render(report, per_case=True)
    assert "0.00 ± 0.00" in text
    assert "- ± - (3 missing)" in text
    assert f"{report.rows[0].case},{DECODER_1},1,0.0,0.0,,,," in scores_csv(report)
    assert f"{DECODER_1},1,hd95,,,3" in summary_csv(report)


def test_one_missing_value_is_left_out_of_the_mean_and_counted(run, data):
    report = evaluate(run, data, device="cpu")
    missing = metrics.Scores(0.0, 0.0, math.nan, math.nan)
    there = metrics.Scores(0.8, 0.7, 4.0, 2.0)
    rows = [evaluation.CaseScores(name, DECODER_1, 1, s) for name, s in (("a", there), ("b", missing), ("c", there))]
    mixed = evaluation.Report(rows, {}, {}, report.config, report.dataset, report.stride, [])
    assert mixed.mean(DECODER_1, "hd95") == evaluation.Mean(4.0, 0.0, 1)
    assert mixed.mean(DECODER_1, "dice").mean == pytest.approx(1.6 / 3)
    assert mixed.worst_first() == ["b", "a", "c"]


def test_a_class_that_is_nowhere_does_not_make_a_case_the_worst(run, data):
    """Truth and prediction without the class: no Dice, and nothing wrong. A missed or invented class has Dice 0."""
    report = evaluate(run, data, device="cpu")
    none = math.nan
    dice = {"bare": [none, none], "good": [0.9, none], "bad": [none, 0.3], "missed": [0.9, 0.0], "fair": [0.5, 0.9]}
    rows = [
        evaluation.CaseScores(name, DECODER_1, klass, metrics.Scores(value, value, math.nan, math.nan))
        for name, values in dice.items()
        for klass, value in enumerate(values, 1)
    ]
    mixed = evaluation.Report(rows, {}, {}, report.config, report.dataset, report.stride, [])
    assert mixed.worst_first() == ["bad", "missed", "fair", "good", "bare"]
    assert mixed.mean(DECODER_1, "dice", 2) == evaluation.Mean(pytest.approx(0.4), pytest.approx(math.sqrt(0.14)), 2)


def test_keeping_the_largest_component(run, data, monkeypatch):
    _, config = load_network(run)
    monkeypatch.setattr(evaluation.checkpoint, "load_network", lambda *_: (_Threshold(1.5), config))
    plain, kept = (evaluate(run, data, device="cpu", keep_largest=largest) for largest in (False, True))
    assert "largest components only" in kept.notes[2]
    for name in plain.predictions:
        expected = components.largest_component(plain.predictions[name] == 1)
        np.testing.assert_array_equal(kept.predictions[name] == 1, expected)
        assert 0 < expected.sum() < plain.predictions[name].sum()


def test_the_train_list_leaves_out_unlabelled_cases(run, tmp_path):
    names = write_dataset(tmp_path, train=5, test=1)
    write_case(tmp_path, names[4], image=np.zeros((20, 18, 17), np.float32))
    report = evaluate(run, tmp_path, split="train", device="cpu")
    assert list(report.predictions) == names[:4]
    assert "Scored: 4 cases of the train list (1 without a label skipped)." in report.notes[1]


def test_best_and_last_weights(run, data):
    from rplib.reference import checkpoint

    assert "(last iteration)" in evaluate(run, data, cases=1, device="cpu").notes[0]
    assert "(last checkpoint)" in evaluate(run, data, weights="last", cases=1, device="cpu").notes[0]
    report = evaluate(run / checkpoint.BEST, data, cases=1, device="cpu")
    assert report.notes[0] == "Recipe la-4; weights of best.pt."
    assert report.mean(DECODER_1, "dice") == evaluate(run, data, cases=1, device="cpu").mean(DECODER_1, "dice")


def test_weights_chosen_on_the_test_list_are_called_so(data, tmp_path):
    from rplib.reference.config import load_recipe

    changes = ["protocol=paper", "validate_from=4", "validate_every=4", "iterations=4", "learning_rate=0.05"]
    train(load_recipe("la-4", [*TINY, *changes]), data, tmp_path / "run", device="cpu")
    note = evaluate(tmp_path / "run", data, cases=1, device="cpu").notes[0]
    assert "protocol paper" in note
    assert "WEIGHTS SELECTED ON THE TEST LIST" in note


def test_without_a_train_list_there_is_no_box_and_the_report_says_so(run, tmp_path):
    write_dataset(tmp_path, train=5, test=1)
    (tmp_path / "train.list").unlink()
    report = evaluate(run, tmp_path, device="cpu")
    assert report.methods == [DECODER_1, MEAN]
    assert "No fixed box: no train.list" in report.notes[-1]


def test_nifti_without_spacing(tmp_path, run, data):
    evaluate(run, data, cases=1, device="cpu", on_case=nifti_writer(tmp_path / "nifti", None))
    (written,) = (tmp_path / "nifti").iterdir()
    np.testing.assert_array_equal(nibabel.load(written).affine, np.eye(4))


# --- the fixed box


def test_box_over_two_sizes_is_in_relative_coordinates():
    labels = []
    for size in (64, 128):
        label = np.zeros((size, size, 64), np.uint8)
        label[size // 4 : size // 2, size // 8 : size // 2, 16:48] = 1
        labels.append(label)
    box = fit_box(labels)
    assert box == FixedBox((0.25, 0.125, 0.25), (0.5, 0.5, 0.75), 1.0)
    for label in labels:
        np.testing.assert_array_equal(box.mask(label.shape), label)


def test_box_is_no_worse_than_any_other_in_one_plane():
    random = np.random.default_rng(5)
    labels = []
    for size in ((16, 24), (20, 17), (31, 16)):
        centre = np.array(size) * random.uniform(0.35, 0.65, 2)
        grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
        labels.append((((grid - centre) / (np.array(size) * random.uniform(0.2, 0.3, 2))) ** 2).sum(-1) < 1)
    box = fit_box(labels)
    assert box.training_dice == pytest.approx(np.mean([metrics.dice(box.mask(x.shape), x) for x in labels]))

    # All boxes with edges on the grid, by summed-area tables: for two axes that is affordable.
    total = np.zeros((GRID + 1,) * 4)
    for label in labels:
        table = np.pad(label.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(float)
        rows, columns = (np.floor(np.arange(GRID + 1) / GRID * n + 0.5).astype(int) for n in label.shape)
        sums = table[np.ix_(rows, columns)]  # (low or high row, low or high column)
        hits = sums[None, :, None, :] - sums[:, None, None, :] - sums[None, :, :, None] + sums[:, None, :, None]
        area = np.maximum(rows[None] - rows[:, None], 0)[:, :, None, None] * np.maximum(columns[None] - columns[:, None], 0)
        total += np.where(area > 0, 2 * hits / (area + label.sum()), 0)
    assert box.training_dice == pytest.approx(total.max() / len(labels))


def test_box_needs_foreground():
    with pytest.raises(ValueError, match="no foreground voxel in any case"):
        fit_box([np.zeros((4, 4, 4))])


# --- slices


def test_largest_slice_and_what_guides_it():
    truth, prediction = np.zeros((6, 7, 8)), np.zeros((6, 7, 8))
    truth[2:5, 3:6, 4] = 1
    prediction[1, 2, 7] = 1
    image = np.zeros((6, 7, 8), np.float32)
    assert [panel.position for panel in pictures.three_planes(image, truth, prediction)] == [4, 3, 2]
    assert [panel.position for panel in pictures.three_planes(image, None, prediction)] == [7, 2, 1]
    assert [panel.position for panel in pictures.three_planes(image, None, 0 * prediction)] == [4, 3, 3]


def test_a_sheet_of_constant_images_and_full_masks(tmp_path):
    image, full = np.zeros((5, 6, 7), np.float32), np.ones((5, 6, 7))
    pictures.write_sheet(tmp_path / "sheet.png", [("all", pictures.three_planes(image, full, full))], "title", {"a": "red"})
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="rows is empty"):
        pictures.write_sheet(tmp_path / "none.png", [], "title", {})


# --- mistakes


def test_mistakes(run, data, tmp_path, capsys):
    assert "no run folder" in mistake(capsys, "evaluate", tmp_path / "nowhere", "--data", data)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no last.pt" in mistake(capsys, "evaluate", empty, "--data", data)
    assert not any(empty.iterdir())
    assert "no data folder" in mistake(capsys, "evaluate", run, "--data", tmp_path / "nodata")
    assert "stride (17, 4, 4) does not fit" in mistake(capsys, "evaluate", run, "--data", data, "--stride", "17", "4", "4")
    assert "0 is not a whole number of at least 1" in mistake(capsys, "evaluate", run, "--data", data, "--cases", "0")
    assert "millimetres above 0" in mistake(capsys, "evaluate", run, "--data", data, "--spacing", "1", "1", "x")
    assert "--device nonsense does not work" in mistake(capsys, "evaluate", run, "--data", data, "--device", "nonsense")
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in mistake(capsys, "evaluate", run, "--data", data, "--out", file)


def test_a_damaged_checkpoint_and_a_test_case_without_label(run, tmp_path, capsys):
    broken = tmp_path / "broken.pt"
    broken.write_bytes((run / "best.pt").read_bytes()[:1000])
    data = tmp_path / "data"
    names = write_dataset(data, train=3, test=1)
    assert "not a readable checkpoint" in mistake(capsys, "evaluate", broken, "--data", data)
    write_case(data, names[-1], image=np.zeros((20, 18, 17), np.float32))
    line = mistake(capsys, "evaluate", run, "--data", data)
    assert names[-1] in line
    assert "lacks the key 'label'" in line
