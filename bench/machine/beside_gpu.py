"""On a CUDA GPU: the measured time of every kernel of the loss next to the predicted one.

    python -m rplib.bench.machine.beside_gpu [--csv FILE]

Forward and backward at the paper's shape and at 14 classes, each dtype and layout of the committed table
(bench/results/machine.csv). A kernel that takes much longer than predicted shows where the model is wrong: README.md lists what
it ignores.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median

import torch

from rplib.bench.command import main
from rplib.bench.machine.prediction import GPU, gpu_named, predicted, times
from rplib.bench.machine.report import Row, read_csv
from rplib.bench.shapes import DTYPES, LAYOUTS, SHAPES, Case, make_inputs
from rplib.errors import UserError

_SHAPES = ("left-atrium", "organs-14")
_REPEATS = 20
HEADS = ["shape", "dtype", "layout", "kernel", "measured_us", "predicted_us", "measured_over_predicted", "bound_by"]


def beside(case: Case, measured: Mapping[str, float], rows: Sequence[Row], gpu: GPU) -> list[list[str]]:
    """Times by kernel and rows of the table for the same case -> cells for `HEADS`, one line per kernel and one for all."""
    lines, voxels = [], case.shape.voxels
    known = {row.kernel: row for row in rows if row.case == (case.shape.classes, case.shape.features, case.dtype, case.layout)}
    together = [0.0, 0.0]
    for kernel, seconds in measured.items():
        line = [case.shape.name, case.dtype, case.layout, kernel, f"{1e6 * seconds:.1f}"]
        if kernel in known:
            needs = known[kernel].needs
            expected = voxels * predicted(needs, gpu)
            busy = times(needs, gpu)
            line += [f"{1e6 * expected:.1f}", f"{seconds / expected:.2f}", max(busy, key=lambda part: busy[part])]
            together[0] += seconds
            together[1] += expected
        else:
            line += ["-", "-", "not in the table"]
        lines.append(line)
    if together[1]:
        ratio = f"{together[0] / together[1]:.2f}"
        all_kernels = ["all", f"{1e6 * together[0]:.1f}", f"{1e6 * together[1]:.1f}", ratio, ""]
        lines.append([case.shape.name, case.dtype, case.layout, *all_kernels])
    return lines


def kernel_seconds(case: Case, device: torch.device) -> dict[str, float]:
    """Median time of every Triton kernel of one forward and backward pass, in the order of the launches."""
    import rplib
    from rplib.kernels import launch

    logits, features = make_inputs(case, device)
    loss_fn = rplib.ReliableMutualLoss(impl="triton")
    names: list[str] = []

    def see(asked: launch.Launch) -> bool:
        names.append(asked.kernel.fn.__name__)
        return True

    with launch.observed(see):
        loss_fn(logits, features).backward()  # compiles
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_REPEATS):
            loss_fn(logits, features).backward()
        torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {name: [] for name in names}
    for event in profile.events() or []:
        if event.name in found:
            found[event.name].append(1e-6 * event.device_time)
    return {name: median(seconds) for name, seconds in found.items() if seconds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures to FILE")


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU here; for predictions only, run python -m rplib.bench.machine.")
    name = torch.cuda.get_device_name()
    gpu = gpu_named(name)
    if gpu is None:
        raise UserError(
            f"no prediction for {name!r}; add its multiprocessors, clock and bandwidth to bench/machine/prediction.py."
        )
    rows = [row for row in read_csv() if row.target == "sm_90"]
    lines = [HEADS]
    for shape, dtype, layout in product(_SHAPES, DTYPES, LAYOUTS):
        case = Case(SHAPES[shape], dtype, layout)
        lines += beside(case, kernel_seconds(case, torch.device("cuda")), rows, gpu)
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADS))]
    print(f"{name}, predicted as {gpu.name} from counts for sm_90")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main("machine.beside_gpu", str(__doc__), add_arguments, run))
