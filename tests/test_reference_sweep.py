"""`rplib sweep`: the plan, the runner, the comparison, the page."""

import contextlib
import csv
import math
import statistics
from pathlib import Path

import pytest
from reference_tools import TINY, mistake, write_dataset

from rplib import cli, reference
from rplib.errors import UserError
from rplib.reference import files
from rplib.reference.sweeping import runner
from rplib.reference.sweeping.figures import cases_png, curves_png
from rplib.reference.sweeping.plan import read_plan
from rplib.reference.sweeping.results import Result, compare_cells, dice_by_seed
from rplib.reference.training import trainer

RESULTS = Path(reference.__file__).parent / "results"
HEAD = 'data = "data"\nout = "sweep"\nseeds = [3, 1]\n'
CELLS = """
[cells.alone]
recipe = "la-4-supervised"
set = { labelled_per_batch = 1, batch_size = 1 }

[cells."with both"]
recipe = "la-4"
set = { consistency = 0.5, channels_last = true, patch = [32, 32, 16] }
"""


def write_plan(folder, text):
    (folder / "plan.toml").write_text(text)
    return folder / "plan.toml"


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_runs_through_the_cells_seed_by_seed(tmp_path):
    plan = read_plan(write_plan(tmp_path, HEAD + "set = { filters = 4, iterations = 7 }\njobs = 3\n" + CELLS))
    assert [(run.cell, run.seed) for run in plan.runs] == [("alone", 3), ("with both", 3), ("alone", 1), ("with both", 1)]
    assert [run.folder.name for run in plan.runs] == ["alone-3", "with-both-3", "alone-1", "with-both-1"]
    assert (plan.data, plan.baseline, plan.split, plan.jobs) == (tmp_path / "data", "alone", "test", 3)
    config = plan.runs[1].config
    assert (config.filters, config.iterations, config.seed, config.consistency) == (4, 7, 3, 0.5)
    assert (config.channels_last, config.patch, config.name) == (True, (32, 32, 16), "with both")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "cells is missing"),
        (HEAD.replace("seeds = [3, 1]", "seeds = [3, 3]") + CELLS, "expected different whole numbers"),
        (HEAD + "jobs = 0\n" + CELLS, "jobs is 0; expected the number of trainings at a time, at least 1"),
        (HEAD + "sedes = [1]\n" + CELLS, "unknown key 'sedes'; did you mean seeds?"),
        (HEAD + 'baseline = "nothing"\n' + CELLS, "expected one of the cells: alone, with both"),
        (HEAD + 'split = "all"\n' + CELLS, "expected test, train or val"),
        (HEAD + "set = { filtres = 4 }\n" + CELLS, "did you mean filters?"),
        (HEAD + "set = 3\n" + CELLS, "expected a table of settings"),
        (HEAD + 'adopt = "runs"\n' + CELLS, "expected patterns of run folders"),
        (HEAD + "[cells.a]\nset = {}\n", "recipe is missing"),
        (HEAD + '[cells.a]\nrecipe = "la-5"\n', "no recipe named la-5"),
        (HEAD + '[cells."a b"]\nrecipe = "la-4"\n[cells."a-b"]\nrecipe = "la-8"\n', "two cells would share one folder"),
        ("data = ", "is not valid TOML"),
        (HEAD.replace('"data"', "3") + CELLS, "data is missing or of the wrong type"),
    ],
)
def test_mistakes_in_a_plan_are_one_sentence(tmp_path, capsys, text, message):
    assert message in mistake(capsys, "sweep", write_plan(tmp_path, text))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_plans_of_the_results_are_whole_and_have_their_runs(path):
    plan = read_plan(path)
    with open(path.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["cell"] for row in rows} == set(plan.cells)
    planned = {(run.cell, str(run.seed)) for run in plan.runs}
    assert {(row["cell"], row["seed"]) for row in rows} <= planned


def test_a_missing_plan(tmp_path, capsys):
    assert "cannot be read" in mistake(capsys, "sweep", tmp_path / "none.toml")


# ------------------------------------------------------------------------------------------------------------- numbers


def rows(cell, seed, dice, weights="last", network="decoder 1"):
    return [Result(cell, "la-4", seed, network, weights, case, "1", {"dice": value}) for case, value in dice.items()]


