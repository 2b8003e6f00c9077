"""Rows of measurements, their CSV file, and the printed table."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rplib
from rplib.bench.floor import floor_bytes
from rplib.bench.shapes import DTYPES, Case

# Results of an implementation on an input. Only MEASURED ones have times.
MEASURED = "measured"
COUNTED = "counted"  # correct, with known bytes, but the machine cannot time it
WRONG = "WRONG"
FAILED = "failed"
OUT_OF_MEMORY = "out of memory"
LEFT_OUT = "left out"

# Source of the bytes of PyTorch forms.
OPERATIONS = "operands and results of every operation"
ESTIMATE = "inductor's estimate"


@dataclass
class Measurement:
    """One implementation on one input; None: unknown. Bytes are per voxel if the name says so, else per call.

    Attributes:
        size: logits' and features' sizes, batch x classes x features x spatial.
        status: one of the constants above; ``detail`` gives the reason.
        loss_error, gradient_error: relative, against the formula in float64.
        seconds .. seconds_third_quartile: forward and backward, over ``repeats`` runs interleaved with the other implementations;
            seconds is the median.
        times_faster: median of the naive form / own median, in the same rounds.
        graph_seconds: median of the same kernels replayed as a CUDA graph, interleaved.
        first_call_seconds: includes compilation for compiled forms.
        launches: kernels on a GPU; on a CPU operations of an eager form, fused groups of operations of a compiled one.
        forward_bytes, backward_bytes: peak of live memory beyond the inputs during each pass.
        lane_bytes_per_voxel, sector_bytes_per_voxel: loads and stores of the Triton form; of eager forms operands and results of
            every operation; an estimate for compiled forms; see ``bytes_from``.
        copy_fraction: floor's bytes / seconds, as a fraction of ``copy_bandwidth`` (bytes per second, same rounds).
    """

    shape: str
    size: str
    dtype: str
    layout: str
    teachers: str
    implementation: str
    status: str = FAILED
    detail: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    near_ties: int | None = None
    repeats: int | None = None
    seconds: float | None = None
    seconds_minimum: float | None = None
    seconds_first_quartile: float | None = None
    seconds_third_quartile: float | None = None
    times_faster: float | None = None
    graph_seconds: float | None = None
    first_call_seconds: float | None = None
    launches: int | None = None
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    times_less_memory: float | None = None
    lane_bytes_per_voxel: float | None = None
    sector_bytes_per_voxel: float | None = None
    bytes_from: str = ""
    floor_bytes_per_voxel: int | None = None
    copy_bandwidth: float | None = None
    copy_fraction: float | None = None

    @property
    def peak_bytes(self) -> int | None:
        if self.forward_bytes is None or self.backward_bytes is None:
            return None
        return max(self.forward_bytes, self.backward_bytes)

    @property
    def case(self) -> tuple[str, str, str, str, str]:
        """The key shared by the rows of one table."""
        return self.shape, self.size, self.dtype, self.layout, self.teachers


def new_row(case: Case, implementation: str) -> Measurement:
    shape = case.shape
    floor = floor_bytes(shape.classes, shape.features, DTYPES[case.dtype].itemsize)
    return Measurement(
        shape.name, str(shape), case.dtype, case.layout, case.teachers, implementation, floor_bytes_per_voxel=floor
    )


def compare_with(baseline: Measurement, rows: Iterable[Measurement]) -> None:
    """Fill in the ratios to ``baseline``, measured on the same input in the same rounds."""
    for row in rows:
        if row.seconds and baseline.seconds:
            row.times_faster = baseline.seconds / row.seconds
        if row.peak_bytes and baseline.peak_bytes:
            row.times_less_memory = baseline.peak_bytes / row.peak_bytes


def environment(device: torch.device) -> dict[str, str]:
    """Provenance of the figures: date, device, versions, commit."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "rplib": rplib.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": current_commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name; of a CPU its model and how many there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else model}, {os.cpu_count()} cores"


def write_csv(path: Path, rows: Iterable[Measurement], about: dict[str, str]) -> None:
    """Write the file atomically: readers see either the old or the new rows."""
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*about, *(field.name for field in fields(Measurement))])
        for row in rows:
            writer.writerow([*about.values(), *(_cell(value) for value in asdict(row).values())])
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_csv(path: Path) -> list[Measurement]:
    """The rows of `write_csv`; other columns (date, versions) are ignored."""
    with path.open(newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def table(rows: Sequence[Measurement]) -> str:
    """Fixed-width text for the rows of one input."""
    heads = ["", "ms", "quartiles", "x naive", "graph ms", "launches"]
    heads += ["MB fwd", "MB bwd", "x less", "B/voxel", "sectors", "x floor", "of copy"]
    cells = [_cells(row) for row in rows]
    shown = [k for k, head in enumerate(heads) if head != "graph ms" or any(line[k] != "-" for line in cells)]
    lines = [[line[k] for k in shown] for line in [heads, *cells]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(shown))]
    notes = ["", *(row.detail if row.status in (WRONG, FAILED, OUT_OF_MEMORY, LEFT_OUT) else "" for row in rows)]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("  ".join([*line, note]).rstrip() for line, note in zip(padded, notes, strict=True))


def heading(row: Measurement) -> str:
    """One line about the input of a table."""
    copy = "" if row.copy_bandwidth is None else f", copy {row.copy_bandwidth / 1e9:.1f} GB/s"
    return (
        f"{row.shape} {row.size} {row.dtype} {row.layout}, teacher: {row.teachers}; "
        f"floor {row.floor_bytes_per_voxel} B/voxel{copy}"
    )


def _cells(row: Measurement) -> list[str]:
    milliseconds = row.status if row.status != MEASURED else _number(row.seconds, 1e3)
    if row.status == COUNTED:
        milliseconds = "-"
    quartiles = "-"
    if row.seconds_first_quartile is not None and row.seconds_third_quartile is not None:
        quartiles = f"{_number(row.seconds_first_quartile, 1e3)}..{_number(row.seconds_third_quartile, 1e3)}"
    floor, lanes = row.floor_bytes_per_voxel, row.lane_bytes_per_voxel
    return [
        row.implementation,
        milliseconds,
        quartiles,
        _number(row.times_faster),
        _number(row.graph_seconds, 1e3),
        "-" if row.launches is None else str(row.launches),
        _number(row.forward_bytes, 1e-6),
        _number(row.backward_bytes, 1e-6),
        _number(row.times_less_memory),
        ("~" if row.bytes_from == ESTIMATE else "") + _number(lanes),
        _number(row.sector_bytes_per_voxel),
        "-" if lanes is None or not floor else f"{lanes / floor:.2f}",
        "-" if row.copy_fraction is None else f"{100 * row.copy_fraction:.1f} %",
    ]


def _number(value: float | None, factor: float = 1) -> str:
    """Three significant digits, and all integer digits.

    >>> _number(4742.3), _number(17.26), _number(0.2564, 1e3), _number(0.00123), _number(None)
    ('4742', '17.3', '256', '0.00123', '-')
    """
    if value is None:
        return "-"
    value *= factor
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _row(line: dict[str, str]) -> Measurement:
    values: dict[str, object] = {}
    for field in fields(Measurement):
        text = line[field.name]
        kind = str(field.type)
        if "int" in kind:
            values[field.name] = int(text) if text else None
        elif "float" in kind:
            values[field.name] = float(text) if text else None
        else:
            values[field.name] = text
    return Measurement(**values)  # type: ignore[arg-type]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def current_commit() -> str:
    """Commit of this checkout, with a plus sign if files have changed; "" outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
