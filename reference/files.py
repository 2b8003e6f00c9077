"""Files that are whole or not there: every write goes to a temporary file first, which then takes the final name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at every moment, a kill included, the path holds the old content or the new."""
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
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary(path: Path) -> Path:
    """Where a file is written before it takes its name; `remove_leftovers` finds it."""
    return path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(run: Path) -> None:
    """Delete temporary files of writes that a kill interrupted."""
    for path in run.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
