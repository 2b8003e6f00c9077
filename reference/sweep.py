"""Train and compare many settings: recipes x settings x seeds, from one file.

The file names the data set, the seeds, and one table per cell:

  data = "LA"                      # paths are relative to the file
  out = "sweep"                    # run folders, logs, sweep.csv, sweep.html
  seeds = [1337, 1338, 1339]
  jobs = 2                         # trainings at a time, one thread each
  baseline = "labelled only"
  set = { filters = 8, patch = [64, 64, 48] }    # for all cells

  [cells."labelled only"]
  recipe = "la-8-supervised"

  [cells.paper]
  recipe = "la-8"
  set = { method = "both" }

The same command resumes and trains only missing runs; with adopt = ["runs/*"], runs with the same settings elsewhere are reused.

examples:
  rplib sweep FILE.toml
  rplib sweep FILE.toml --report        no training: table and page from the runs scored so far
"""

import argparse
from pathlib import Path

TABLE, PAGE = "sweep.csv", "sweep.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib sweep`."""
    from rplib.reference.arguments import positive

    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the sweep: data, seeds and cells")
    parser.add_argument("--jobs", type=positive, metavar="N", help="trainings at a time (default: as in the file, else 1)")
    parser.add_argument("--report", action="store_true", help="report the runs scored so far; do not train")


def run(args: argparse.Namespace) -> int:
    """Runs the sweep and returns the exit code; user errors raise `rplib.errors.UserError`."""
    from dataclasses import replace

    from rplib.errors import UserError
    from rplib.reference.files import write_text_atomically
    from rplib.reference.sweeping.page import page
    from rplib.reference.sweeping.plan import read_plan
    from rplib.reference.sweeping.results import read_results, results_csv
    from rplib.reference.sweeping.runner import run_plan

    plan = read_plan(args.file)
    if args.jobs:
        plan = replace(plan, jobs=args.jobs)
    mistake = None
    if not args.report:
        try:
            run_plan(plan)
        except UserError as error:  # still show the results of the other runs
            if not any(one.scores(plan.split).is_file() for one in plan.runs):
                raise
            mistake = error
    results = read_results(plan)
    if not results:
        raise UserError(f"no run of {args.file} is scored yet; omit --report.")
    plan.out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(plan.out / TABLE, results_csv(results))
    write_text_atomically(plan.out / PAGE, page(plan, results))
    print(_table(plan, results), end="")
    print(f"written: {plan.out / TABLE}, {plan.out / PAGE}")
    if mistake is not None:
        raise mistake
    return 0


def _table(plan: "object", results: "object") -> str:
    import io

    from rich.console import Console
    from rich.table import Table

    from rplib.reference.sweeping.page import HEADINGS, comparison_rows
    from rplib.reference.sweeping.results import compare_cells

    table = Table(title=f"{plan.split} cases; the baseline is {plan.baseline}", title_justify="left")  # type: ignore[attr-defined]
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for row in comparison_rows(compare_cells(results, plan.cells, plan.baseline)):  # type: ignore[arg-type, attr-defined]
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=140, record=True, color_system=None, highlight=False)
    console.print(table)
    return console.export_text()
