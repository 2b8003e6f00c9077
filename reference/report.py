"""What an evaluation leaves: tables on screen and on disk, NIfTI volumes, and the picture sheet."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rplib.reference.cases import Case, voxel_sizes
from rplib.reference.checkpoint import write_text_atomically
from rplib.reference.evaluation import BOX, METRICS, OnCase, Report
from rplib.reference.inference import DECODER_1, MEAN, Segmentation
from rplib.reference.metrics import Scores
from rplib.reference.pictures import PREDICTION, TRUTH, three_planes, write_sheet

SCORES, SUMMARY, TEXT, SHEET, VOLUMES = "scores.csv", "summary.csv", "report.txt", "pictures.png", "nifti"
_PERCENT = ("dice", "jaccard")
_TITLES = {
    "dice": "Dice %",
    "jaccard": "Jaccard %",
    "hd95": "95HD voxel",
    "asd": "ASD voxel",
    "hd95_mm": "95HD mm",
    "asd_mm": "ASD mm",
}


def write(report: Report, out: Path, pictures: int = 6, spacing: Sequence[float] | None = None) -> None:
    """Prints the tables and writes them (scores.csv, summary.csv, report.txt) and the picture sheet into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = render(report, per_case=True)
    write_text_atomically(out / SCORES, scores_csv(report))
    write_text_atomically(out / SUMMARY, summary_csv(report))
    write_text_atomically(out / TEXT, text)
    if pictures:
        _write_pictures(report, out / SHEET, pictures, spacing)
    print(text, end="")
    print(f"written: {out}/ ({', '.join(sorted(path.name for path in out.iterdir()))})")


def render(report: Report, per_case: bool = False) -> str:
    """The tables as text, 120 columns wide."""
    console = Console(file=io.StringIO(), width=120, record=True, color_system=None, highlight=False)
    metrics = [
        m for m in METRICS if any(not math.isnan(v) for v in report.values(DECODER_1, m)) or not m.endswith("_mm")
    ]
    if per_case:
        console.print(_case_table(report, metrics))
    console.print(_mean_table(report, metrics))
    for note in report.notes:
        console.print(f"- {note}")
    return console.export_text()


def scores_csv(report: Report) -> str:
    """Every case, method and class; an empty field is a missing value."""
    header = ["case", "method", "class", *METRICS]
    return _csv([header, *([r.case, r.method, r.klass, *(getattr(r.scores, m) for m in METRICS)] for r in report.rows)])


def summary_csv(report: Report) -> str:
    """Mean, standard deviation and number of missing values for every method, class and metric."""
    table: list[list[object]] = [["method", "class", "metric", "mean", "standard_deviation", "missing"]]
    for method in report.methods:
        for klass in range(1, report.config.classes):
            for metric in METRICS:
                found = report.mean(method, metric, klass)
                table.append([method, klass, metric, found.mean, found.deviation, found.missing])
    return _csv(table)


def nifti_writer(folder: Path, spacing: Sequence[float] | None, everything: bool = False) -> OnCase:
    """For `evaluate(on_case=...)`: writes `<case>_prediction.nii.gz`, with `everything` image, truth and score too."""
    def write(case: Case, found: dict[str, Segmentation]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The published h5 files hold no affine: voxel size on the diagonal, 1 where it is not known.
        affine = case.affine
        if affine is None or spacing is not None:
            affine = np.diag([*([*spacing, 1, 1][:3] if spacing is not None else (1, 1, 1)), 1.0])
        known = spacing is not None or case.affine is not None
        volumes: dict[str, NDArray] = {"prediction": found[DECODER_1].label}
        if everything:
            channels_last = np.moveaxis(case.image, 0, -1) if case.image.ndim > found[DECODER_1].label.ndim else case.image
            volumes |= {"score": found[DECODER_1].score, "image": channels_last}
            volumes |= {} if case.label is None else {"truth": case.label}
        for what, volume in volumes.items():
            image = nibabel.Nifti1Image(volume, affine)
            image.header.set_xyzt_units("mm" if known else "unknown")
            nibabel.save(image, folder / f"{case.name}_{what}.nii.gz")

    return write


def shown(value: float, metric: str) -> str:
    """A score as people read it: overlaps in percent, a missing value as a dash.

    >>> shown(0.8986, "dice"), shown(float("nan"), "hd95"), shown(6.914, "hd95")
    ('89.86', '-', '6.91')
    """
    if math.isnan(value):
        return "-"
    return f"{100 * value if metric in _PERCENT else value:.2f}"


def _case_table(report: Report, metrics: Sequence[str]) -> Table:
    several = report.config.classes > 2
    table = Table(title=f"{DECODER_1}, case by case", title_justify="left")
    table.add_column("case", no_wrap=True, min_width=max(len(name) for name in report.predictions))
    if several:
        table.add_column("class", justify="right")
    for metric in metrics:
        table.add_column(_TITLES[metric], justify="right")
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


def _mean_table(report: Report, metrics: Sequence[str]) -> Table:
    several = report.config.classes > 2
    table = Table(
        title="mean over the cases \u00b1 standard deviation (n: without a distance, left out)", title_justify="left"
    )
    table.add_column("method")
    if several:
        table.add_column("class", justify="right")
    for metric in metrics:
        table.add_column(_TITLES[metric], justify="right")
    for method in report.methods:
        for klass in [*range(1, report.config.classes), *([None] if several else [])]:
            cells = [method, *(["all" if klass is None else str(klass)] if several else [])]
            for metric in metrics:
                found = report.mean(method, metric, klass)
                missing = f" (n={found.missing})" if found.missing else ""
                cells.append(f"{shown(found.mean, metric)} \u00b1 {shown(found.deviation, metric)}{missing}")
            table.add_row(*cells)
    return table


def _write_pictures(report: Report, path: Path, number: int, spacing: Sequence[float] | None) -> None:
    scores: dict[str, dict[int, Scores]] = {}
    for row in report.rows:
        if row.method == DECODER_1:
            scores.setdefault(row.case, {})[row.klass] = row.scores
    names = report.worst_first()[:number]
    rows = []
    for name in names:
        case = report.dataset.load(name)
        s = scores[name][1]
        if len(scores[name]) == 1:
            caption = (
                f"{name}\n\nDice    {shown(s.dice, 'dice')} %\nJaccard {shown(s.jaccard, 'jaccard')} %\n"
                f"95HD    {shown(s.hd95, 'hd95')} voxel\nASD     {shown(s.asd, 'asd')} voxel"
            )
        else:
            caption = f"{name}\n\nDice %" + "".join(
                f"\nclass {klass:3} {shown(of_class.dice, 'dice'):>6}" for klass, of_class in scores[name].items()
            )
        found = report.predictions[name]
        image = case.image if case.image.ndim == found.ndim else case.image[0]  # the first channel stands for all
        panels = three_planes(image, case.label, found, report.dataset.axes)
        rows.append((caption, [panel._replace(spacing=spacing or voxel_sizes(case)) for panel in panels]))
    every = len(report.predictions)
    what = f"the {len(names)} worst of {every} cases" if len(names) < every else f"all {every} cases"
    title = f"{report.config.name}, {DECODER_1}: {what}, worst first\n{report.notes[0]}"
    write_sheet(path, rows, title, {"truth": TRUTH, "prediction": PREDICTION})


def _csv(table: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in table:
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in line])
    return text.getvalue()
