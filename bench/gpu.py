"""All GPU checks and measurements in one resumable command.

    make gpu                                                    all parts that need no data set
    python -m rplib.bench.gpu --out DIR [--parts A,B] [--data LEFT_ATRIUM] [--minutes N] [--again]

Every part runs in its own process and writes DIR/<part>.log; DIR/parts.csv records its result, time, versions, GPU, commit and
date. Parts that succeeded are skipped unless --again is given; failed parts are rerun. --minutes sets a time limit: stopped
parts resume at the next start (trainings from their last checkpoint). Exit code 1 if a part failed.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rplib.bench.command import main
from rplib.bench.machine.prediction import gpu_named, predicted
from rplib.bench.machine.report import read_csv
from rplib.bench.shapes import SHAPES
from rplib.errors import UserError

_PYTHON = sys.executable
_RPLIB = [_PYTHON, "-m", "rplib"]
_COLUMNS = ["part", "result", "seconds", "date", "gpu", "torch", "triton", "commit", "command"]
_KERNELS = "regex:^(statistics|prototypes|weighting|loss|gradient)_kernel$"
_METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"

# name -> settings of a profiled training step
_PROFILES = {
    "naive": ("impl=naive",),
    "float32": ("impl=auto",),
    "tf32": ("tf32=true",),
    "bfloat16": ("amp=bfloat16",),
    "channels-last": ("amp=bfloat16", "channels_last=true"),
    "compile": ("amp=bfloat16", "channels_last=true", "compile=true"),
}
# name -> recipe and settings of a training of 15,000 iterations, most important first; `paper`: best.pt is selected as for the
# published numbers, last.pt holds the last iteration's weights
_FAST = ("protocol=paper", "amp=bfloat16", "channels_last=true")
_TRAININGS = {
    "la-8": ("la-8", _FAST),
    "la-8-supervised": ("la-8-supervised", _FAST),
    "la-8-probabilities": ("la-8", (*_FAST, "cross_entropy_on=probabilities")),
    "la-16": ("la-16", _FAST),
    "la-4": ("la-4", _FAST),
    "la-16-supervised": ("la-16-supervised", _FAST),
    "la-4-supervised": ("la-4-supervised", _FAST),
}


@dataclass(frozen=True)
class Part:
    """One process: its command, the program it needs on PATH, and whether it needs the data set."""

    name: str
    summary: str
    command: Sequence[str]
    needs: str | None = None
    data: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def parts(out: Path, data: Path | None) -> list[Part]:
    """All parts, most important first."""
    bench = [*_RPLIB, "bench", "--device", "cuda"]
    found = [
        Part("check", "implementations against float64", [*_RPLIB, "check"]),
        Part("tests", "the test suite with the kernels compiled, not interpreted", [_PYTHON, "-m", "pytest", "-q", "-n", "8"]),
        Part("identical", "200 runs, bitwise equal", [_PYTHON, "-m", "rplib.bench.gpu_checks", "identical"]),
        Part("large", "a tensor past 2^31 elements", [_PYTHON, "-m", "rplib.bench.gpu_checks", "large"]),
        Part("bench", "the benchmark table", [*bench, "--csv", str(out / "bench.csv"), "--plot", str(out / "bench.png")]),
        Part(
            "kernels",
            "the time of each kernel next to the predicted one",
            [_PYTHON, "-m", "rplib.bench.machine.beside_gpu", "--csv", str(out / "kernels.csv")],
        ),
        *(
            Part(
                tool,
                f"compute-sanitizer {tool} on every variant",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", _PYTHON, "-m", "rplib.bench.gpu_checks", "once"],
                needs="compute-sanitizer",
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in ("memcheck", "racecheck")
        ),
        Part(
            "ncu",
            "DRAM traffic per kernel",
            ["ncu", "--clock-control", "none", "--csv", "--metrics", _METRICS, "-k", _KERNELS,
             _PYTHON, "-m", "rplib.bench.gpu_checks", "paper"],
            needs="ncu",
        ),
        Part("sweep", "block sizes at the paper's shape", [_PYTHON, "-m", "rplib.bench.sweep", "--csv", str(out / "sweep.csv")]),
    ]  # fmt: skip
    train = [*_RPLIB, "train"]
    for name, settings in _PROFILES.items():
        command = [*train, "--recipe", "la-8", "--data", str(data), "--profile", "--set", *settings]
        found.append(Part(f"profile-{name}", f"profile of a training step: {' '.join(settings)}", command, data=True))
    for name, (recipe, settings) in _TRAININGS.items():
        run = out / name
        start = ["--resume"] if (run / "last.pt").is_file() else ["--recipe", recipe, "--data", str(data), "--set", *settings]
        found.append(Part(f"train-{name}", f"{recipe}, {' '.join(settings)}", [*train, *start, "--out", str(run)], data=True))
        for weights in ("best", "last"):
            to = ["--weights", weights, "--out", str(run / f"evaluation-{weights}")]
            command = [*_RPLIB, "evaluate", str(run), "--data", str(data), *to]
            found.append(Part(f"evaluate-{name}-{weights}", f"all test cases, {weights} weights", command, data=True))
    return found


def run_part(part: Part, out: Path, seconds: float | None) -> str:
    """Run one part with its output in a log; returns "good", "failed" or "stopped" (time limit)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | part.environment
    with (out / f"{part.name}.log").open("w") as log:
        log.write(" ".join(part.command) + "\n\n")
        log.flush()
        process = subprocess.Popen(part.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            return "good" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "stopped"


def bytes_per_kernel(log: str) -> dict[str, dict[str, float]]:
    """kernel -> metric -> value of its last launch, from the output of ``ncu --csv``.

    >>> lines = ['==PROF== Connected', '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
    ...          '"0","statistics_kernel","dram__bytes_read.sum","byte","1,024"']
    >>> bytes_per_kernel("\\n".join(lines))
    {'statistics_kernel': {'dram__bytes_read.sum': 1024.0}}
    """
    lines = log.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        return {}
    units = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3}
    units |= {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3}
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(line for line in lines[starts[0] :] if line.startswith('"')):
        value = float(row["Metric Value"].replace(",", "")) * units.get(row["Metric Unit"], 1.0)
        found.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = value
    return found


