"""The records of a run folder: metrics.csv, TensorBoard events, environment.json."""

import contextlib
import csv
import importlib.metadata
import io
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rplib
from rplib.errors import UserError, reading
from rplib.reference.files import write_text_atomically

METRICS_FILE, ENVIRONMENT = "metrics.csv", "environment.json"


class LogRow(NamedTuple):
    """One iteration in metrics.csv.

    Attributes:
        iteration: counted from 1.
        total, dice, mutual: the loss terms of `rplib.MutualObjective`; dice is the supervised
            term, whatever `supervised` selects, summed over both decoders.
        consistency_weight: factor of `mutual` in `total`.
        learning_rate: of this step.
        seconds: wall time per iteration, averaged since the last logged losses.
        validation_dice: mean decoder-1 Dice, if a validation followed this iteration.
        taught_by_1, taught_by_2: share of the voxels at which decoder 1 (2) teaches the other.
        mean_weight: of the pseudo-labels at those voxels.
        disagreement: share of the voxels where the decoders predict different classes.
        pseudo_labels: for each decoder, the share of voxels of each class, background first; in the file "0.9 0.1;0.8 0.2".
    """

    iteration: int
    total: float
    dice: float
    mutual: float
    consistency_weight: float
    learning_rate: float
    seconds: float
    validation_dice: float | None = None
    taught_by_1: float | None = None
    taught_by_2: float | None = None
    mean_weight: float | None = None
    disagreement: float | None = None
    pseudo_labels: tuple[tuple[float, ...], ...] | None = None


class RunLog:
    """Appends rows to metrics.csv and to TensorBoard events.

    Args:
        run: the run folder.
        done: iteration of the checkpoint from which the run resumes; later rows are removed. 0 is a new run.
    """

    def __init__(self, run: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / METRICS_FILE
        kept = [row for row in read_metrics(path) if row.iteration <= done] if path.is_file() else []
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([LogRow._fields, *map(_cells, kept)])
        write_text_atomically(path, text.getvalue())
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._writer = csv.writer(self._file, lineterminator="\n")
        # TensorBoard orders event files by the timestamp in their names and drops steps from purge_step on.
        while any(run.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._events = SummaryWriter(str(run), purge_step=done + 1)

    def add(self, rows: list[LogRow]) -> None:
        """Flush rows to the disk."""
        self._writer.writerows(map(_cells, rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        for row in rows:
            for name in ("total", "dice", "mutual"):
                self._events.add_scalar(f"loss/{name}", getattr(row, name), row.iteration)
            self._events.add_scalar("schedule/consistency_weight", row.consistency_weight, row.iteration)
            self._events.add_scalar("schedule/learning_rate", row.learning_rate, row.iteration)
            if row.validation_dice is not None:
                self._events.add_scalar("validation/dice", row.validation_dice, row.iteration)
            for name in ("taught_by_1", "taught_by_2", "mean_weight", "disagreement"):
                if getattr(row, name) is not None:
                    self._events.add_scalar(f"pseudo_labels/{name}", getattr(row, name), row.iteration)
            for decoder, shares in enumerate(row.pseudo_labels or (), start=1):
                for k, share in enumerate(shares):
                    self._events.add_scalar(f"pseudo_labels/decoder_{decoder}_class_{k}", share, row.iteration)
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[LogRow]:
    """Read the rows of a metrics.csv; a truncated last line is ignored.

    Raises:
        UserError: not a metrics.csv of `rplib train`.
    """
    with reading(path, "metrics.csv", "remove it; a resumed run writes a new one"):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")  # a kill may leave a line of zeros
        whole = text[: text.rfind("\n") + 1]
        header, *lines = list(csv.reader(io.StringIO(whole, newline=""))) or [[]]
    if tuple(header) != LogRow._fields[: len(header)] or len(header) < 8:  # older runs have fewer columns
        raise UserError(f"{path} has the columns {', '.join(header) or 'none'}; expected {', '.join(LogRow._fields)}.")
    rows = []
    for cells in lines:
        with contextlib.suppress(ValueError):
            if len(cells) == len(header):
                rows.append(_row(cells))
    return rows


def record_session(run: Path, device: torch.device, data: Path, done: int, deterministic: bool, processes: int = 1) -> None:
    """Write environment.json: versions and hardware, one entry per start or resumption."""
    path = run / ENVIRONMENT
    sessions = read_sessions(run)
    sessions.append(
        {
            "command": sys.argv,
            "data": str(data.resolve()),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_iteration": done,
            "deterministic": deterministic,
            "processes": processes,
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "rplib": rplib.__version__,
            "torch": str(torch.__version__),  # with the build, such as +cu130, which the name of a wheel may leave out
            **{name: _version(name) for name in ("triton", "numpy", "monai", "h5py")},
        }
    )
    write_text_atomically(path, json.dumps({"sessions": sessions}, indent=2) + "\n")


def read_sessions(run: Path) -> list[dict[str, Any]]:
    """Entries of environment.json, oldest first; empty if the file is missing or damaged."""
    try:
        return list(json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _row(cells: list[str]) -> LogRow:
    """The inverse of `_cells`; raises ValueError for anything else."""
    iteration, *numbers = cells[:7]
    optional = {name: float(cell) if cell else None for name, cell in zip(LogRow._fields[7:12], cells[7:12], strict=False)}
    shares = tuple(tuple(map(float, part.split())) for part in cells[12].split(";")) if len(cells) > 12 and cells[12] else None
    total, dice, mutual, weight, rate, seconds = map(float, numbers)
    rest: dict[str, Any] = {**optional, "pseudo_labels": shares}
    return LogRow(int(iteration), total, dice, mutual, weight, rate, seconds, **rest)


def _cells(row: LogRow) -> list[str]:
    # repr of a float is lossless
    cells = []
    for name, value in row._asdict().items():
        if name == "pseudo_labels":
            cells.append(";".join(" ".join(map(repr, shares)) for shares in value or ()))
        else:
            cells.append("" if value is None else repr(round(value, 6) if name == "seconds" else value))
    return cells


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
