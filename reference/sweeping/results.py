"""The scores of a sweep: one row per run, network, weights and case; means, spread and paired differences."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from rplib.reference.config import Config
from rplib.reference.evaluation.scoring import BOX, METRICS
from rplib.reference.inference.windows import DECODER_1, LAST_WEIGHTS
from rplib.reference.reporting.run_log import METRICS_FILE, read_metrics
from rplib.reference.sweeping.plan import Plan, Planned

MEAN_OF_CASES, ALL_CLASSES = "mean", "all"


class Result(NamedTuple):
    """One row of sweep.csv; scores are fractions and voxels, empty if missing.

    Attributes:
        network: "decoder 1", "mean of both", or the fixed box.
        weights: "last", "averaged", or "best" (selected on validation cases or, under protocol 'paper', on test cases).
        case: a case's name, or "mean" for the mean over the cases and classes that have the score.
    """

    cell: str
    recipe: str
    seed: int
    network: str
    weights: str
    case: str
    klass: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """One cell compared with the baseline, by the mean Dice of decoder 1 of each run (with its final weights).

    Attributes:
        seeds, means: the seeds of the runs, and their mean Dice.
        deviation: over the seeds (n - 1); NaN for one seed.
        difference, difference_deviation, lowest: mean, deviation and minimum of the differences to the baseline, seed by seed,
            over the seeds that both have; NaN for the baseline.
        p_seeds: two-sided paired t-test of those differences; NaN for fewer than two seeds.
        p_cases: two-sided Wilcoxon test of the paired cases, each the mean over those seeds; NaN for fewer than six cases.
        better, cases: number of cases in which it is better, and number of cases compared.
    """

    cell: str
    seeds: list[int]
    means: list[float]
    mean: float
    deviation: float
    difference: float
    difference_deviation: float
    lowest: float
    p_seeds: float
    p_cases: float
    better: int
    cases: int


def read_results(plan: Plan) -> list[Result]:
    """All rows of all runs scored so far."""
    return [row for run in plan.runs if run.scores(plan.split).is_file() for row in _read(run, plan.split)]


def final(results: Sequence[Result]) -> list[Result]:
    """The rows of decoder 1 with the final weights of its run."""
    beside = {(row.cell, row.seed) for row in results if row.weights != "last"}
    return [row for row in results if row.network == DECODER_1 and (row.weights != "last" or (row.cell, row.seed) not in beside)]


def dice_by_seed(results: Sequence[Result]) -> dict[str, dict[int, dict[str, float]]]:
    """Cell -> seed -> case -> Dice (mean over the classes that have one) of the final weights of decoder 1."""
    found: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in final(results):
        if row.case != MEAN_OF_CASES and not math.isnan(row.scores["dice"]):
            found.setdefault(row.cell, {}).setdefault(row.seed, {}).setdefault(row.case, []).append(row.scores["dice"])
    return {
        cell: {seed: {case: statistics.fmean(values) for case, values in cases.items()} for seed, cases in seeds.items()}
        for cell, seeds in found.items()
    }


def compare_cells(results: Sequence[Result], cells: Sequence[str], baseline: str) -> list[Comparison]:
    """Every cell that has a scored run, in the order of `cells`."""
    dice = dice_by_seed(results)
    return [_compare(cell, dice[cell], dice.get(baseline, {}), cell == baseline) for cell in cells if cell in dice]


def _compare(cell: str, ours: dict[int, dict[str, float]], base: dict[int, dict[str, float]], alone: bool) -> Comparison:
    means = {seed: statistics.fmean(cases.values()) for seed, cases in ours.items()}
    paired = [] if alone else sorted(set(ours) & set(base))
    differences = [means[seed] - statistics.fmean(base[seed].values()) for seed in paired]
    names = [case for case in (ours[paired[0]] if paired else {}) if all(case in ours[s] and case in base[s] for s in paired)]
    by_case = [statistics.fmean(ours[s][case] - base[s][case] for s in paired) for case in names]
    return Comparison(
        cell,
        list(means),
        list(means.values()),
        statistics.fmean(means.values()),
        _deviation(list(means.values())),
        statistics.fmean(differences) if differences else math.nan,
        _deviation(differences),
        min(differences, default=math.nan),
        _p(stats.ttest_1samp(differences, 0.0)) if len(differences) > 1 and _deviation(differences) > 0 else math.nan,
        _p(stats.wilcoxon(by_case)) if len(by_case) > 5 and any(by_case) else math.nan,
        sum(difference > 0 for difference in by_case),
        len(by_case),
    )


def validation_curves(plan: Plan) -> dict[str, dict[int, list[float]]]:
    """Cell -> iteration -> validation Dice of every seed; cells without a validation are left out."""
    curves: dict[str, dict[int, list[float]]] = {}
    for run in plan.runs:
        path = run.folder / METRICS_FILE
        for row in read_metrics(path) if path.is_file() else []:
            if row.validation_dice is not None:
                curves.setdefault(run.cell, {}).setdefault(row.iteration, []).append(row.validation_dice)
    return curves


def results_csv(results: Sequence[Result]) -> str:
    """sweep.csv: an empty field is a missing value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", "recipe", "seed", "network", "weights", "case", "class", *METRICS])
    for *arguments, scores in results:
        values = [scores.get(metric, math.nan) for metric in METRICS]
        writer.writerow([*arguments, *("" if math.isnan(value) else round(value, 6) for value in values)])
    return text.getvalue()


def _read(run: Planned, split: str) -> list[Result]:
    final = _final_weights(run.config)
    rows = []
    with run.scores(split).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            method = row["method"]
            network, weights = (DECODER_1, "last") if method == LAST_WEIGHTS else (method, final)
            weights = "-" if method == BOX else weights
            scores = {metric: float(row[metric] or "nan") for metric in METRICS if metric in row}
            rows.append(Result(run.cell, run.recipe, run.seed, network, weights, row["case"], row["class"], scores))
    kinds = dict.fromkeys((row.network, row.weights) for row in rows)
    means = []
    for network, weights in kinds:
        of_kind = [row.scores for row in rows if (row.network, row.weights) == (network, weights)]
        mean = {metric: _mean([scores[metric] for scores in of_kind]) for metric in of_kind[0]}
        means.append(Result(run.cell, run.recipe, run.seed, network, weights, MEAN_OF_CASES, ALL_CLASSES, mean))
    return rows + means


def _final_weights(config: Config) -> str:
    if config.validation or config.protocol == "paper":
        return "best"
    return "averaged" if config.average else "last"


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return statistics.fmean(there) if there else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _p(test: object) -> float:
    return float(test.pvalue)  # type: ignore[attr-defined]
