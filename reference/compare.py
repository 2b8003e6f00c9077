"""Compare evaluated runs: seeds of one recipe are averaged, recipes are compared case by case.

examples:
  rplib compare runs/la-8-seed* runs/la-8-supervised-seed*
  rplib compare RUN... --output "mean of both" --csv table.csv

Runs that differ only in the seed form one row; the first recipe is the baseline. With several foreground classes there is a row
for each class, and one for all. All runs must have been evaluated on the same cases (`rplib evaluate RUN --data DIR`).
"""

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rplib.errors import UserError, reading

# Settings that may differ in addition to the seed: they affect neither training nor evaluation results.
_SAME = {"seed", "cache", "checkpoint_every", "log_every", "window_batch"}

ALL = "all"  # classes

ScoreTable = dict[str, dict[tuple[str, str], float]]  # metric -> (case, class) -> value; NaN where missing


@dataclass(frozen=True)
class Run:
    """One evaluated run: the title of its recipe, its settings, its scores."""

    title: str
    settings: dict[str, object]
    scores: ScoreTable
    table: Path | None = None  # the scores.csv

    def mean(self, metric: str, klass: str = ALL) -> float:
        """Mean over the cases (and classes, unless one is named) that have the score."""
        return _mean(self.of(metric, klass).values())

    def of(self, metric: str, klass: str) -> dict[tuple[str, str], float]:
        """The scores of one class, or all."""
        return {key: value for key, value in self.scores[metric].items() if klass in (ALL, key[1])}


@dataclass(frozen=True)
class Line:
    """One metric of the runs of one recipe, for one class or all, compared with the first recipe.

    Attributes:
        klass: the class, or ``"all"``: the mean over cases and classes. Runs with one foreground class have only the latter.
        runs: number of runs.
        mean, deviation: of the runs' means. Deviations are sample deviations (n - 1), NaN for a single run.
        missing: cases without the score, over all runs.
        difference: mean minus the mean of the first recipe. difference_deviation: of the differences paired by seed, if both
            recipes were run with the same seeds.
        better, cases: number of cases (times classes) in which the mean over runs is better than for the first recipe, and
            number of those in which both have the score.
    """

    recipe: str
    klass: str
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
    """The options of `rplib compare`."""
    from rplib.reference.inference.windows import LAST_WEIGHTS, OUTPUTS

    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="evaluated run folders")
    parser.add_argument("--split", choices=("test", "train", "val"), default="test", help="list of cases (default: %(default)s)")
    parser.add_argument(
        "--output",
        choices=(*OUTPUTS, LAST_WEIGHTS),
        default=OUTPUTS[0],
        metavar="OUTPUT",
        help=f'output of the network: "{OUTPUTS[0]}", "{OUTPUTS[1]}" or "{LAST_WEIGHTS}" (default: %(default)s)',
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the unrounded numbers to FILE")


def run(args: argparse.Namespace) -> int:
    """Prints the table; user errors raise `rplib.errors.UserError`."""
    from rplib.reference.evaluation.scoring import BOX
    from rplib.reference.files import write_text_atomically

    if args.csv and not args.csv.parent.is_dir():
        raise UserError(f"--csv: there is no folder {args.csv.parent}; create it first.")
    twice = [folder for k, folder in enumerate(args.runs) if folder.resolve() in [f.resolve() for f in args.runs[:k]]]
    if twice:
        raise UserError(f"{twice[0]} is given twice; name each run once.")
    recipes = by_recipe([read_run(folder, args.split, args.output) for folder in args.runs])
    boxes = [read_run(folder, args.split, BOX).scores for folder in args.runs]
    if boxes[0] and all(box.get("dice") == boxes[0]["dice"] for box in boxes):  # one box, fitted to the same labelled cases
        recipes[BOX] = [Run(BOX, {}, boxes[0], args.runs[0] / f"evaluation-{args.split}" / "scores.csv")]
    lines = compare(recipes)
    print(render(lines), end="")
    if args.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow("class" if key == "klass" else key for key in asdict(lines[0]))
        writer.writerows(["" if _is_nan(value) else value for value in asdict(line).values()] for line in lines)
        write_text_atomically(args.csv, text.getvalue())
    return 0


def read_run(folder: Path, split: str, method: str) -> Run:
    """Settings of a run and the scores of one method: an output of the network, or the fixed box.

    Raises:
        UserError: not a run folder, or not evaluated yet.
    """
    from rplib.reference.checkpoint import CONFIG
    from rplib.reference.config import load_config

    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}; expected a run folder of `rplib train`.")
    config = load_config(folder / CONFIG)
    path = folder / f"evaluation-{split}" / "scores.csv"
    if not path.is_file():
        raise UserError(f"{folder} has no {path.relative_to(folder)}; run `rplib evaluate {folder} --data DIR --split {split}`.")
    return Run(config.title, asdict(config), read_scores(path, method), path)


