"""The demo behind `rplib demo`: generated data, two trainings with one budget, one table, one picture."""

import contextlib
import csv
import io
import math
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from rplib.errors import UserError
from rplib.reference.config import Config, load_recipe
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.phantom import MOST_THRESHOLD_DICE, best_threshold_dice
from rplib.reference.datasets.phantom_variety import SIZE, write_varieties
from rplib.reference.devices import find_device
from rplib.reference.evaluation.metrics import Scores
from rplib.reference.evaluation.scoring import BOX, Report, evaluate
from rplib.reference.files import write_text_atomically
from rplib.reference.inference.windows import DECODER_1
from rplib.reference.reporting.pictures import PREDICTION, TRUTH, Panel, largest_slice, truth_and_prediction, write_sheet
from rplib.reference.reporting.tables import shown
from rplib.reference.training.trainer import train

TRAINING_CASES, TEST_CASES, LABELLED = 40, 12, 2
TEN_SEEDS = Path(__file__).resolve().parent / "results" / "demo.csv"  # written by `rplib demo --seeds 1 ... 10 --csv FILE`
COLUMNS = ("seed", "labelled_only_dice", "mutual_dice")
# Of both trainings.
SETTINGS = (
    f"labelled={LABELLED}",
    "filters=4",
    f"patch={SIZE[0]},{SIZE[1]},1",
    f"stride={SIZE[0]},{SIZE[1]},1",
    "learning_rate=0.05",
    "schedule=polynomial",
    "average=0.9",
    "supervised=dice+cross_entropy",
    "dropout=0",
    "amp=off",
    "channels_last=true",
    "checkpoint_every=1000000",  # a one-minute run needs no resumption
    "window_batch=10",
)
CONSISTENCY = 0.5
LABELLED_ONLY, MUTUAL, THRESHOLD = "labelled-only", "mutual", "best threshold"
MARK = ".rplib-demo"  # marks a folder that a demo may overwrite
PICTURE, TABLE = "demo.png", "demo.txt"
_SHOWN_CASES = 3


class Demonstration(NamedTuple):
    """Results: evaluations by name, mean Dice of the best thresholds on the test cases, and the text."""

    reports: dict[str, Report]
    threshold_dice: float
    table: str


def demonstrate(
    out: Path, seed: int, iterations: int, device: str | None = None, workers: ProcessPoolExecutor | None = None
) -> Demonstration:
    """Generates phantoms, trains labelled-only and mutual, evaluates both, writes `out`/demo.txt and `out`/demo.png.

    Args:
        workers: processes to train in; None starts two.

    Raises:
        UserError: the folder contains other files, or a number is invalid.
    """
    began = time.monotonic()
    if seed < 0 or iterations < 1:
        raise UserError(f"--seed {seed} --iterations {iterations}: expected a seed of at least 0 and at least 1 iteration.")
    where = find_device(device)
    configs = demo_configs(seed, iterations)
    _clear(out)

    phantoms = write_varieties(out / "data", TRAINING_CASES, TEST_CASES, SIZE, seed)
    assert phantoms.threshold_dice < MOST_THRESHOLD_DICE
    print(f"training {LABELLED_ONLY} and {MUTUAL} side by side ({iterations} iterations each)", file=sys.stderr)
    with contextlib.nullcontext(workers) if workers else _workers() as pool:
        seconds = _train_both(pool, configs, out, str(where))
    reports = {name: evaluate(out / name, out / "data", device=str(where)) for name in configs}

    dataset = reports[MUTUAL].dataset
    cases = [dataset.load(name, needs_label=True) for name in phantoms.test]
    threshold = statistics.fmean(best_threshold_dice(case.image, case.label) for case in cases if case.label is not None)
    _draw(out / PICTURE, reports, cases)
    table = _table(reports, threshold, seconds, configs, time.monotonic() - began)
    table += f"written: {out / PICTURE}, {out / TABLE}\n"
    write_text_atomically(out / TABLE, table)
    return Demonstration(reports, threshold, table)


