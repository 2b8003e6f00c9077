"""Time, memory and bytes of every implementation of the loss on this machine, in one table per input.

An implementation is timed only where its loss and gradient agree with the formula in float64; one that does not shows as WRONG.
Every figure is of a forward and a backward pass, with features that require grad, as in a training. Columns:

  ms, quartiles   median and spread of the runs, made by turns with the other implementations
  x naive         how many times faster than the naive form in the same turns
  graph ms        the same kernels replayed as a CUDA graph: without the time that the host needs to launch them
  launches        kernels on a GPU (on a CPU: of the Triton form those that the interpreter ran, of an eager form operations, of
                  compiled code its fused groups of operations)
  MB fwd, bwd     peak memory beyond the inputs during each pass; x less: than the naive form needs
  B/voxel         bytes moved: by the Triton form's loads and stores (sectors: in whole 32-byte sectors), counted on a smaller
                  volume in Triton's interpreter; by an eager form's operations, operands and results; of compiled code ~ the
                  compiler's own estimate
  x floor         B/voxel over the fewest bytes that the method can move
  of copy         bandwidth of a device copy in the same turns that the floor's bytes reach in this time

Rows are saved to --csv after every step, so that a run which is cut short keeps what it has.
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

# option -> what it knows, what it takes by default
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
        parser.add_argument(f"--{name}", metavar="A,B", help=f"some of {', '.join(known)} (default {usual})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 .. (default: a GPU if there is one)")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of timing (default 5 on a CPU, 30 on a GPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch on a CPU")
    parser.add_argument("--quick", action="store_true", help="shapes small and odd in float32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="keep every figure, with versions, device and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time, memory and bytes over the shapes (png, pdf, svg)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 where an implementation was wrong or failed, else 0."""
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
            raise UserError(f"{option}: there is no folder {path.parent}; make it first.")
    if args.plot:
        from rplib.bench.plot import check_format, draw  # now: a missing matplotlib must not show after an hour

        check_format(args.plot)
    # The paper's shape in every dtype and layout comes before the next shape.
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
        # Beside a GPU's work the interpreter disturbs nobody; on a CPU it would share the cores that are being timed.
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
        """Bytes that were not counted yet when their table was printed."""
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
        what = "left out:" if status == r.LEFT_OUT else "its bytes were counted, but it was"
        print(f"{name}: {what} {reason} ({inputs} inputs)")
    if device.type != "cuda":
        print("No GPU was used: nothing here says how fast the Triton form is.")
    bad = [row for row in rows if row.status in (r.WRONG, r.FAILED)]
    for row in bad:
        print(f"{row.status}: {row.implementation} on {row.shape} {row.dtype} {row.layout}: {row.detail}")
    measured = sum(row.status == r.MEASURED for row in rows)
    print(f"{measured} of {len(rows)} measured, each after its result was found right; {len(bad)} wrong or failed.")


def _words(option: str, text: str, known: Collection[str]) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in known:
            raise UserError(f"--{option}: unknown {word!r}; expected some of {', '.join(known)}.")
    return words


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: unknown device {name!r}; expected for example cpu or cuda:0.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: there is no {name} here ({torch.cuda.device_count()} GPUs); expected for example cpu.")
    return device
