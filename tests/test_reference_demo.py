"""`rplib demo`: one table and one picture that report what was measured, on data that no threshold solves."""

import csv
import io
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_tools import mistake
from scipy import stats

from rplib import cli
from rplib.reference import demonstration
from rplib.reference.config import differences
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.datasets.phantom import best_threshold_dice
from rplib.reference.demonstration import LABELLED_ONLY, MUTUAL, demo_configs
from rplib.reference.evaluation.scoring import evaluate
from rplib.reference.inference.windows import DECODER_1
from rplib.reference.reporting.run_log import read_metrics
from rplib.reference.reporting.tables import shown

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One demo with a tiny budget, through the command line; what it printed lies beside its folder."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(demonstration, "TEST_CASES", 3)
        assert cli.main(["demo", "--out", str(folder), "--iterations", "3", "--seed", "7", "--device", "cpu"]) == 0
    (folder.parent / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return folder


class InThisProcess:
    """Trains at once, where the demo starts processes; the fixture `out` does start them."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def in_this_process(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(demonstration, "_workers", InThisProcess)
    yield
    torch.set_num_threads(threads)


def test_it_prints_one_table_and_writes_one_picture(out):
    from matplotlib.image import imread

    printed = (out.parent / "printed.txt").read_text(encoding="utf-8")
    assert printed == (out / "demo.txt").read_text(encoding="utf-8")
    assert printed.count("┏") == 1
    assert {path.name for path in out.iterdir() if not path.is_dir()} == {".rplib-demo", "demo.png", "demo.txt"}
    sheet = imread(out / "demo.png")
    assert sheet.shape[0] > 700
    assert sheet[..., :3].std() > 0.1


def test_the_table_holds_what_evaluate_measures(out):
    lines = (out / "demo.txt").read_text(encoding="utf-8").splitlines()
    for method in (LABELLED_ONLY, MUTUAL):
        report = evaluate(out / method, out / "data", device="cpu")
        (line,) = (line for line in lines if line.startswith(f"│ {method} "))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        for cell, metric in zip(cells[1:5], ("dice", "jaccard", "hd95", "asd"), strict=True):
            found = report.mean(DECODER_1, metric)
            assert cell.split(" ")[0] == shown(found.mean, metric)
            assert cell.endswith(f"({found.missing} missing)") == bool(found.missing)


def test_the_best_threshold_is_in_the_table_and_below_the_bound(out):
    dataset = open_dataset(out / "data")
    cases = [dataset.load(name) for name in dataset.names("test")]
    dice = [best_threshold_dice(case.image, case.label) for case in cases]
    assert max(dice) < 0.6
    lines = (out / "demo.txt").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("│ best threshold "))
    assert line.strip("│").split("│")[1].strip() == f"{100 * np.mean(dice):.2f}"


def test_both_trainings_have_the_same_budget():
    alone, mutual = (demo_configs(seed=3, iterations=50)[name] for name in (LABELLED_ONLY, MUTUAL))
    assert set(differences(alone, mutual)) == {"name", "batch_size", "consistency"}
    assert alone.supervised == mutual.supervised
    assert alone.labelled_per_batch == mutual.labelled_per_batch == alone.batch_size
    assert alone.iterations == mutual.iterations == 50
    assert alone.consistency == 0 < mutual.consistency


def test_both_trainings_were_run_to_the_end(out):
    for method in (LABELLED_ONLY, MUTUAL):
        assert [row.iteration for row in read_metrics(out / method / "metrics.csv")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("mutual", "alone", "said"),
    [(0.8, 0.7, "10.0 Dice points above"), (0.6, 0.7, "10.0 Dice points below"), (0.7, 0.7001, "level")],
)
def test_whichever_wins_is_said(mutual, alone, said):
    assert said in demonstration._verdict(mutual, alone)


def test_a_second_demo_replaces_the_first_and_its_numbers_repeat(out, monkeypatch, in_this_process):
    before = (out / "demo.txt").read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(demonstration, "TEST_CASES", 3)
    again = demonstration.demonstrate(out, seed=7, iterations=3, device="cpu").table.splitlines()
    rows = [[cell.split()[:1] for cell in line.split("│")[:-2]] for line in before if line.startswith("│")]
    assert len(rows) == 4
    assert rows == [[cell.split()[:1] for cell in line.split("│")[:-2]] for line in again if line.startswith("│")]


def test_it_does_not_empty_a_folder_that_is_not_its_own(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert "not a folder of an earlier demo" in mistake(capsys, "demo", "--out", tmp_path)
    assert (tmp_path / "precious").read_text() == "x"
    assert "is not a folder of" in mistake(capsys, "demo", "--out", tmp_path / "precious")


def test_mistakes(tmp_path, capsys):
    assert "at least 1 iteration" in mistake(capsys, "demo", "--out", tmp_path / "a", "--iterations", "0")
    assert "at least 0" in mistake(capsys, "demo", "--out", tmp_path / "a", "--seed", "-1")
    assert "--device nonsense" in mistake(capsys, "demo", "--out", tmp_path / "a", "--device", "nonsense")
    assert "belong together" in mistake(capsys, "demo", "--out", tmp_path / "a", "--seeds", "1")
    assert "different seeds" in mistake(capsys, "demo", "--out", tmp_path / "a", "--seeds", "1", "1", "--csv", tmp_path / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_many_seeds_go_into_one_file(tmp_path, monkeypatch, capsys, in_this_process):
    """Each row is what the evaluation of that seed's runs found."""
    monkeypatch.setattr(demonstration, "TEST_CASES", 2)
    monkeypatch.setattr(demonstration, "TRAINING_CASES", 6)
    out, target = tmp_path / "demo", tmp_path / "seeds.csv"
    arguments = ["demo", "--out", out, "--iterations", 2, "--seeds", 4, 3, "--csv", target, "--device", "cpu"]
    assert cli.main(list(map(str, arguments))) == 0
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["4", "3"]
    for method, column in zip((LABELLED_ONLY, MUTUAL), demonstration.COLUMNS[1:], strict=True):
        found = evaluate(out / method, out / "data", device="cpu").mean(DECODER_1, "dice").mean
        assert rows[1][column] == f"{100 * found:.2f}"
    assert capsys.readouterr().out.startswith("2 seeds: ")


def test_the_summary_is_the_mean_and_range_of_the_differences(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(demonstration.COLUMNS) + "\n1,50.0,60.0\n2,70.0,68.0\n")
    said = demonstration._summary(tmp_path / "a.csv")
    assert said.startswith("2 seeds: labelled-only 60.0, mutual 64.0 Dice %; difference +4.0 on average, from -2.0 to +10.0, ")
    p = stats.ttest_rel([60, 68], [50, 70]).pvalue
    assert said.endswith(f"above in 1 of 2; paired t-test p = {p:.2g}.")


@pytest.mark.slow
def test_the_script_accepts_the_same_options(tmp_path):
    script = [sys.executable, str(ROOT / "reference" / "demo.py"), "--iterations", "0"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("rplib: error: ")