def measure(out: Path, seeds: Sequence[int], iterations: int, device: str | None, target: Path) -> str:
    """The demo once per seed, with data and trainings of that seed; the two mean Dice scores of each go into a CSV file.

    Returns:
        One line with mean, range and a paired t-test of the differences.

    Raises:
        UserError: as `demonstrate`, or seeds given twice.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected different seeds.")
    rows = []
    with _workers() as pool:
        for seed in seeds:
            reports = demonstrate(out, seed, iterations, device, pool).reports
            alone, mutual = (reports[name].mean(DECODER_1, "dice").mean for name in (LABELLED_ONLY, MUTUAL))
            rows.append((seed, f"{100 * alone:.2f}", f"{100 * mutual:.2f}"))
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
            write_text_atomically(target, text.getvalue())  # after every seed: an interrupted measurement keeps what it has
            print(f"seed {seed}: {_verdict(mutual, alone)}", file=sys.stderr)
    return f"{_summary(target)} Written: {target}\n"


def _summary(path: Path) -> str:
    """Mean, range and a paired t-test of the differences in a file of `measure`."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    alone, mutual = ([float(row[column]) for row in rows] for column in COLUMNS[1:])
    gaps = [m - a for m, a in zip(mutual, alone, strict=True)]
    test = ""
    if len(set(gaps)) > 1:
        test = f"; paired t-test p = {stats.ttest_1samp(gaps, 0.0).pvalue:.2g}"
    return (
        f"{len(rows)} seeds: {LABELLED_ONLY} {statistics.fmean(alone):.1f}, {MUTUAL} {statistics.fmean(mutual):.1f} Dice %; "
        f"difference {statistics.fmean(gaps):+.1f} on average, from {min(gaps):+.1f} to {max(gaps):+.1f}, "
        f"above in {sum(gap > 0 for gap in gaps)} of {len(rows)}{test}."
    )


def _workers() -> ProcessPoolExecutor:
    """One process for each training."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def _train_both(pool: ProcessPoolExecutor, configs: dict[str, Config], out: Path, device: str) -> dict[str, float]:
    """Train side by side, in one process with one thread each; seconds by name."""
    running = {name: pool.submit(_train, config, out, device) for name, config in configs.items()}
    try:
        return {name: future.result() for name, future in running.items()}
    except BrokenProcessPool as error:
        raise UserError(f"a training of the demo in {out} was killed; is there enough memory?") from error


def _train(config: Config, out: Path, device: str) -> float:
    """One training, in a process of its own. More threads would gain little on tensors this small."""
    torch.set_num_threads(1)
    start = time.monotonic()
    # The trainer's closing lines, warnings and bar are meant for a single training; metrics.csv holds what they tell.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config, out / "data", out / config.name, device=device)
    return time.monotonic() - start


def demo_configs(seed: int, iterations: int) -> dict[str, Config]:
    """Settings of the two trainings; they differ in the unlabelled half of the batch and the weight of the mutual loss."""
    # Labels alone for a fifth of the training, then a ramp-up over two fifths.
    pace = [f"warmup={iterations // 5}", f"ramp_every={max(1, iterations // 100)}"]
    overrides = [*SETTINGS, *pace, f"seed={seed}", f"iterations={iterations}", "labelled_per_batch=4"]
    alone = load_recipe("la-8-supervised", [*overrides, f"name={LABELLED_ONLY}", "batch_size=4"])
    mutual = load_recipe("la-8", [*overrides, f"name={MUTUAL}", "batch_size=12", f"consistency={CONSISTENCY}"])
    return {LABELLED_ONLY: alone, MUTUAL: mutual}


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
        "Contrast, texture, noise and sharpness differ from case to case, more than the labelled cases show.",
        f"Same network, seed, labelled crops and {configs[MUTUAL].iterations} iterations; decoder 1, averaged weights.",
        "Fixed box: fitted to the labelled training cases. Best threshold: chosen per case using the ground truth.",
        f"{total:.0f} s in total.",
    ):
        console.print(f"- {note}")
    if TEN_SEEDS.is_file():
        console.print(f"Measured before, not in this run (reference/results/demo.csv): {_summary(TEN_SEEDS)}", soft_wrap=True)
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
    """Both methods side by side on the first test cases, in two slices each."""
    scores: dict[tuple[str, str], Scores] = {}
    for method, report in reports.items():
        scores |= {(method, row.case): row.scores for row in report.rows if row.method == DECODER_1}
    any_report = reports[MUTUAL]
    rows: list[tuple[str, Sequence[Panel]]] = []
    for case in cases[:_SHOWN_CASES]:
        name = case.name
        assert case.label is not None
        panels = []
        largest = largest_slice(case.label, 2)
        for position in (largest, largest + 1 if largest + 1 < case.label.shape[2] else largest - 1):
            for method, report in reports.items():
                outlines = truth_and_prediction(case.label, report.predictions[name])
                panels.append(Panel(case.image, outlines, 2, position, f"{method}, z = {position}"))
        dice = "\n".join(f"{method:13} {shown(scores[method, name].dice, 'dice'):>5}" for method in reports)
        rows.append((f"{name}\n\nDice %\n{dice}", panels))
    title = f"rplib demo: the first {len(rows)} of {len(any_report.predictions)} test cases, decoder 1"
    write_sheet(path, rows, title, {"truth": TRUTH, "prediction": PREDICTION})
