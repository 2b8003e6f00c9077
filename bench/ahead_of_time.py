"""Compile every kernel of the loss for four architectures, without a GPU, and report the resources that it uses.

    python -m rplib.bench.ahead_of_time [--csv FILE] [--targets sm_90,gfx942] [--jobs 2]

Exit code 1 if a kernel spills registers. A full run takes half an hour on one core; Triton caches compiled
kernels, so an interrupted run resumes quickly.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rplib.bench.command import main
from rplib.bench.compiled_code import TARGETS, Resources, compile_for
from rplib.errors import UserError

SHAPES = ((2, 16), (4, 16), (14, 32))  # (C, F)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")
# Variants of the code: the loss, the whole objective with half the samples labelled, odd sizes on every axis; the objective with
# a mask and an ignore label, with cross-entropy in place of Dice, and with both supervised terms and the statistics per term.
VARIANTS: dict[str, dict[str, Any]] = {
    "loss": {"labelled": 0, "spatial": (112, 112, 80)},
    "objective": {"labelled": 2, "spatial": (112, 112, 80)},
    "odd": {"labelled": 0, "spatial": (111, 113, 79)},
    "masked": {"labelled": 2, "spatial": (112, 112, 80), "masked": True, "ignore_index": 255},
    "cross_entropy": {"labelled": 2, "spatial": (112, 112, 80), "supervised": "cross_entropy"},
    "reported": {"labelled": 2, "spatial": (112, 112, 80), "supervised": "dice+cross_entropy", "statistics": True},
}
FEWER = ("cross_entropy", "reported")  # variants for sm_90 alone, and of 14 classes in float32 alone: they take long to compile


@dataclass(frozen=True)
class Point:
    """One point of the matrix: C classes, F features, dtype and memory layout of logits and features, name of the target.

    The batch has 4 samples; the variant is one of VARIANTS.
    """

    classes: int
    features: int
    dtype: str
    layout: str
    target: str
    variant: str = "loss"


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel at one point of the matrix; fields as in `rplib.bench.compiled_code.Resources`."""

    target: str
    variant: str
    classes: int
    features: int
    dtype: str
    layout: str
    kernel: str
    warps: int
    registers: int
    spills: int
    scalar_spills: int
    stack_bytes: int
    shared_bytes: int
    loads: int
    wide_loads_percent: float | None
    load_widths: str
    store_widths: str


def matrix(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    dtypes: Iterable[str] = DTYPES,
    layouts: Iterable[str] = LAYOUTS,
    targets: Iterable[str] = tuple(TARGETS),
    variants: Iterable[str] = ("loss",),
) -> list[Point]:
    """Every combination; targets innermost, so that consecutive cases share target-independent work.

    >>> len(matrix()), len(matrix(variants=VARIANTS))
    (48, 212)
    """
    points = product(shapes, dtypes, layouts, variants, targets)
    return [
        Point(c, f, d, layout, t, variant)
        for (c, f), d, layout, variant, t in points
        if variant not in FEWER or (t == "sm_90" and (c <= 4 or d == "float32"))
    ]


def report(case: Point) -> list[CompiledKernel]:
    """Compile the kernels of one forward and backward pass.

    Raises:
        UserError: Triton's interpreter is enabled in this process.
    """
    import torch

    from rplib.kernels.signatures import iter_specs

    rows = []
    channels_last = case.layout == "channels_last"
    target = TARGETS[case.target]
    specs = iter_specs(
        case.classes, case.features, getattr(torch, case.dtype), channels_last,
        architecture=target.architecture, **VARIANTS[case.variant],
    )  # fmt: skip
    for spec in specs:
        found = compile_for(target, spec.fn, spec.signature, spec.constexprs, spec.attrs, num_warps=spec.num_warps)
        rows.append(_row(case, spec.name, spec.num_warps, found))
    return rows


def report_all(cases: Sequence[Point], jobs: int = 1, progress: bool = False) -> list[CompiledKernel]:
    """`report` for every case, in order, over ``jobs`` processes; ``progress``: report progress on stderr."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        results = map(report, cases) if pool is None else pool.map(report, cases, chunksize=4)
        rows = []
        for done, found in enumerate(results, start=1):
            rows += found
            if progress and (done % 8 == 0 or done == len(cases)):
                print(f"[{done}/{len(cases)}] {found[0].target}, C={found[0].classes}", file=sys.stderr, flush=True)
        return rows


def _row(case: Point, kernel: str, warps: int, found: Resources) -> CompiledKernel:
    share = found.wide_load_share
    return CompiledKernel(
        target=case.target,
        variant=case.variant,
        classes=case.classes,
        features=case.features,
        dtype=case.dtype,
        layout=case.layout,
        kernel=kernel,
        warps=warps,
        registers=found.registers,
        spills=found.spills,
        scalar_spills=found.scalar_spills,
        stack_bytes=found.stack_bytes,
        shared_bytes=found.shared_bytes,
        loads=found.load_count,
        wide_loads_percent=None if share is None else round(100 * share, 1),
        load_widths=_widths(found.loads),
        store_widths=_widths(found.stores),
    )


def _widths(counts: Mapping[int, int]) -> str:
    """{128: 36, 32: 2} -> "36x128 2x32"."""
    return " ".join(f"{n}x{bits}" for bits, n in sorted(counts.items(), reverse=True))


def write_csv(rows: Iterable[CompiledKernel], path: Path) -> None:
    """Write one line per row, with a header and the versions that the figures apply to."""
    import torch
    import triton

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(CompiledKernel)), "triton", "torch"])
        writer.writerows([*astuple(row), triton.__version__, torch.__version__] for row in rows)


def table(rows: Sequence[CompiledKernel]) -> str:
    """Fixed-width text."""
    heads = ["target", "variant", "C", "F", "dtype", "layout", "kernel", "regs", "spills"]
    heads += ["shared", "loads", "128-bit %", "load widths"]
    cells = [
        [
            r.target,
            r.variant,
            str(r.classes),
            str(r.features),
            r.dtype,
            r.layout,
            r.kernel.removesuffix("_kernel"),
            str(r.registers),
            f"{r.spills} ({r.scalar_spills} scalar)" if r.scalar_spills else str(r.spills),
            str(r.shared_bytes),
            str(r.loads),
            "-" if r.wide_loads_percent is None else f"{r.wide_loads_percent:.0f}",
            r.load_widths,
        ]
        for r in rows
    ]
    widths = [max(len(line[k]) for line in [heads, *cells]) for k in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in [heads, *cells])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all figures to FILE")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    targets, variants = args.targets.split(","), args.variants.split(",")
    for what, asked, known in (("target", targets, TARGETS), ("variant", variants, VARIANTS)):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise UserError(f"unknown {what} {unknown[0]!r}; expected one or more of {', '.join(known)}.")
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; expected a number of processes, at least 1.")
    if args.csv and not args.csv.parent.is_dir():
        raise UserError(f"--csv: there is no folder {args.csv.parent}; create it first.")
    rows = report_all(matrix(targets=targets, variants=variants), args.jobs, progress=True)
    print(table(rows))
    spilling = [row for row in rows if row.spills]
    print(f"\n{len(rows)} kernels compiled for {', '.join(targets)}; {len(spilling)} spill registers.")
    if args.csv:
        write_csv(rows, args.csv)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main("ahead_of_time", __doc__, add_arguments, run))
