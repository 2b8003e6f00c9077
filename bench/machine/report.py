"""Counts per voxel of the compiled kernels of the loss, and the predicted time.

    python -m rplib.bench.machine [--csv FILE] [--shapes 2x16,4x16] [--dtypes bfloat16] [--layouts contiguous] [--target sm_90]

Forward and backward of the mutual loss on one sample of 32 x 32 x 16 voxels; the teacher alternates in cubes of 16^3 voxels:
4 programs of 4,096 voxels each, about as many as a program has at the paper's shape on 132 multiprocessors.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import groupby, product
from math import prod
from pathlib import Path
from typing import Any

import torch

from rplib.bench.machine.driver import ARCHITECTURES, Ran
from rplib.bench.machine.library import compiled_library
from rplib.bench.machine.prediction import GPU, GPUS, Needs, predicted, times
from rplib.bench.machine.sass import executed, machine_code
from rplib.bench.shapes import Case, Shape, make_inputs
from rplib.errors import UserError

SHAPES = ((2, 16), (4, 16), (14, 32))  # (C, F)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")
SPATIAL = (32, 32, 16)
VOXELS = prod(SPATIAL)
TABLE = Path(__file__).resolve().parent.parent / "results" / "machine.csv"
_SHOWN = ("H100", "H200")


@dataclass(frozen=True)
class Row:
    """One kernel; all figures per voxel.

    warps: of a block. ptx, sass: instructions by warps. barriers: of blocks, per 1,000 voxels. shared_passes: through the banks
    of shared memory. sector_bytes: 32 for every sector that a warp's access touches. bytes: 32 for every different sector that
    the launch loads or stores, so what the memory must move at least. voxels: of the launch.
    """

    target: str
    classes: int
    features: int
    dtype: str
    layout: str
    kernel: str
    warps: int
    ptx: float
    sass: float
    barriers: float
    shared_passes: float
    sector_bytes: float
    bytes: float
    voxels: int

    @property
    def case(self) -> tuple[int, int, str, str]:
        return self.classes, self.features, self.dtype, self.layout

    @property
    def needs(self) -> Needs:
        return Needs(self.sass, self.shared_passes, self.bytes)


def launches_of(classes: int, features: int, dtype: str, layout: str, architecture: int = 90) -> list[Ran]:
    """Run forward and backward on the machine.

    Raises:
        UserError: the run violated a rule of memory or barriers, so its counts have no meaning.
    """
    import rplib

    shape = Shape("machine", 1, classes, features, SPATIAL)
    logits, read = make_inputs(Case(shape, dtype, layout), torch.device("cpu"))
    with compiled_library(architecture) as session:
        rplib.functional.reliable_mutual_loss(logits, read, impl="triton").backward()
    if session.findings:
        raise UserError(f"{len(session.findings)} findings, the first: {session.findings[0]}")
    return session.launches


def measure(classes: int, features: int, dtype: str, layout: str, architecture: int = 90) -> list[Row]:
    """One row per kernel of `launches_of`, in the order of the launches."""
    rows = []
    for launch in launches_of(classes, features, dtype, layout, architecture):
        counts, voxels = launch.counts, VOXELS
        sass = sum(executed(machine_code(launch.ptx, launch.cubin, architecture), launch).values())
        rows.append(
            Row(
                f"sm_{architecture}", classes, features, dtype, layout, launch.name, launch.warps,
                ptx=round(sum(launch.instructions.values()) / voxels, 4),
                sass=round(sass / voxels, 4),
                barriers=round(1000 * counts.barriers / voxels, 2),
                shared_passes=round(counts.shared_passes / voxels, 4),
                sector_bytes=round(32 * counts.sectors / voxels, 3),
                bytes=round(launch.different_bytes / voxels, 3),
                voxels=voxels,
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """Fixed-width text: the kernels of every case, then their sum."""
    heads = ["kernel", "PTX", "SASS", "barriers", "passes", "sectors B", "bytes"]
    heads += [f"{name} ps" for name in _SHOWN] + ["bound by"]
    lines = []
    for (classes, features, dtype, layout), members in groupby(rows, key=lambda row: row.case):
        case = list(members)
        cells = [heads, *(_cells(row) for row in case), _total(case)]
        widths = [max(len(line[k]) for line in cells) for k in range(len(heads))]
        lines.append(f"C = {classes}, F = {features}, {dtype}, {layout}, {case[0].target}; per voxel, barriers per 1,000")
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        ratios = ", ".join(f"{name} {_ratio(case, GPUS[name]):.2f}" for name in _SHOWN)
        lines += [f"predicted time over that of the memory alone: {ratios}", ""]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    busy = times(row.needs, GPUS["H200"])
    cells = [row.kernel.removesuffix("_kernel"), f"{row.ptx:.2f}", f"{row.sass:.2f}", f"{row.barriers:.1f}"]
    cells += [f"{row.shared_passes:.2f}", f"{row.sector_bytes:.1f}", f"{row.bytes:.1f}"]
    return [*cells, *(f"{1e12 * predicted(row.needs, GPUS[name]):.1f}" for name in _SHOWN), max(busy, key=lambda k: busy[k])]


def _total(case: Sequence[Row]) -> list[str]:
    sums = [
        sum(getattr(row, name) for row in case) for name in ("ptx", "sass", "barriers", "shared_passes", "sector_bytes", "bytes")
    ]
    cells = [f"{value:.{digits}f}" for value, digits in zip(sums, (2, 2, 1, 2, 1, 1), strict=True)]
    return ["all", *cells, *(f"{1e12 * sum(predicted(row.needs, GPUS[n]) for row in case):.1f}" for n in _SHOWN), ""]


def _ratio(case: Iterable[Row], gpu: GPU) -> float:
    """Sum over kernels of the busiest part, over the time that the bytes alone take."""
    case = list(case)
    return sum(predicted(row.needs, gpu) for row in case) / sum(times(row.needs, gpu)["memory"] for row in case)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write one line per row, with the version of the compiler that the figures apply to."""
    import triton

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Row)), "triton"])
        writer.writerows([*astuple(row), triton.__version__] for row in rows)


