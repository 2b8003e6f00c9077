"""The tables of an evaluation, as text and CSV, and their formatted cells."""

import csv
import io
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rplib.reference.evaluation.reliability import Verdict
from rplib.reference.evaluation.scoring import BOX, METRICS, Report
from rplib.reference.inference.windows import DECODER_1, MEAN

_PERCENT = ("dice", "jaccard")
TITLES = {
    "dice": "Dice %",
    "jaccard": "Jaccard %",
    "hd95": "95HD voxel",
    "asd": "ASD voxel",
    "hd95_mm": "95HD mm",
    "asd_mm": "ASD mm",
}


def render(report: Report, per_case: bool = False) -> str:
    """The tables as text, 120 columns wide."""
    metrics = shown_metrics(report)
    tables = [_case_table(report, metrics)] if per_case else []
    tables.append(_mean_table(report, metrics))
    if (patients := report.over_patients) is not None:
        tables.append(_mean_table(patients, metrics, f"{len(patients.names)} patients"))
    return as_text(*tables, *(f"- {note}" for note in report.notes))


def as_text(*parts: Table | str, width: int = 120) -> str:
    """Tables and lines as text, drawn by rich without interpreting names in them as markup or emoji.

    >>> print(as_text("recipe [/b], :smile:"), end="")
    recipe [/b], :smile:
    """
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)
    return console.export_text()


def scores_csv(report: Report) -> str:
    """One row per case, method and class; an empty field is a missing value."""
    header = ["case", "method", "class", *METRICS]
    return _csv([header, *([r.case, r.method, r.klass, *(getattr(r.scores, m) for m in METRICS)] for r in report.rows)])


def reliability_csv(report: Report) -> str:
    """Agreement of the reliability maps with the ground truth, for every case that has them."""
    verdicts = report.verdicts()
    return _csv([["case", *Verdict._fields], *([name, *found] for name, found in verdicts.items())])


def shown_metrics(report: Report) -> list[str]:
    """The metrics; those in mm only if a case has them."""
    return [m for m in METRICS if not m.endswith("_mm") or any(not math.isnan(v) for v in report.values(DECODER_1, m))]


def mean_cell(report: Report, method: str, metric: str, klass: int | None = None) -> str:
    """Mean and standard deviation as formatted text, with the number of missing values."""
    found = report.mean(method, metric, klass)
    missing = f" ({found.missing} missing)" if found.missing else ""
    return f"{shown(found.mean, metric)} \u00b1 {shown(found.deviation, metric)}{missing}"


def summary_csv(report: Report) -> str:
    """Mean, standard deviation and number of missing values for every method, class and metric."""
    table: list[list[object]] = [["method", "class", "metric", "mean", "standard_deviation", "missing"]]
    for method in report.methods:
        for klass in range(1, report.config.classes):
            for metric in METRICS:
                found = report.mean(method, metric, klass)
                table.append([method, klass, metric, found.mean, found.deviation, found.missing])
    return _csv(table)


def shown(value: float, metric: str) -> str:
    """A score as formatted text: overlaps in percent, a dash if missing.

    >>> shown(0.8986, "dice"), shown(float("nan"), "hd95"), shown(6.914, "hd95")
    ('89.86', '-', '6.91')
    """
    if math.isnan(value):
        return "-"
    return f"{100 * value if metric in _PERCENT else value:.2f}"


def weight(value: float) -> str:
    """A reliability weight as formatted text, with three decimals.

    >>> weight(0.98765), weight(float("nan"))
    ('0.988', '-')
    """
    return "-" if math.isnan(value) else f"{value:.3f}"


def _case_table(report: Report, metrics: Sequence[str]) -> Table:
    several = report.config.classes > 2
    table = Table(title=f"{DECODER_1}, case by case", title_justify="left")
    table.add_column("case", no_wrap=True, min_width=max(len(name) for name in report.predictions))
    if several:
        table.add_column("class", justify="right")
    for metric in metrics:
        table.add_column(TITLES[metric], justify="right")
    others = [method for method in (MEAN, BOX) if method in report.methods]
    for method in others:
        table.add_column(f"Dice % {method}", justify="right")
    dice = {(row.case, row.klass, row.method): row.scores.dice for row in report.rows}
    for row in report.rows:
        if row.method == DECODER_1:
            cells = [row.case, *([str(row.klass)] if several else [])]
            cells += [shown(getattr(row.scores, metric), metric) for metric in metrics]
            cells += [shown(dice.get((row.case, row.klass, method), math.nan), "dice") for method in others]
            table.add_row(*cells)
    return table


def _mean_table(report: Report, metrics: Sequence[str], over: str = "cases") -> Table:
    several = report.config.classes > 2
    table = Table(title=f"mean over the {over} \u00b1 standard deviation (missing: no distance, excluded)", title_justify="left")
    table.add_column("method")
    if several:
        table.add_column("class", justify="right")
    for metric in metrics:
        table.add_column(TITLES[metric], justify="right")
    for method in report.methods:
        for klass in [*range(1, report.config.classes), *([None] if several else [])]:
            cells = [method, *(["all" if klass is None else str(klass)] if several else [])]
            for metric in metrics:
                cells.append(mean_cell(report, method, metric, klass))
            table.add_row(*cells)
    return table


def _csv(table: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in table:
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in line])
    return text.getvalue()