def _versions() -> dict[str, str]:
    import torch

    from rplib.bench.rows import current_commit

    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"gpu": gpu, "torch": torch.__version__, "triton": compiler, "commit": current_commit()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="logs and results (default %(default)s)"
    )
    parser.add_argument("--parts", metavar="A,B", help="parts to run, in this order (default: all that can run)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Left Atrium data, for the training parts")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after N minutes")
    parser.add_argument("--again", action="store_true", help="rerun parts that succeeded")


def run(args: argparse.Namespace) -> int:
    known = {part.name: part for part in parts(args.out, args.data)}
    names = args.parts.split(",") if args.parts else [n for n, p in known.items() if args.data or not p.data]
    for name in names:
        if name not in known:
            raise UserError(f"unknown part {name!r}; expected one or more of {', '.join(known)}.")
        if known[name].data and not args.data:
            raise UserError(f"part {name!r} needs --data DIR, the Left Atrium data.")
    versions = _versions()
    if not versions["gpu"]:
        raise UserError("torch finds no CUDA GPU, and every part needs one.")
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "parts.csv"
    done = _succeeded(table)
    until = time.monotonic() + 60 * args.minutes if args.minutes else None
    results = []
    for name in names:
        part = parts_now(name, args)
        if name in done and not args.again:
            print(f"{name}: done already ({args.out / name}.log)", flush=True)
            continue
        if part.needs and shutil.which(part.needs) is None:
            print(f"{name}: skipped, {part.needs} is not installed", flush=True)
            _note(table, part, "left out", 0.0, versions)
            continue
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            print(f"{name}: not started, no time left", flush=True)
            continue
        print(f"{name}: {part.summary} ...", flush=True)
        begin = time.monotonic()
        result = run_part(part, args.out, left)
        _note(table, part, result, time.monotonic() - begin, versions)
        print(f"{name}: {result}, {time.monotonic() - begin:.0f} s", flush=True)
        if name == "ncu" and result == "good":
            _print_bytes((args.out / "ncu.log").read_text(), versions["gpu"])
        if name == "kernels" and result == "good":
            print("".join(f"  {line}\n" for line in (args.out / "kernels.log").read_text().splitlines()[2:]), end="", flush=True)
        results.append(result)
    return 1 if "failed" in results else 0


def parts_now(name: str, args: argparse.Namespace) -> Part:
    """The part given the results so far: an interrupted training is resumed."""
    return {part.name: part for part in parts(args.out, args.data)}[name]


def _print_bytes(log: str, gpu_name: str) -> None:
    """Print bytes and time of each kernel from the profiler, next to the counted bytes and the predicted time."""
    voxels, gpu = SHAPES["left-atrium"].voxels, gpu_named(gpu_name)
    counted = {row.kernel: row for row in read_csv() if row.case == (2, 16, "float32", "contiguous")}
    for kernel, metrics in bytes_per_kernel(log).items():
        moved = metrics.get("dram__bytes_read.sum", 0.0) + metrics.get("dram__bytes_write.sum", 0.0)
        seconds = metrics.get("gpu__time_duration.sum", 0.0)
        expected = ""
        if kernel in counted:
            needs = counted[kernel].needs
            time = f", {1e6 * voxels * predicted(needs, gpu):.1f} us" if gpu else ""
            expected = f" (the machine: {needs.bytes:.2f} B/voxel{time})"
        print(f"  {kernel}: {moved / voxels:.2f} B/voxel of DRAM traffic, {1e6 * seconds:.1f} us{expected}", flush=True)


def _succeeded(table: Path) -> set[str]:
    if not table.is_file():
        return set()
    with table.open(newline="") as file:
        latest = {row["part"]: row["result"] for row in csv.DictReader(file)}
    return {part for part, result in latest.items() if result == "good"}


def _note(table: Path, part: Part, result: str, seconds: float, versions: dict[str, str]) -> None:
    new = not table.is_file()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        if new:
            writer.writeheader()
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
        row = {"part": part.name, "result": result, "seconds": f"{seconds:.1f}", "date": date}
        writer.writerow(row | {"command": " ".join(part.command)} | versions)


if __name__ == "__main__":
    sys.exit(main("gpu", __doc__, add_arguments, run))
