"""Two-dimensional training as the field does it: slices of volumes, scores per volume and per patient, slices of background."""

import csv
import math
import re

import numpy as np
import pytest
from reference_tools import TINY, mistake, write_case

from rplib import cli
from rplib.reference.checkpoint import load_network
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.datasets.nifti_writing import write_nifti
from rplib.reference.evaluation import metrics
from rplib.reference.evaluation.patients import per_patient
from rplib.reference.evaluation.scoring import evaluate
from rplib.reference.inference.windows import segment

SHAPE = (20, 18, 5)


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright box in noise; the first and last slice hold background alone."""
    random = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[4 + seed % 3 : 15, 3:12, 1:4] = 1
    return random.standard_normal(SHAPE).astype(np.float32) + 3 * label, label


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pooled(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return metrics.score(np.concatenate([f.ravel() for f in found]), np.concatenate([t.ravel() for t in truth])).dice


@pytest.fixture(scope="module")
def slices_of_h5(tmp_path_factory):
    """A network of slices, trained on h5 volumes: three patients for training, two of two frames each for testing."""
    data = tmp_path_factory.mktemp("h5")
    names = [f"patient{p}_frame{f}" for p in range(5) for f in range(1 if p < 3 else 2)]
    for seed, name in enumerate(names):
        image, label = volume(seed)
        write_case(data, name, image=image, label=label)
    (data / "train.list").write_text("".join(f"{name}\n" for name in names[:3]))
    (data / "test.list").write_text("".join(f"{name}\n" for name in names[3:]))
    settings = [*TINY, "patch=16,16,1", "stride=8,8,1", "labelled=2", "batch_size=4", "labelled_per_batch=2", "iterations=6"]
    arguments = ["train", "--recipe", "la-4", "--data", data, "--out", data / "run", "--device", "cpu", "--set", *settings]
    assert cli.main([*map(str, arguments)]) == 0
    return data


def test_slices_of_h5_volumes_are_scored_per_volume_and_per_patient(slices_of_h5, capsys):
    data, run = slices_of_h5, slices_of_h5 / "run"
    arguments = ["evaluate", run, "--data", data, "--device", "cpu", "--patients", "(patient[0-9]+)_", "--pictures", "1"]
    assert cli.main([*map(str, arguments)]) == 0
    assert "mean over the 2 patients" in capsys.readouterr().out
    network, config = load_network(run)
    dataset = open_dataset(data)
    cases = {name: dataset.load(name, needs_label=True) for name in dataset.names("test")}
    found = {name: segment(network, case.image, config.patch, config.stride).label for name, case in cases.items()}
    assert all(label.shape == SHAPE for label in found.values())
    scores = {row["case"]: row for row in rows_of(run / "evaluation-test" / "scores.csv") if row["method"] == "decoder 1"}
    for name, case in cases.items():
        assert float(scores[name]["dice"]) == pytest.approx(metrics.score(found[name], case.label).dice, abs=1e-9)
    patients = {row["case"]: row for row in rows_of(run / "evaluation-test" / "patients.csv") if row["method"] == "decoder 1"}
    assert list(patients) == ["patient3", "patient4"]
    for patient, row in patients.items():
        mine = [name for name in cases if name.startswith(patient)]
        assert len(mine) == 2
        expected = pooled([found[name] for name in mine], [cases[name].label for name in mine])
        assert float(row["dice"]) == pytest.approx(expected, abs=1e-12)
        distances = [float(scores[name]["hd95"]) for name in mine if scores[name]["hd95"]]
        assert float(row["hd95"] or "nan") == pytest.approx(np.mean(distances) if distances else math.nan, nan_ok=True)
    assert "2 patients" in (run / "evaluation-test" / "report.html").read_text(encoding="utf-8")


def test_patterns_that_name_no_patient(slices_of_h5, capsys):
    arguments = ["evaluate", slices_of_h5 / "run", "--data", slices_of_h5, "--device", "cpu", "--patients"]
    assert "has 0 groups; expected one" in mistake(capsys, *arguments, "patient")
    assert "is not a regular expression" in mistake(capsys, *arguments, "(")
    assert "finds no patient in case patient3_frame0" in mistake(capsys, *arguments, "(frame1)")


def test_slices_in_separate_files_are_pooled_to_volumes(tmp_path, capsys):
    """Files of one slice each, some of background alone: normal for check, training, scores, pictures, and the fixed box."""
    data = tmp_path / "d"
    volumes = [volume(seed) for seed in range(4)]
    for folder in ("images", "labels"):
        (data / folder).mkdir(parents=True)
    for number, (image, label) in enumerate(volumes):
        for z in range(SHAPE[2]):
            write_nifti(data / "images" / f"v{number}_z{z}.nii.gz", image[:, :, z], np.eye(4))
            write_nifti(data / "labels" / f"v{number}_z{z}.nii.gz", label[:, :, z], np.eye(4))
    names = [f"v{number}_z{z}" for number in range(4) for z in range(SHAPE[2])]
    (data / "train.list").write_text("".join(f"{name}\n" for name in names[:10]))
    (data / "test.list").write_text("".join(f"{name}\n" for name in names[10:]))
    assert cli.main(["data", "check", str(data)]) == 0
    assert "8 labels of 2-D images contain only background" in capsys.readouterr().out
    settings = [*TINY, "patch=16,16", "stride=8,8", "labelled=5", "batch_size=4", "validation=1", "iterations=6", "crop_margin=4"]
    arguments = ["train", "--recipe", "generic", "--data", data, "--out", tmp_path / "run", "--device", "cpu", "--set", *settings]
    assert cli.main([*map(str, arguments)]) == 0  # the validation case is a slice of background
    capsys.readouterr()
    arguments = ["evaluate", tmp_path / "run", "--data", data, "--device", "cpu", "--patients", "(v[0-9])_", "--pictures", "10"]
    assert cli.main([*map(str, arguments)]) == 0
    report = evaluate(tmp_path / "run", data, device="cpu")
    rows = [row for row in report.rows if row.method == "decoder 1"]
    assert sum(row.voxels[2] == 0 for row in rows) == 4
    together = per_patient(rows, re.compile("(v[0-9])_"))
    for row, (_, label) in zip(together, volumes[2:], strict=True):
        stacked = np.stack([report.predictions[f"{row.case}_z{z}"] for z in range(SHAPE[2])], axis=2)
        assert row.scores.dice == pytest.approx(metrics.score(stacked, label).dice, abs=1e-12)
        assert row.scores.jaccard == pytest.approx(metrics.score(stacked, label).jaccard, abs=1e-12)