def test_comparison_by_hand():
    base = {1: {"a": 0.5, "b": 0.6}, 2: {"a": 0.4, "b": 0.9}, 3: {"a": 0.7, "b": 0.1}}
    ours = {1: {"a": 0.6, "b": 0.7}, 2: {"a": 0.9, "b": 0.8}, 4: {"a": 0.0, "b": 0.0}}
    results = [row for seed, dice in base.items() for row in rows("base", seed, dice)]
    results += [row for seed, dice in ours.items() for row in rows("ours", seed, dice)]
    alone, line = compare_cells(results, ["base", "ours", "not run"], "base")
    assert math.isnan(alone.difference)
    assert alone.mean == pytest.approx((0.55 + 0.65 + 0.4) / 3)
    assert line.seeds == [1, 2, 4]
    assert line.means == pytest.approx([0.65, 0.85, 0])
    assert line.deviation == pytest.approx(statistics.stdev([0.65, 0.85, 0]))
    assert line.difference == pytest.approx(0.15)  # of seeds 1 and 2 alone: 0.1 and 0.2
    assert line.difference_deviation == pytest.approx(statistics.stdev([0.1, 0.2]))
    assert line.lowest == pytest.approx(0.1)
    # Student's t of two differences: t = mean / (deviation / sqrt 2) = 3, and for one degree p = 1 - 2/pi atan(t).
    assert line.p_seeds == pytest.approx(1 - 2 / math.pi * math.atan(3))
    assert math.isnan(line.p_cases)
    assert (line.better, line.cases) == (1, 2)  # a: +0.3 on average; b: 0.0


def test_final_weights_are_compared_and_classes_are_averaged():
    results = (
        rows("base", 1, {"a": 0.5}) + rows("base", 1, {"a": 0.7}, "averaged") + rows("base", 1, {"a": 0.9}, "-", "fixed box")
    )
    results.append(Result("base", "la-4", 1, "decoder 1", "averaged", "a", "2", {"dice": 0.1}))
    results.append(Result("base", "la-4", 1, "decoder 1", "averaged", "mean", "all", {"dice": 0.3}))
    assert dice_by_seed(results) == {"base": {1: {"a": pytest.approx(0.4)}}}


def test_the_test_over_cases_sees_a_consistent_gain():
    cases = [f"case {n}" for n in range(8)]
    results = rows("base", 1, dict.fromkeys(cases, 0.5)) + rows("ours", 1, {c: 0.5 + 0.01 * (n + 1) for n, c in enumerate(cases)})
    line = compare_cells(results, ["base", "ours"], "base")[1]
    assert line.p_cases == pytest.approx(2 / 2**8)  # all eight signs alike
    assert math.isnan(line.p_seeds)
    assert (line.better, line.cases) == (8, 8)


def test_pictures_are_drawn_also_of_little():
    for dice in ({"base": {1: {"a": 0.5}}}, {"base": {1: {"a": 0.5}, 2: {"a": 0.6}}, "ours": {1: {"a": 0.5, "b": 0.1}}}):
        assert cases_png(dice, "base").startswith(b"\x89PNG")
    assert curves_png({"base": {10: [0.1, 0.2], 20: [0.3]}}, "title").startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------------------------------- runner


