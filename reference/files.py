"""Atomic writes: every file is written under a temporary name first, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: even if the process is killed, the path holds the old or the new content."""
    written = temporary(path)
    try:
        with open(written, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # flush the folder, so that the rename reaches the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary(path: Path) -> Path:
    """The temporary name of a file; `remove_leftovers` recognises it."""
    return path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(run: Path) -> None:
    """Delete the temporary files of interrupted writes."""
    for path in run.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
