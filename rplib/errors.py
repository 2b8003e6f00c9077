"""Errors that a user can fix, and the conversion of system errors and damaged files into them."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A user error; its message is one sentence that includes the remedy.

    The command line prints it as one line, without a traceback, and exits with code 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, for example from a cluster scheduler or `kill`; the command line exits with code 143."""


# Remedies for errors of the operating system; all others are reported without advice.
_REMEDIES = {
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free space or choose another disk",
    errno.EDQUOT: "free space or choose another disk",
    errno.EFBIG: "raise the file size limit (`ulimit -f`) or choose another disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "it is a folder; check the path",
    errno.EEXIST: "it already exists; remove it or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its symbolic links lead in a circle; remove them",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "close other programs",
    errno.EIO: "the disk reports errors; copy the data to another one",
}
_MEMORY = "reduce memory use (batch_size, patch, filters), or use a machine with more memory"
# PyTorch's messages when an allocation on the CPU fails: a plain RuntimeError.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|bad_alloc|failed to allocate", re.IGNORECASE)


def explained(error: BaseException) -> UserError | None:
    """An error of the operating system as one sentence with the file and the remedy; None for a bug in the program.

    >>> print(explained(OSError(errno.ENOSPC, "No space left on device", "run/last.pt")))
    No space left on device: run/last.pt; free space or choose another disk
    >>> explained(ValueError("a bug in the program"))
    """
    if isinstance(error, OSError) and error.errno is not None:
        reported = error.strerror or os.strerror(error.errno)
        named = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        remedy = _REMEDIES.get(error.errno)
        return UserError(f"{reported}{named}" + (f"; {remedy}" if remedy and named else ""))
    if is_out_of_memory(error):
        return UserError(f"out of memory ({brief_reason(error)}); {_MEMORY}")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # from Path.resolve before Python 3.13
        return UserError(f"{error}; {_REMEDIES[errno.ELOOP]}")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return UserError("a path contains a NUL character; remove it")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python, NumPy or PyTorch."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def brief_reason(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


@contextlib.contextmanager
def reading(path: Path | str, kind: str, remedy: str = "copy it again from its source") -> Iterator[None]:
    """Convert any error while reading a file into one sentence that names the file.

    A damaged file fails in many ways (headers, compression, encodings, recursion, sizes), depending on the library.

    Args:
        path: for the message.
        kind: what was expected, such as ``"h5 file"``.
        remedy: what to do.

    Raises:
        UserError: in place of any error inside.

    >>> with reading("a.h5", "h5 file"):
    ...     raise OSError("truncated file")
    Traceback (most recent call last):
    rplib.errors.UserError: a.h5 is not a readable h5 file (truncated file); copy it again from its source.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"{path} does not fit into memory ({brief_reason(error)}); use a machine with more.") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else brief_reason(error)
        raise UserError(f"{path} is not a readable {kind} ({reason}); {remedy}.") from error


def printable(text: str) -> str:
    """Text on one line, for a terminal, with control characters and lone surrogates escaped.

    >>> printable("a\\x1b[2Jb\\n  c")
    'a\\\\x1b[2Jb c'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