class InProcess:
    """A command run here instead of in a process of its own, which takes seconds to start."""

    def __init__(self, command, log):
        InProcess.commands.append(command[3:])
        with open(log, "a") as file, contextlib.redirect_stderr(file):
            self.returncode = cli.main(command[3:])

    def poll(self):
        return self.returncode

    def terminate(self):
        pass

    wait = terminate


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A plan of two cells and one seed, run in this process."""
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data")
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)
    monkeypatch.setattr(InProcess, "commands", [], raising=False)
    monkeypatch.setattr(runner, "_start", InProcess)
    monkeypatch.setattr(runner, "_POLL", 0.0)
    settings = ", ".join(f"{k} = [{v}]" if "," in v else f"{k} = {v}" for k, v in (word.split("=") for word in TINY))
    settings = settings.replace("iterations = 12", "iterations = 6").replace("batch_size = 3, ", "")
    settings = settings.replace("labelled_per_batch = 1, ", "")
    text = f'data = "data"\nout = "sweep"\nseeds = [5]\nset = {{ {settings}, average = 0.9 }}\n'
    return write_plan(tmp_path, text + '[cells.alone]\nrecipe = "la-4-supervised"\n[cells.both]\nrecipe = "la-4"\n')


def test_a_sweep_trains_scores_compares_and_then_has_nothing_to_do(tiny, tmp_path, capsys):
    assert cli.main(["sweep", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "2 runs, 0 of them finished; 1 at a time" in out
    assert [argv[0] for argv in InProcess.commands] == ["train", "evaluate"] * 2
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    kinds = {(row["cell"], row["network"], row["weights"]) for row in table}
    assert {("both", "decoder 1", "averaged"), ("both", "decoder 1", "last"), ("both", "mean of both", "averaged")} <= kinds
    assert ("alone", "fixed box", "-") in kinds
    cases = [row for row in table if (row["cell"], row["network"], row["weights"]) == ("both", "decoder 1", "averaged")]
    *single, mean = cases
    assert [row["case"] for row in single] == ["CASE05", "CASE06"]
    assert (mean["case"], mean["class"]) == ("mean", "all")
    assert float(mean["dice"]) == pytest.approx(statistics.fmean(float(row["dice"]) for row in single), abs=1e-6)
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "the baseline is alone" in page

    # Killed after its last result, a command leaves its lock and perhaps a temporary file; a lock that is held is not touched.
    run = tmp_path / "sweep" / "alone-5"
    left = [run / files.LOCK, run / "evaluation-test" / files.LOCK, run / f".rplib-1-{'0' * 12}.tmp"]
    for path in left:
        path.touch()
    InProcess.commands.clear()
    with files.locked(tmp_path / "sweep" / "both-5", "RUN"):
        assert cli.main(["sweep", str(tiny)]) == 0
        assert (tmp_path / "sweep" / "both-5" / files.LOCK).exists()
    assert not [path for path in left if path.exists()]
    assert InProcess.commands == []
    assert "2 runs, 2 of them finished" in capsys.readouterr().out

    # Another plan adopts the finished runs; a cell with other settings is not among them.
    other = tiny.read_text().replace('out = "sweep"', 'out = "other"\nadopt = ["sweep/*"]')
    plan = read_plan(write_plan(tmp_path, other))
    assert [(run.adopted, run.finished) for run in plan.runs] == [(True, True)] * 2
    plan = read_plan(write_plan(tmp_path, other.replace("average = 0.9", "average = 0.8")))
    assert [(run.adopted, run.finished) for run in plan.runs] == [(False, False)] * 2

    # The same folder with other settings is refused before anything is trained.
    tiny.write_text(
        other.replace('out = "other"\nadopt = ["sweep/*"]', 'out = "sweep"').replace("average = 0.9", "average = 0.8")
    )
    line = mistake(capsys, "sweep", tiny)
    assert "alone-5 was trained with average=0.9, the sweep has average=0.8; give the cell another name" in line
    assert InProcess.commands == []


def test_what_was_interrupted_resumes_and_what_fails_stops_nothing_else(tiny, tmp_path, monkeypatch, capsys):
    genuine, calls = trainer.training_step, iter(range(1, 100))

    def step(*arguments):
        if next(calls) == 6:  # of the first cell; its checkpoint is of iteration 5
            raise UserError("no more of this")
        return genuine(*arguments)

    monkeypatch.setattr(trainer, "training_step", step)
    line = mistake(capsys, "sweep", tiny)
    assert line.startswith("1 of 2 runs failed: alone-5 (no more of this); logs are in ")
    assert (tmp_path / "sweep" / "sweep.csv").is_file()  # of the other
    InProcess.commands.clear()
    assert cli.main(["sweep", str(tiny)]) == 0
    assert [argv[0] for argv in InProcess.commands] == ["train", "evaluate"]
    assert "--resume" in InProcess.commands[0]


def test_a_report_of_nothing(tiny, capsys):
    assert "is scored yet; omit --report" in mistake(capsys, "sweep", tiny, "--report")
    assert InProcess.commands == []


@pytest.mark.slow
def test_several_processes_at_a_time(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    assert cli.main(["sweep", str(tiny), "--jobs", "2"]) == 0
    assert "2 at a time" in capsys.readouterr().out
    for cell in ("alone-5", "both-5"):
        assert (tmp_path / "sweep" / cell / "evaluation-test" / "scores.csv").is_file()
        assert "iterations in" in (tmp_path / "sweep" / "logs" / f"{cell}.log").read_text()
