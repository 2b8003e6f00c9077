"""Several evaluated runs side by side: seeds of one recipe together, recipes compared case by case.

examples:
  rplib compare runs/la-8-seed* runs/la-8-supervised-seed*
  rplib compare RUN... --output "mean of both" --csv table.csv

Runs whose settings differ in the seed alone are one line; the first is what the others are compared with. All must have been
evaluated (`rplib evaluate RUN --data DIR`) on the same cases.
"""

import argparse
import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rplib.errors import UserError

# Besides the seed: settings that change no number of the training and none of the evaluation.
_SAME = {"seed", "cache", "checkpoint_every", "log_every", "window_batch"}

Scores = dict[str, dict[tuple[str, str], float]]  # metric -> (case, class) -> value; NaN where there is none


@dataclass(frozen=True)
class Run:
    """One evaluated run: its recipe's title, all of its settings, its scores."""

    title: str
    settings: dict[str, object]
    scores: Scores

    def mean(self, metric: str) -> float:
        """Over the cases and classes that have the score."""
        return _mean(self.scores[metric].values())


@dataclass(frozen=True)
class Line:
    """One metric of some runs of one recipe, and how it stands to the first recipe.

    Attributes:
        runs: how many.
        mean, deviation: of the runs' means. Deviations are those of a sample (n - 1) and NaN for one run.
        missing: cases without the score, over all runs.
        difference: mean minus that of the first recipe. difference_deviation: of the differences seed by seed, where both
            recipes were run with the same seeds.
        better, cases: the number of cases (times classes) in which the mean over runs is better than the first recipe's, and
            the number in which both have one.
    """

    recipe: str
    runs: int
    metric: str
    mean: float
    deviation: float
    missing: int
    difference: float
    difference_deviation: float
    better: int
    cases: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `rplib compare`."""
    from rplib.reference.inference.windows import LAST_WEIGHTS, OUTPUTS

    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of `rplib train`, evaluated")
    parser.add_argument("--split", choices=("test", "train", "val"), default="test", help="of which list (default: %(default)s)")
    parser.add_argument("--output", choices=(*OUTPUTS, LAST_WEIGHTS), default=OUTPUTS[0], help="of the network (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers, unrounded")


def run(args: argparse.Namespace) -> int:
    """Prints the table; mistakes raise `rplib.errors.UserError`."""
    from rplib.reference.evaluation.scoring import BOX
    from rplib.reference.files import write_text_atomically

    if args.csv and not args.csv.parent.is_dir():
        raise UserError(f"--csv: there is no folder {args.csv.parent}; make it first.")
    twice = [folder for k, folder in enumerate(args.runs) if folder.resolve() in [f.resolve() for f in args.runs[:k]]]
    if twice:
        raise UserError(f"{twice[0]} is given twice; each run counts once.")
    recipes = by_recipe([read_run(folder, args.split, args.output) for folder in args.runs])
    boxes = [read_run(folder, args.split, BOX).scores for folder in args.runs]
    if boxes[0] and all(box.get("dice") == boxes[0]["dice"] for box in boxes):  # one box, fitted to the same labelled cases
        recipes[BOX] = [Run(BOX, {}, boxes[0])]
    lines = compare(recipes)
    print(render(lines), end="")
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(asdict(lines[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if _is_nan(value) else value for key, value in asdict(line).items()} for line in lines)
        write_text_atomically(args.csv, text.getvalue())
    return 0


def read_run(folder: Path, split: str, method: str) -> Run:
    """Settings of a run, and the scores of one method (an output of the network, or the fixed box) where it was scored.

    Raises:
        UserError: no run folder, or not evaluated.
    """
    from rplib.reference.checkpoint import CONFIG
    from rplib.reference.config import load_config

    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no {CONFIG}; expected a run folder of `rplib train`.")
    config = load_config(folder / CONFIG)
    path = folder / f"evaluation-{split}" / "scores.csv"
    if not path.is_file():
        raise UserError(f"{folder} has no {path.relative_to(folder)}; run `rplib evaluate {folder} --data DIR --split {split}`.")
    scores: Scores = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["method"] == method:
                for metric in set(row) - {"case", "method", "class"}:
                    scores.setdefault(metric, {})[row["case"], row["class"]] = float(row[metric] or "nan")
    return Run(config.title, asdict(config), scores)


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in the seed alone together, under the recipe's title and what sets it apart from the others."""
    groups: list[list[Run]] = []
    for one in runs:
        group = next((group for group in groups if not _differing(group[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    names = {}
    for group in groups:
        others = [other[0] for other in groups if other is not group and other[0].title == group[0].title]
        apart = sorted({key for other in others for key in _differing(group[0], other)})
        names[", ".join([group[0].title, *(f"{key}={_word(group[0].settings[key])}" for key in apart)])] = group
    return names


def compare(recipes: dict[str, list[Run]]) -> list[Line]:
    """Every metric that all runs have, of every recipe; differences are to the first.

    Raises:
        UserError: the runs were scored on different cases.
    """
    from rplib.reference.evaluation.scoring import METRICS

    runs = [one for group in recipes.values() for one in group]
    if not runs[0].scores:
        raise UserError(f"{runs[0].title}: the evaluation scored no case by this output; run `rplib evaluate` again.")
    cases = set(runs[0].scores["dice"])
    for name, group in recipes.items():
        for one in group:
            if set(one.scores.get("dice", ())) != cases:
                odd = sorted(set(one.scores.get("dice", ())) ^ cases)[0]
                raise UserError(
                    f"{name}: not scored on the same cases as {runs[0].title} (case {odd[0]}, class {odd[1]}, for one)."
                )
    first = next(iter(recipes.values()))
    return [
        _line(name, group, first, metric)
        for metric in METRICS
        if not all(_is_nan(one.mean(metric)) for one in runs)
        for name, group in recipes.items()
    ]


def _line(name: str, group: Sequence[Run], first: Sequence[Run], metric: str) -> Line:
    means = [one.mean(metric) for one in group]
    cases = group[0].scores[metric]
    pairs = [[_mean(one.scores[metric][case] for one in runs) for runs in (group, first)] for case in cases]
    pairs = [pair for pair in pairs if not any(map(_is_nan, pair))]
    sign = 1 if metric in ("dice", "jaccard") else -1  # of what is better
    alone = group is first
    return Line(
        recipe=name,
        runs=len(group),
        metric=metric,
        mean=statistics.fmean(means),
        deviation=_deviation(means),
        missing=sum(_is_nan(value) for one in group for value in one.scores[metric].values()),
        difference=math.nan if alone else statistics.fmean(means) - statistics.fmean(one.mean(metric) for one in first),
        difference_deviation=math.nan if alone else _deviation(_differences(group, first, metric)),
        better=sum(sign * ours > sign * theirs for ours, theirs in pairs),
        cases=len(pairs),
    )


def render(lines: Sequence[Line]) -> str:
    """The table as text."""
    from rich.console import Console
    from rich.table import Table

    from rplib.reference.reporting.tables import TITLES, shown

    first = lines[0].recipe
    table = Table(title="mean of the runs \u00b1 standard deviation over them", title_justify="left")
    for column in ("metric", "recipe", "runs", "mean", f"minus {first}", "better in", "missing"):
        table.add_column(column, justify="left" if column in ("metric", "recipe") else "right")
    for line in lines:
        metric, none = line.metric, line.recipe == first
        table.add_row(
            TITLES[metric] if none else "",
            line.recipe,
            str(line.runs),
            shown(line.mean, metric) + _plus_minus(line.deviation, metric),
            "" if none else shown(line.difference, metric) + _plus_minus(line.difference_deviation, metric),
            "" if none else f"{line.better} of {line.cases}",
            str(line.missing) if line.missing else "",
        )
    console = Console(file=io.StringIO(), width=120, record=True, color_system=None, highlight=False)
    console.print(table)
    return console.export_text()


def _differing(a: Run, b: Run) -> list[str]:
    """Settings that are not the same."""
    return [key for key in a.settings if key not in _SAME and a.settings[key] != b.settings[key]]


def _differences(group: Sequence[Run], first: Sequence[Run], metric: str) -> list[float]:
    """Seed by seed, where the seeds are the same ones."""
    theirs = {one.settings.get("seed"): one.mean(metric) for one in first}
    ours = {one.settings.get("seed"): one.mean(metric) for one in group}
    return [ours[seed] - theirs[seed] for seed in ours] if set(ours) == set(theirs) else []


def _mean(values: Iterable[float]) -> float:
    there = [value for value in values if not _is_nan(value)]
    return statistics.fmean(there) if there else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _plus_minus(deviation: float, metric: str) -> str:
    from rplib.reference.reporting.tables import shown

    return "" if _is_nan(deviation) else f" \u00b1 {shown(deviation, metric)}"


def _word(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