def read_csv(path: Path = TABLE) -> dict[Row, str]:
    """Rows -> version of the compiler, as `write_csv` wrote them."""
    types: dict[Any, Any] = {"str": str, "int": int, "float": float, str: str, int: int, float: float}
    found = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            found[Row(**{f.name: types[f.type](line[f.name]) for f in fields(Row)})] = line["triton"]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures to FILE")
    shapes = ",".join(f"{c}x{f}" for c, f in SHAPES)
    parser.add_argument("--shapes", default=shapes, metavar="CxF,...", help="classes x features (default %(default)s)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated (default %(default)s)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated (default %(default)s)")
    parser.add_argument("--target", default="sm_90", help="sm_80, sm_90 or sm_100 (default %(default)s)")


def shapes_of(text: str) -> list[tuple[int, ...]]:
    """2x16,4x16 -> [(2, 16), (4, 16)]."""
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in text.split(",")]
    except ValueError:
        shapes = []
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise UserError(f"--shapes is {text!r}; expected classes x features such as 2x16,4x16.")
    return shapes


def run(args: argparse.Namespace) -> int:
    architecture = {f"sm_{number}": number for number in ARCHITECTURES}.get(args.target)
    if architecture is None:
        raise UserError(f"unknown target {args.target!r}; expected one of sm_80, sm_90, sm_100.")
    shapes = shapes_of(args.shapes)
    for what, asked, known in (("dtypes", args.dtypes.split(","), DTYPES), ("layouts", args.layouts.split(","), LAYOUTS)):
        if wrong := [name for name in asked if name not in known]:
            raise UserError(f"--{what}: unknown {wrong[0]!r}; expected some of {', '.join(known)}.")
    if args.csv and not args.csv.parent.is_dir():
        raise UserError(f"--csv: there is no folder {args.csv.parent}; create it first.")
    rows: list[Row] = []
    for (classes, features), dtype, layout in product(shapes, args.dtypes.split(","), args.layouts.split(",")):
        rows += (found := measure(classes, features, dtype, layout, architecture))
        print(table(found), flush=True)
        if args.csv:
            write_csv(rows, args.csv)  # at once: what has run is kept if the rest is interrupted
    print(f"{len(rows)} kernels ran on the machine without a finding.", file=sys.stderr)
    return 0
