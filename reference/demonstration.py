"""The demo behind `rplib demo`: generated data, two trainings with one budget, one table, one picture."""

import contextlib
import io
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from rplib.errors import UserError
from rplib.reference.config import Config, load_recipe
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.phantom import MOST_THRESHOLD_DICE, best_threshold_dice, write_phantoms
from rplib.reference.devices import find_device
from rplib.reference.evaluation.metrics import Scores
from rplib.reference.evaluation.scoring import BOX, Report, evaluate
from rplib.reference.files import write_text_atomically
from rplib.reference.inference.windows import DECODER_1
from rplib.reference.reporting.pictures import PREDICTION, TRUTH, Panel, largest_slice, truth_and_prediction, write_sheet
from rplib.reference.reporting.tables import shown
from rplib.reference.training.trainer import train

TRAINING_CASES, TEST_CASES, SIZE = 24, 6, (48, 48, 40)
SETTINGS = (
    "filters=4",
    "patch=32,32,32",
    "stride=16,16,16",
    "learning_rate=0.05",
    "schedule=polynomial",
    "dropout=0",
    "amp=off",
    "channels_last=true",
    "checkpoint_every=1000000",  # a one-minute run needs no resumption
    "window_batch=8",
)
LABELLED_ONLY, MUTUAL, THRESHOLD = "labelled-only", "mutual", "best threshold"
MARK = ".rplib-demo"  # marks a folder that a demo may overwrite
PICTURE, TABLE = "demo.png", "demo.txt"
_SHOWN_CASES = 3


class Demonstration(NamedTuple):
    """Results: evaluations by name, mean Dice of the best thresholds on the test cases, and the text."""

    reports: dict[str, Report]
    threshold_dice: float
    table: str


def demonstrate(out: Path, seed: int, iterations: int, device: str | None = None) -> Demonstration:
    """Generates phantoms, trains labelled-only and mutual, evaluates both, writes `out`/demo.txt and `out`/demo.png.

    Raises:
        UserError: the folder contains other files, or a number is invalid.
    """
    began = time.monotonic()
    if seed < 0 or iterations < 1:
        raise UserError(f"--seed {seed} --iterations {iterations}: expected a seed of at least 0 and at least 1 iteration.")
    where = find_device(device)
    configs = demo_configs(seed, iterations)
    _clear(out)

    phantoms = write_phantoms(out / "data", TRAINING_CASES, TEST_CASES, SIZE, seed)
    assert phantoms.threshold_dice < MOST_THRESHOLD_DICE
    reports, seconds = {}, {}
    for name, config in configs.items():
        print(f"training {name} ({iterations} iterations)", file=sys.stderr)
        start = time.monotonic()
        # The trainer's closing lines are meant for a single training.
        with contextlib.redirect_stdout(io.StringIO()), _one_thread():
            train(config, out / "data", out / name, device=where)
        seconds[name] = time.monotonic() - start
        reports[name] = evaluate(out / name, out / "data", device=str(where))

    dataset = reports[MUTUAL].dataset
    cases = [dataset.load(name, needs_label=True) for name in phantoms.test]
    threshold = statistics.fmean(best_threshold_dice(case.image, case.label) for case in cases if case.label is not None)
    _draw(out / PICTURE, reports, cases)
    table = _table(reports, threshold, seconds, configs, time.monotonic() - began)
    table += f"written: {out / PICTURE}, {out / TABLE}\n"
    write_text_atomically(out / TABLE, table)
    return Demonstration(reports, threshold, table)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: tensors this small gain little from more, and slow down when other programs need the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def demo_configs(seed: int, iterations: int) -> dict[str, Config]:
    """Settings of the two trainings: the recipes la-8-supervised and la-8, scaled down equally."""
    # The ramp-up spans the whole of this short training: early pseudo-labels are unreliable.
    every = max(1, round(iterations / 40))
    overrides = [*SETTINGS, f"seed={seed}", f"iterations={iterations}", f"ramp_every={every}"]
    recipes = {LABELLED_ONLY: "la-8-supervised", MUTUAL: "la-8"}
    configs = {name: load_recipe(recipe, [*overrides, f"name={name}"]) for name, recipe in recipes.items()}
    # The weight of the robust recipes: the paper's weight of 1 overrides the labels in so short a training.
    return configs | {MUTUAL: configs[MUTUAL].replace(consistency=0.1)}


