"""Time each kernel with other block sizes on this GPU, to tune the rules in rplib.kernels.tiling.

    python -m rplib.bench.sweep [--dtypes float32,bfloat16] [--formats contiguous,channels_last] [--csv FILE]

At the paper's shape, interleaved with a device copy; every candidate's loss and gradient are first compared with those of the
current tiles. Nothing is changed: the table shows the possible gain.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch

import rplib
from rplib.bench.command import main
from rplib.bench.gpu_checks import gradients, networks
from rplib.bench.shapes import DTYPES, LAYOUTS
from rplib.bench.timer import DeviceCopy, copy_size, interleaved
from rplib.errors import UserError

SHAPE = (4, 2, 16, (112, 112, 80))  # batch, classes, features, sizes: the paper's
_ROUNDS = 15


@contextmanager
def tiles(function: str, chosen: Any) -> Iterator[None]:
    """Make ``rplib.kernels.tiling.<function>`` return ``chosen``."""
    from rplib.kernels import tiling

    before = getattr(tiling, function)
    setattr(tiling, function, lambda *_, **__: chosen)
    try:
        yield
    finally:
        setattr(tiling, function, before)


def candidates(itemsize: int, channels_last: bool) -> Iterator[tuple[str, Any]]:
    """(function name in tiling.py, value to return), for two classes."""
    from rplib.kernels.tiling import SECTOR, GradientTiles, StatisticsTiles, WeightingTiles

    for rows, warps in ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4), (256, 8)):
        for vector in (1,) if channels_last else (4, 8):
            yield "statistics_tiles", StatisticsTiles(rows * vector, 2, 16, 16, False, warps, vector)
    group = SECTOR // itemsize
    blocks = (32, 64, 128, 256) if channels_last else (128, 256, 512, 1024)
    for block, feature_block, warps in product(blocks, (8, 16), (2, 4, 8)):
        yield "weighting_tiles", WeightingTiles(block // group, group, 2, feature_block, True, warps)
    for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8)):
        yield "gradient_tiles", GradientTiles(block // group, group, 2, warps)


def sweep(dtype: torch.dtype, channels_last: bool, device: torch.device, rounds: int = _ROUNDS) -> Iterator[dict[str, Any]]:
    """One row per candidate: its tiles, median milliseconds, and the current tiles' in the same rounds."""
    batch, classes, channels, spatial = SHAPE
    logits, features = networks(batch, classes, channels, spatial, dtype, device)
    if channels_last:
        fmt = torch.channels_last_3d
        logits = [z.detach().contiguous(memory_format=fmt).requires_grad_() for z in logits]
        features = [f.contiguous(memory_format=fmt) for f in features]
    loss_fn = rplib.ReliableMutualLoss(impl="triton")

    def call() -> list[torch.Tensor]:
        return gradients(loss_fn, logits, features)

    truth = call()
    copy = DeviceCopy(device, copy_size(device))
    for function, chosen in candidates(dtype.itemsize, channels_last):
        row = {"dtype": str(dtype), "channels_last": channels_last, "function": function, "tiles": " ".join(map(str, chosen))}

        def changed(function: str = function, chosen: Any = chosen) -> list[torch.Tensor]:
            with tiles(function, chosen):
                return call()

        try:
            right = all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-7) for a, b in zip(changed(), truth, strict=True))
        except Exception as error:  # from the compiler, for example out of shared memory
            yield row | {"result": f"failed: {type(error).__name__}"}
            continue
        if not right:
            yield row | {"result": "WRONG"}
            continue
        calls: dict[str, Callable[[], object]] = {"changed": changed, "present": call, "copy": copy}
        timings = interleaved(calls, device, rounds)
        milliseconds = {name: 1e3 * t.median for name, t in timings.items()}
        yield row | {
            "result": f"{milliseconds['changed']:.4f}",
            "present": f"{milliseconds['present']:.4f}",
            "copy_gb_s": f"{copy.bandwidth(timings['copy']) / 1e9:.0f}",
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default %(default)s")
    parser.add_argument("--formats", default="contiguous,channels_last", help="default %(default)s")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append every row to FILE")


def run(args: argparse.Namespace) -> int:
    """Time all candidates; prints each row when it is finished."""
    for option, names, known in (("dtypes", args.dtypes, DTYPES), ("formats", args.formats, LAYOUTS)):
        unknown = [name for name in names.split(",") if name not in known]
        if unknown:
            raise UserError(f"--{option}: unknown {unknown[0]!r}; expected one or more of {', '.join(known)}.")
    if args.csv and not args.csv.parent.is_dir():
        raise UserError(f"--csv: there is no folder {args.csv.parent}; create it first.")
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU, which is needed to time block sizes.")
    columns = ["dtype", "channels_last", "function", "tiles", "result", "present", "copy_gb_s"]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.DictWriter(file, columns).writeheader()
    for dtype, layout in product(args.dtypes.split(","), args.formats.split(",")):
        for row in sweep(DTYPES[dtype], layout == "channels_last", torch.device("cuda")):
            print("  ".join(str(row.get(name, "")) for name in columns), flush=True)
            if args.csv:
                with args.csv.open("a", newline="") as file:
                    csv.DictWriter(file, columns).writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main("sweep", __doc__, add_arguments, run))
