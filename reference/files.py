"""Atomic writes, folders with one writer at a time, and checked output paths.

Every file is written under a temporary name first, then renamed.
"""

import contextlib
import errno
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from rplib.errors import UserError, printable

LOCK = ".rplib.lock"
_OURS = re.compile(r"\.rplib-\d+-[0-9a-f]{12}\.tmp")
_LONGEST = 255  # bytes of a file's name, on every usual file system
LONGEST_NAME = 200  # bytes of a case's name: `_prediction.nii.gz` and the like come after it


def write_atomically(path: Path, write: Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """Write a file atomically: even if the process is killed, the path holds the old or the new content.

    Args:
        previous: path under which the old content is kept.

    Raises:
        OSError: the file cannot be written; ``filename`` is the path. No temporary file is left.
    """
    written = temporary(path)
    with naming(path):
        try:
            with open(written, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None:
                keep_previous(path, previous)
            os.replace(written, path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # flush the folder, so that the rename is on disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set the path in errors of the operating system, which have none for a write and a temporary one for a rename."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def temporary(path: Path) -> Path:
    """The temporary name of a file: short, unique, and recognised by `remove_leftovers`."""
    return path.with_name(f".rplib-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp")


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text; lone surrogates (from file names in other encodings) are escaped."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def keep_previous(path: Path, previous: Path) -> None:
    """Give a file a second name before a new one replaces it; `path` exists at every moment."""
    if not path.is_file():
        return
    link = temporary(previous)
    try:
        os.link(path, link)
    except OSError:  # no hard links on this file system
        shutil.copyfile(path, link)
    os.replace(link, previous)


def remove_leftovers(folder: Path, deep: bool = False) -> None:
    """Delete our own temporary files of interrupted writes; with `deep` also in the folders below.

    The folder must be `locked`: files that another process is writing look the same.
    """
    for path in folder.rglob(".rplib-*.tmp") if deep else folder.glob(".rplib-*.tmp"):
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time write to a folder; the lock ends with the process.

    Args:
        folder: must exist.
        what: name of the folder in the message, such as ``"--out RUN"``.

    Raises:
        UserError: another process holds the lock.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{what} is being written by another rplib process; wait for it, or choose another folder.") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        yield  # a file system without locks
        return
    try:
        yield
    finally:
        # Still locked: a process that has opened this file in the meantime sees that it is gone, and creates a new one.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def output_folder(folder: Path, what: str) -> Iterator[None]:
    """A folder to write into: created if needed, `locked`, and removed again if it was created and nothing was written."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, what):
            yield
    finally:
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty, apart from our lock file."""
    return all(path.name == LOCK for path in folder.iterdir())


def output_path(folder: Path, *parts: str) -> Path:
    """The path of a file to write, built from names in lists and files: always inside `folder`.

    Raises:
        UserError: a part is not a plain name (``..``, absolute, with a separator or control character), or is too long.

    >>> output_path(Path("out"), "case1_prediction.nii.gz").as_posix()
    'out/case1_prediction.nii.gz'
    >>> output_path(Path("out"), "../case1.nii.gz")
    Traceback (most recent call last):
    rplib.errors.UserError: '../case1.nii.gz' would be written outside out; expected a name without / or \\.
    """
    for part in parts:
        wrong = name_mistake(part, _LONGEST)
        if wrong is not None:
            if "/" in part or "\\" in part or part in (".", ".."):
                raise UserError(f"{printable(part)[:80]!r} would be written outside {folder}; expected {wrong}.")
            raise UserError(f"{printable(part)[:80]!r} cannot be the name of a file in {folder}; expected {wrong}.")
    return folder.joinpath(*parts)


def name_mistake(name: str, longest: int = LONGEST_NAME) -> str | None:
    """What was expected instead of an invalid name of a case or file; None for a valid one.

    >>> name_mistake("case_01"), name_mistake("a/b")
    (None, 'a name without / or \\\\')
    """
    if not name or name in (".", ".."):
        return "a name other than '', '.' and '..'"
    if "/" in name or "\\" in name or os.path.isabs(name):
        return "a name without / or \\"
    if has_control_characters(name):
        return "printable characters"
    if len(os.fsencode(name)) > longest:
        return f"a name of at most {longest} bytes, not {len(os.fsencode(name))}"
    return None


def has_control_characters(text: str) -> bool:
    """Whether a name contains control characters, line or paragraph separators, or lone surrogates.

    >>> has_control_characters("left atrium é"), has_control_characters("a\\x00b")
    (False, True)
    """
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