def _clear(out: Path) -> None:
    """Creates or empties the output folder; never empties a folder that no demo wrote."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file()):
            raise UserError(f"--out {out} exists and is not a folder of an earlier demo; choose another.")
        for name in ("data", LABELLED_ONLY, MUTUAL):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _table(
    reports: dict[str, Report], threshold: float, seconds: dict[str, float], configs: dict[str, Config], total: float
) -> str:
    console = Console(file=io.StringIO(), width=120, record=True, color_system=None, highlight=False)
    test, labelled = len(reports[MUTUAL].predictions), configs[MUTUAL].labelled
    table = Table(
        title=f"generated data: {labelled} labelled of {TRAINING_CASES} training cases, {test} test cases",
        title_justify="left",
    )
    for heading in ("method", "Dice %", "Jaccard %", "95HD voxel", "ASD voxel", "training s"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    metrics = ("dice", "jaccard", "hd95", "asd")

    def cells(report: Report, method: str) -> list[str]:
        found = [(metric, report.mean(method, metric)) for metric in metrics]
        return [shown(m.mean, metric) + (f" ({m.missing} missing)" if m.missing else "") for metric, m in found]

    for name, report in reports.items():
        table.add_row(name, *cells(report, DECODER_1), f"{seconds[name]:.0f}")
    table.add_row(BOX, *cells(reports[MUTUAL], BOX), "-")
    table.add_row(THRESHOLD, shown(threshold, "dice"), "-", "-", "-", "-")
    console.print(table)
    mutual, alone = (reports[name].mean(DECODER_1, "dice").mean for name in (MUTUAL, LABELLED_ONLY))
    console.print(_verdict(mutual, alone))
    for note in (
        f"Same network, seed, labelled crops and {configs[MUTUAL].iterations} iterations; decoder 1, last weights.",
        "Fixed box: fitted to the labelled training cases. Best threshold: chosen per case using the ground truth.",
        f"{total:.0f} s in total.",
    ):
        console.print(f"- {note}")
    return console.export_text()


def _verdict(mutual: float, alone: float) -> str:
    """One sentence on which training did better.

    >>> _verdict(0.75, 0.7), _verdict(0.7, 0.75)
    ('mutual is 5.0 Dice points above labelled-only.', 'mutual is 5.0 Dice points below labelled-only.')
    """
    difference = 100 * (mutual - alone)
    if math.isclose(difference, 0, abs_tol=0.05):
        return "mutual and labelled-only are level."
    return f"mutual is {abs(difference):.1f} Dice points {'above' if difference > 0 else 'below'} labelled-only."


def _draw(path: Path, reports: dict[str, Report], cases: Sequence[Case]) -> None:
    """Both methods side by side on the first test cases, axial and coronal."""
    scores: dict[tuple[str, str], Scores] = {}
    for method, report in reports.items():
        scores |= {(method, row.case): row.scores for row in report.rows if row.method == DECODER_1}
    any_report = reports[MUTUAL]
    rows: list[tuple[str, Sequence[Panel]]] = []
    for case in cases[:_SHOWN_CASES]:
        name = case.name
        assert case.label is not None
        panels = []
        for axis in (2, 1):
            position = largest_slice(case.label, axis)
            for method, report in reports.items():
                outlines = truth_and_prediction(case.label, report.predictions[name])
                panels.append(Panel(case.image, outlines, axis, position, f"{method}, {'xyz'[axis]} = {position}"))
        dice = "\n".join(f"{method:13} {shown(scores[method, name].dice, 'dice'):>5}" for method in reports)
        rows.append((f"{name}\n\nDice %\n{dice}", panels))
    title = f"rplib demo: the first {len(rows)} of {len(any_report.predictions)} test cases, decoder 1"
    write_sheet(path, rows, title, {"truth": TRUTH, "prediction": PREDICTION})
