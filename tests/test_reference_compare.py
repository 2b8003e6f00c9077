"""`rplib compare` on scores whose means, deviations and differences are known."""

import csv
import math
from dataclasses import replace

import pytest
from reference_tools import mistake

from rplib import cli
from rplib.reference.compare import Run, by_recipe, compare
from rplib.reference.config import load_recipe

HEADER = "case,method,class,dice,jaccard,hd95,asd,hd95_mm,asd_mm\n"


def evaluated(folder, recipe, dice, overrides=(), box=0.5, missing=()):
    """A run folder with these Dice values, one a case; 95HD is 10 - 10 Dice, missing in some cases."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(load_recipe(recipe, overrides).to_toml())
    (folder / "evaluation-test").mkdir()
    lines = [HEADER]
    for n, value in enumerate(dice):
        far = "" if n in missing else f"{10 - 10 * value}"
        lines.append(f"c{n},decoder 1,1,{value},{value / 2},{far},1.5,,\n")
        lines.append(f"c{n},mean of both,1,{value - 0.1},{value / 2},{far},1.5,,\n")
        lines.append(f"c{n},fixed box,1,{box},0.25,20,3,,\n" if box else "")
    (folder / "evaluation-test" / "scores.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        evaluated(tmp_path / "s1", "la-8-supervised", [0.5, 0.7], ["seed=1"]),
        evaluated(tmp_path / "s2", "la-8-supervised", [0.6, 0.8], ["seed=2", "checkpoint_every=7"], missing=[0]),
        evaluated(tmp_path / "m2", "la-8", [0.5, 1.0], ["seed=2"]),
        evaluated(tmp_path / "m1", "la-8", [0.5, 0.9], ["seed=1"]),
    ]


def test_by_hand(runs, tmp_path, capsys):
    assert cli.main(["compare", *map(str, runs), "--csv", str(tmp_path / "table.csv")]) == 0
    text = capsys.readouterr().out
    with (tmp_path / "table.csv").open() as file:
        found = {(row["metric"], row["recipe"]): row for row in csv.DictReader(file)}
    assert {metric for metric, _ in found} == {"dice", "jaccard", "hd95", "asd"}  # mm: no run has them
    first, second, box = (found["dice", name] for name in ("la-8-supervised", "la-8", "fixed box"))
    # Means of the runs 0.6 and 0.7; and 0.75 and 0.7, of which by seed the differences are 0.7 - 0.6 and 0.75 - 0.7.
    assert first["runs"] == "2" and first["difference"] == "" and first["better"] == "0"
    assert float(first["mean"]) == pytest.approx(0.65) and float(first["deviation"]) == pytest.approx(0.1 / math.sqrt(2))
    assert float(second["mean"]) == pytest.approx(0.725) and float(second["difference"]) == pytest.approx(0.075)
    assert float(second["difference_deviation"]) == pytest.approx(0.05 / math.sqrt(2))
    assert (second["better"], second["cases"]) == ("1", "2")  # case means 0.5 against 0.55, 0.95 against 0.75
    assert box["runs"] == "1" and float(box["mean"]) == 0.5 and box["deviation"] == "" and box["better"] == "0"
    # 95HD: smaller is better. Labelled-only: 5 and 3; 2 (the other is missing).
    far = found["hd95", "la-8-supervised"]
    assert far["missing"] == "1" and float(far["mean"]) == pytest.approx((4 + 2) / 2)
    assert found["hd95", "la-8"]["better"] == "1" and found["hd95", "fixed box"]["better"] == "0"
    assert "65.00 ± 7.07" in text and "7.50 ± 3.54" in text and "1 of 2" in text and "Dice %" in text


def test_several_classes_have_a_row_each(tmp_path, capsys):
    """Two classes, of which the second is nowhere in case c1: its mean is over the case that has it."""
    runs = []
    for name, recipe, first, second in (("a", "la-8-supervised", (0.4, 0.6), 0.2), ("b", "la-8", (0.5, 0.5), 0.8)):
        folder = evaluated(tmp_path / name, recipe, [], ["classes=3"])
        lines = [f"c{n},decoder 1,1,{dice},0.1,,,,\n" for n, dice in enumerate(first)]
        lines += [f"c0,decoder 1,2,{second},0.1,3,,,\n", "c1,decoder 1,2,,,,,,\n"]
        (folder / "evaluation-test" / "scores.csv").write_text(HEADER + "".join(lines))
        runs.append(folder)
    assert cli.main(["compare", *map(str, runs), "--csv", str(tmp_path / "table.csv")]) == 0
    text = capsys.readouterr().out
    with (tmp_path / "table.csv").open() as file:
        found = {(row["metric"], row["class"], row["recipe"]): row for row in csv.DictReader(file)}
    means = {klass: float(found["dice", klass, "la-8"]["mean"]) for klass in ("1", "2", "all")}
    assert means == pytest.approx({"1": 0.5, "2": 0.8, "all": 0.6})
    second = found["dice", "2", "la-8"]
    assert float(second["difference"]) == pytest.approx(0.6)
    assert (second["better"], second["cases"], second["missing"]) == ("1", "1", "1")
    assert float(found["dice", "1", "la-8"]["difference"]) == pytest.approx(0, abs=1e-12)
    assert found["hd95", "1", "la-8"]["mean"] == "" and found["hd95", "2", "la-8"]["mean"] == "3.0"
    assert text.count("80.00") == 1 and "class" in text
    assert [line.split("│")[2].strip() for line in text.splitlines() if "│ la-8-supervised" in line][:3] == ["1", "2", "all"]


def test_other_output_and_no_box(runs, tmp_path, capsys):
    assert cli.main(["compare", str(runs[0]), str(runs[3]), "--output", "mean of both"]) == 0
    assert "50.00" in capsys.readouterr().out
    other = evaluated(tmp_path / "o", "la-16", [0.5, 0.9], box=0.6)
    assert cli.main(["compare", str(runs[0]), str(other)]) == 0
    assert "fixed box" not in capsys.readouterr().out  # fitted to other cases: not one line


def test_a_run_without_any_distance_shows_a_dash(runs, tmp_path, capsys):
    empty = evaluated(tmp_path / "empty", "la-16", [0.0, 0.0], missing=[0, 1])
    assert cli.main(["compare", str(runs[0]), str(empty)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if "95HD voxel" in line)
    assert [cell.strip() for cell in lines[start + 1].split("│")[2:8]] == ["la-16", "1", "-", "-", "0 of 0", "2"]


def test_settings_distinguish_recipes_of_one_name():
    base = load_recipe("la-8", [])
    settings = [
        base,
        base.replace(seed=5),
        base.replace(learning_rate=0.02),
        base.replace(channels_last=True, patch=(96, 96, 80)),
    ]
    scores = {"dice": {("a", "1"): 0.5}}
    runs = [Run(one.title, {key: getattr(one, key) for key in one.__dataclass_fields__}, scores) for one in settings]
    names = by_recipe(runs)
    assert [len(group) for group in names.values()] == [2, 1, 1]
    assert list(names)[1].startswith("la-8, channels_last=false, learning_rate=0.02, patch=112,112,80")
    assert "patch=96,96,80" in list(names)[2]
    assert list(by_recipe(runs[:2])) == ["la-8"]


def test_a_difference_of_other_seeds_has_no_deviation():
    scores = [
        {metric: {("a", "1"): value} for metric in ("dice", "jaccard", "hd95", "asd", "hd95_mm", "asd_mm")}
        for value in (0.5, 0.6)
    ]
    runs = [Run("x", {"seed": n}, scores[n % 2]) for n in range(4)]
    _, second = (line for line in compare({"x": runs[:2], "y": runs[2:]}) if line.metric == "dice")
    assert math.isnan(second.difference_deviation) and not math.isnan(second.deviation)
    same = [replace(run, settings={"seed": n}) for n, run in enumerate(runs[2:])]
    assert compare({"x": runs[:2], "y": same})[1].difference_deviation == 0


def test_mistakes(runs, tmp_path, capsys):
    assert "has no config.toml" in mistake(capsys, "compare", tmp_path / "none")
    assert "run `rplib evaluate" in mistake(capsys, "compare", runs[0], "--split", "train")
    longer = evaluated(tmp_path / "long", "la-16", [0.5, 0.9, 0.8])
    assert "not scored on the same cases as la-8-supervised (for example case c2" in mistake(capsys, "compare", runs[0], longer)
    assert "there is no folder" in mistake(capsys, "compare", runs[0], "--csv", tmp_path / "no" / "a.csv")
    assert "is given twice" in mistake(capsys, "compare", runs[0], runs[1], runs[0].parent / "." / runs[0].name)
    bare = evaluated(tmp_path / "bare", "la-16", [])
    assert "no scores for this output" in mistake(capsys, "compare", bare)