def read_scores(path: Path, method: str) -> ScoreTable:
    """The scores of one method in a scores.csv.

    Raises:
        UserError: other columns, a truncated line, an invalid score, or a duplicate case.
    """
    from rplib.reference.evaluation.scoring import METRICS

    expected = ["case", "method", "class", *METRICS]
    scores: ScoreTable = {}
    with reading(path, "table of scores", "run `rplib evaluate` again"), path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file, strict=True)
        if (header := next(lines, [])) != expected:
            raise ValueError(f"its columns are {', '.join(header)[:80] or 'none'}; expected {', '.join(expected)}")
        for number, line in enumerate(lines, 2):
            if len(line) != len(expected):
                raise ValueError(f"line {number} has {len(line)} fields; expected {len(expected)}")
            case, by, klass, *values = line
            if by != method:
                continue
            for metric, text in zip(METRICS, values, strict=True):
                value = float(text or "nan")
                most = 1.0 if metric in ("dice", "jaccard") else sys.float_info.max
                if text and not 0 <= value <= most:
                    raise ValueError(f"line {number}: {metric} is {text[:40]}")
                if (case, klass) in scores.setdefault(metric, {}):
                    raise ValueError(f"line {number}: case {case[:80]}, class {klass[:20]} occurs twice")
                scores[metric][case, klass] = value
    return scores


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ only in the seed; the key is the recipe's title and the settings that distinguish it."""
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
        names[", ".join([group[0].title, *(f"{key}={_text(group[0].settings[key])}" for key in apart)])] = group
    return names


def compare(recipes: dict[str, list[Run]]) -> list[Line]:
    """Every metric that the runs have, for every recipe; differences are relative to the first.

    Raises:
        UserError: the runs were scored on different cases.
    """
    from rplib.reference.evaluation.scoring import METRICS

    runs = [one for group in recipes.values() for one in group]
    if not runs[0].scores:
        where = f" in {runs[0].table}" if runs[0].table else ""
        raise UserError(f"{runs[0].title}{where}: the evaluation has no scores for this output; run `rplib evaluate` again.")
    cases = set(runs[0].scores["dice"])
    for name, group in recipes.items():
        for one in group:
            if set(one.scores.get("dice", ())) != cases:
                odd = sorted(set(one.scores.get("dice", ())) ^ cases)[0]
                where = f" in {one.table}" if one.table else ""
                raise UserError(
                    f"{name}{where}: not scored on the same cases as {runs[0].title} (for example case {odd[0]}, class {odd[1]})."
                )
    first = next(iter(recipes.values()))
    classes = sorted({klass for _, klass in cases}, key=lambda klass: (len(klass), klass))  # 2 before 10
    return [
        _line(name, group, first, metric, klass)
        for metric in METRICS
        if not all(_is_nan(one.mean(metric)) for one in runs)
        for klass in [*(classes if len(classes) > 1 else []), ALL]
        for name, group in recipes.items()
    ]


def _line(name: str, group: Sequence[Run], first: Sequence[Run], metric: str, klass: str) -> Line:
    means = [mean for one in group if not _is_nan(mean := one.mean(metric, klass))]
    cases = group[0].of(metric, klass)
    pairs = [[_mean(one.scores[metric][case] for one in runs) for runs in (group, first)] for case in cases]
    pairs = [pair for pair in pairs if not any(map(_is_nan, pair))]
    sign = 1 if metric in ("dice", "jaccard") else -1  # 1: higher is better
    alone = group is first
    return Line(
        recipe=name,
        klass=klass,
        runs=len(group),
        metric=metric,
        mean=_mean(means),
        deviation=_deviation(means),
        missing=sum(_is_nan(value) for one in group for value in one.of(metric, klass).values()),
        difference=math.nan if alone else _mean(means) - _mean(one.mean(metric, klass) for one in first),
        difference_deviation=math.nan if alone else _deviation(_differences(group, first, metric, klass)),
        better=sum(sign * ours > sign * theirs for ours, theirs in pairs),
        cases=len(pairs),
    )


def render(lines: Sequence[Line]) -> str:
    """The table as text."""
    from rich.table import Table

    from rplib.reference.reporting.tables import TITLES, as_text, shown

    first, several = lines[0].recipe, any(line.klass != ALL for line in lines)
    table = Table(title="mean of the runs \u00b1 standard deviation over the runs", title_justify="left")
    for column in ("metric", *(["class"] if several else []), "recipe", "runs", "mean", f"minus {first}", "better in", "missing"):
        table.add_column(column, justify="left" if column in ("metric", "class", "recipe") else "right")
    for line in lines:
        metric, none = line.metric, line.recipe == first
        table.add_row(
            TITLES[metric] if none and line.klass == lines[0].klass else "",
            *([line.klass if none else ""] if several else []),
            line.recipe,
            str(line.runs),
            shown(line.mean, metric) + _plus_minus(line.deviation, metric),
            "" if none else shown(line.difference, metric) + _plus_minus(line.difference_deviation, metric),
            "" if none else f"{line.better} of {line.cases}",
            str(line.missing) if line.missing else "",
        )
    return as_text(table)


def _differing(a: Run, b: Run) -> list[str]:
    """Names of the settings that differ."""
    return [key for key in a.settings if key not in _SAME and a.settings[key] != b.settings[key]]


def _differences(group: Sequence[Run], first: Sequence[Run], metric: str, klass: str) -> list[float]:
    """Paired by seed, if both have the same seeds and every run has the score."""
    theirs = {one.settings.get("seed"): one.mean(metric, klass) for one in first}
    ours = {one.settings.get("seed"): one.mean(metric, klass) for one in group}
    if set(ours) != set(theirs) or any(map(_is_nan, [*ours.values(), *theirs.values()])):
        return []
    return [ours[seed] - theirs[seed] for seed in ours]


def _mean(values: Iterable[float]) -> float:
    there = [value for value in values if not _is_nan(value)]
    return statistics.fmean(there) if there else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _plus_minus(deviation: float, metric: str) -> str:
    from rplib.reference.reporting.tables import shown

    return "" if _is_nan(deviation) else f" \u00b1 {shown(deviation, metric)}"


def _text(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
