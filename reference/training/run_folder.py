"""Checks of the run folder before training: empty or a run to resume, writable, with enough disk space."""

import contextlib
import errno
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.checkpoint import BEST, CONFIG, LAST, PREVIOUS
from rplib.reference.config import Config
from rplib.reference.files import is_empty, locked, remove_leftovers, temporary
from rplib.reference.reporting.run_log import read_sessions

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space left; quota exceeded; over the limit for one file
_UNKNOWN = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}  # the file system cannot reserve space
_ROW = 500  # bytes per iteration in metrics.csv and TensorBoard events, upper estimate
_REST = 4 << 20  # settings, environment, curves


@contextlib.contextmanager
def prepared(out: Path, resume: bool, config: Config) -> Iterator[None]:
    """Create the folder if needed, lock it, and check that the whole run can be written to it.

    Raises:
        UserError: it has other contents, another process writes to it, it is not writable, or the disk (or quota) has too
            little space.
    """
    with contextlib.ExitStack() as held:
        try:
            _check_free(out, resume)
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out, f"--out {out}"))
            _check_free(out, resume)  # again: another process may have written to it before we held the lock
            remove_leftovers(out)
            _reserve(out, room_needed(out, config))
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror or error}); choose another folder.") from error
        yield


def _check_free(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder.")
    if out.is_dir() and not is_empty(out):
        if not resume:
            raise UserError(f"--out {out} is not empty; choose another folder, or resume its run with --resume.")
        if not (out / CONFIG).is_file() and not (out / LAST).is_file():
            strangers = [path.name for path in out.iterdir() if not path.name.startswith(".")]
            if strangers:
                raise UserError(f"{out} is not a run folder (no {CONFIG} in it); choose another --out.")


def check_memory(config: Config, device: torch.device) -> None:
    """Reject settings that need more memory than the machine has.

    Raises:
        UserError: states how much memory they need.
    """
    if device.type == "cuda":
        there, where = torch.cuda.get_device_properties(device).total_memory, f"{device} has"
    elif hasattr(os, "sysconf"):
        there, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine has"
    else:
        return
    needed = memory_needed(config)
    if needed > there:
        raise UserError(
            f"a step with filters={config.filters}, patch={list(config.patch)}, batch_size={config.batch_size} and "
            f"in_channels={config.in_channels} needs more than {needed / 2**30:.0f} GB of memory and {where} "
            f"{there / 2**30:.0f} GB; lower one of them."
        )


def memory_needed(config: Config) -> int:
    """A lower bound of the bytes of a step: weights, gradients, momentum, and both decoders' outputs at full resolution."""
    with torch.device("meta"):
        weights = sum(t.numel() * t.element_size() for t in checkpoint.build_network(config).parameters())
    voxels = config.batch_size * math.prod(config.patch)
    return 3 * weights + 4 * voxels * (config.in_channels + 2 * (config.filters + config.classes))


def room_needed(out: Path, config: Config) -> int:
    """Bytes that a run may still write; while last.pt (weights, their average, momentum) is replaced, three copies exist."""
    with torch.device("meta"):
        network = checkpoint.build_network(config)
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    last = (3 if config.average else 2) * weights + (1 << 16)  # names, sizes, generator states
    files = last + sum(last for name in (LAST, PREVIOUS) if not (out / name).is_file())
    files += 0 if (out / BEST).is_file() else weights
    return files + _ROW * config.iterations + _REST


def _reserve(out: Path, needed: int) -> None:
    """Write and remove a file of that size, which also checks quotas and limits, unlike the reported free space."""
    path = temporary(out / "room")
    try:
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
            elif shutil.disk_usage(out).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno in _UNKNOWN and shutil.disk_usage(out).free >= needed:
            return
        if error.errno in _FULL | _UNKNOWN:
            raise UserError(
                f"--out {out} has no space for the {needed / 2**20:.0f} MB that this run may write "
                f"({error.strerror}; {shutil.disk_usage(out).free / 2**20:.0f} MB are free); free space or choose another."
            ) from error
        raise
    finally:
        path.unlink(missing_ok=True)


def check_checkpoint(saved: dict[str, Any], case_names: list[str], config: Config, path: Path) -> None:
    """Reject a checkpoint that another training wrote.

    Raises:
        UserError: missing keys, other cases, or past the last iteration.
    """
    needed = {
        "network",
        "optimiser",
        "batches",
        "torch_random",
        "cuda_random",
        "iteration",
        "best_score",
        "best_iteration",
        "cases",
    }
    if not needed <= saved.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(needed - saved.keys()))}; cannot resume from it.")
    counted = ("iteration", "best_iteration")
    if not all(type(saved[key]) is int and saved[key] >= 0 for key in counted) or not isinstance(saved["best_score"], float):
        raise UserError(f"{path} has no valid iteration or score; cannot resume from it.")
    if saved["cases"] != case_names:
        raise UserError(f"{path} was trained on other cases than those in the lists; set --data to the original data set.")
    if saved["iteration"] > config.iterations:
        raise UserError(f"{path} is at iteration {saved['iteration']}, past iterations={config.iterations}; raise iterations.")


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not end the process; the yielded function returns whether it was received.

    A cluster scheduler sends it some time before it kills the process: time to finish the step and write a checkpoint.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def warn_of_other_bits(out: Path, device: torch.device, processes: int, deterministic: bool) -> None:
    """Warn if a run is resumed under conditions that change the last bits of the results."""
    now = {
        "device": device.type,
        "processes": processes,
        "deterministic": deterministic,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    before = (read_sessions(out) or [now])[-1]
    before["device"] = str(before.get("device")).partition(":")[0]
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key, value) != value]
    if device.type == "cuda" and not deterministic:
        changed.append("without --deterministic")
    if changed:
        print(f"resumed under different conditions ({', '.join(changed)}): the last bits may differ", file=sys.stderr)
