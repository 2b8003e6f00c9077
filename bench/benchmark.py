"""Time, memory and bytes of every implementation of the loss on this machine, in one table per input.

An implementation is timed only if its loss and gradient agree with the formula in float64; otherwise it is reported as WRONG.
All figures are for a forward and a backward pass, with features that require grad, as in training. Columns:

  ms, quartiles   median and spread of the runs, interleaved with the other implementations
  x naive         speedup over the naive form in the same rounds
  graph ms        the same kernels replayed as a CUDA graph, without launch overhead
  launches        kernels on a GPU (on a CPU: those that the interpreter ran for the Triton form, operations of eager forms, fused
                  groups of operations of compiled forms)
  MB fwd, bwd     peak memory beyond the inputs during each pass; x less: ratio to the naive form
  B/voxel         bytes moved: loads and stores of the Triton form (sectors: in whole 32-byte sectors), counted on a smaller
                  volume in Triton's interpreter; operands and results of eager forms' operations; ~ for compiled forms, the
                  compiler's own estimate
  x floor         B/voxel over the fewest bytes that the method must move
  of copy         bandwidth needed to move the floor's bytes in this time, relative to a device copy in the same rounds

Rows are saved to --csv after every step, so an interrupted run keeps its results.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

from rplib.bench import rows as r
from rplib.bench.implementations import IMPLEMENTATIONS
from rplib.bench.measure import fill_in, measure
from rplib.bench.metered import Metered, metered, reduced
from rplib.bench.rows import Measurement
from rplib.bench.shapes import DTYPES, LAYOUTS, SHAPES, TEACHERS, Case
from rplib.errors import UserError

# option -> known values, defaults
_CHOICES: dict[str, tuple[Collection[str], Collection[str]]] = {
    "shapes": (SHAPES, SHAPES),
    "dtypes": (DTYPES, DTYPES),
    "formats": (LAYOUTS, LAYOUTS),
    "teachers": (TEACHERS, ["cubes"]),
    "implementations": (IMPLEMENTATIONS, IMPLEMENTATIONS),
}
_QUICK: dict[str, Collection[str]] = {"shapes": ["small", "odd"], "dtypes": ["float32"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    for name, (known, default) in _CHOICES.items():
        usual = "all" if len(default) == len(known) else ",".join(default)
        parser.add_argument(f"--{name}", metavar="A,B", help=f"one or more of {', '.join(known)} (default {usual})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 .. (default: a GPU if available)")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of timing (default 5 on a CPU, 30 on a GPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads on a CPU")
    parser.add_argument("--quick", action="store_true", help="only the shapes small and odd, in float32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures, with versions, device and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot time, memory and bytes over the shapes (png, pdf, svg)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 1 if an implementation was wrong or failed, else 0."""
    chosen = {}
    for name, (known, default) in _CHOICES.items():
        text = getattr(args, name)
        usual = _QUICK.get(name, default) if args.quick else default
        chosen[name] = list(usual) if text is None else _words(name, text, known)
    device = _device(args.device)
    repeats = args.repeats if args.repeats is not None else 30 if device.type == "cuda" else 5
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}; expected a number of rounds, at least 1.")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads is {args.threads}; expected at least 1.")
        torch.set_num_threads(args.threads)
    for option, path in (("--csv", args.csv), ("--plot", args.plot)):
        if path and not path.parent.is_dir():
            raise UserError(f"{option}: there is no folder {path.parent}; create it first.")
    if args.plot:
        from rplib.bench.plot import check_format, draw  # fail now, not after an hour, if matplotlib is missing

        check_format(args.plot)
    # Finish one shape in every dtype and layout before the next.
    cases = [
        Case(SHAPES[shape], dtype, layout, teachers)
        for shape, layout, dtype, teachers in product(chosen["shapes"], chosen["formats"], chosen["dtypes"], chosen["teachers"])
    ]
    rows = _Session(cases, chosen["implementations"], device, repeats, args.csv).run()
    _print_summary(rows, device)
    if args.plot:
        draw(rows, args.plot)
    return 1 if any(row.status in (r.WRONG, r.FAILED) for row in rows) else 0


