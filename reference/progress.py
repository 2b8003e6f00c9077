"""Progress reports: a bar on a terminal, one line per minute in a redirected log, nothing on ranks other than 0."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

_EVERY = 60.0  # seconds between lines without a terminal


def is_first() -> bool:
    """Whether this process reports progress: rank 0, or a single process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class Progress(tqdm):
    """A tqdm bar that prints one line per minute instead of redrawing if stderr is not a terminal.

    Takes the arguments of tqdm. The first line comes after a minute, so short loops do not clutter a log.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        self._in_log = not sys.stderr.isatty()
        options.setdefault("disable", not is_first())
        if self._in_log:
            options.update(mininterval=_EVERY, maxinterval=_EVERY, miniters=1, leave=False)
        self._last_line = time.monotonic()
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._in_log:
            return bool(super().display(msg, pos))
        if msg == "" or time.monotonic() - self._last_line < _EVERY:  # "": tqdm clears the bar
            return False
        self._last_line = time.monotonic()
        print(msg if msg is not None else str(self), file=sys.stderr, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self._in_log:
            super().clear(nolock=nolock)


def progress(items: Sequence[Any], description: str, unit: str = "case") -> Progress:
    """Iterate over `items` with progress on stderr; the bar disappears at the end.

    >>> [n for n in progress([1, 2], "counting", "number")]
    [1, 2]
    """
    return Progress(items, desc=description, unit=unit, leave=False, disable=not items or not is_first())