class _Session:
    def __init__(
        self, cases: Sequence[Case], implementations: Sequence[str], device: torch.device, repeats: int, csv: Path | None
    ) -> None:
        self.cases = cases
        self.implementations = [IMPLEMENTATIONS[name] for name in implementations]
        self.device = device
        self.repeats = repeats
        self.csv = csv
        self.about = r.environment(device)
        self.done: dict[Case, list[Measurement]] = {}
        self.begin = time.monotonic()
        # With a GPU, the interpreter can run at the same time; on a CPU it would use the cores that are being timed.
        self.beside = device.type == "cuda"
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2) if self.beside else 1)
        self.counted: dict[Case, Future[Metered]] = {}

    def run(self) -> list[Measurement]:
        print(", ".join(f"{name} {value}" for name, value in self.about.items() if value))
        try:
            if self.beside and any(i.form == "triton" for i in self.implementations):
                for case in self.cases:
                    self._counting(case)
            for number, case in enumerate(self.cases, 1):
                self._measure(number, case)
            self._wait_for_counts()
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)
        return [row for rows in self.done.values() for row in rows]

    def _measure(self, number: int, case: Case) -> None:
        def say(text: str) -> None:
            passed = time.monotonic() - self.begin
            print(f"[{number}/{len(self.cases)} {passed:4.0f} s] {case}: {text}", file=sys.stderr, flush=True)

        def meter() -> Metered | None:
            counting = self._counting(case)
            return None if self.beside and not counting.done() else counting.result()

        def save(rows: list[Measurement]) -> None:
            self.done[case] = rows
            self._save()

        _print_table(measure(case, self.implementations, self.device, self.repeats, meter, say, save))

    def _counting(self, case: Case) -> "Future[Metered]":
        smaller = reduced(case)
        if smaller not in self.counted:
            self.counted[smaller] = self.pool.submit(metered, smaller)
        return self.counted[smaller]

    def _wait_for_counts(self) -> None:
        """Print bytes that were counted after their table was printed."""
        for case, rows in self.done.items():
            late = [row for row in rows if IMPLEMENTATIONS[row.implementation].form == "triton" and not row.bytes_from]
            for row in late:
                fill_in(row, self._counting(case).result)
                self._save()
            if late:
                _print_table(rows)

    def _save(self) -> None:
        if self.csv:
            r.write_csv(self.csv, [row for rows in self.done.values() for row in rows], self.about)


def _print_table(rows: Sequence[Measurement]) -> None:
    print(f"\n{r.heading(next((row for row in rows if row.copy_bandwidth), rows[0]))}\n{r.table(rows)}", flush=True)


def _print_summary(rows: Sequence[Measurement], device: torch.device) -> None:
    reasons = Counter((row.implementation, row.status, row.detail) for row in rows if row.status in (r.LEFT_OUT, r.COUNTED))
    print()
    for (name, status, reason), inputs in reasons.items():
        what = "skipped:" if status == r.LEFT_OUT else "its bytes were counted, but it was"
        print(f"{name}: {what} {reason} ({inputs} inputs)")
    if device.type != "cuda":
        print("No GPU was used: these figures do not show the speed of the Triton form.")
    bad = [row for row in rows if row.status in (r.WRONG, r.FAILED)]
    for row in bad:
        print(f"{row.status}: {row.implementation} on {row.shape} {row.dtype} {row.layout}: {row.detail}")
    measured = sum(row.status == r.MEASURED for row in rows)
    print(f"{measured} of {len(rows)} measured, each after its result was verified; {len(bad)} wrong or failed.")


def _words(option: str, text: str, known: Collection[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"--{option}: unknown {name!r}; expected one or more of {', '.join(known)}.")
    return names


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: unknown device {name!r}; expected for example cpu or cuda:0.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} is not available ({torch.cuda.device_count()} GPUs); expected for example cpu.")
    return device
