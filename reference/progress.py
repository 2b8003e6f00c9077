"""Progress of long work: a bar on a terminal, a line a minute in a redirected log, silence on all ranks but the first."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

_EVERY = 60.0  # seconds between lines where there is no terminal


def is_first() -> bool:
    """Whether this process reports: rank 0 of several, or a process alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class Progress(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that prints a line a minute instead of redrawing where stderr is no terminal.

    Arguments are those of tqdm. The first line comes after a minute, so that short work leaves nothing in a log.
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
    """A loop over `items` with its progress on stderr; the bar disappears when the loop ends.

    >>> [n for n in progress([1, 2], "counting", "number")]
    [1, 2]
    """
    return Progress(items, desc=description, unit=unit, leave=False, disable=not items or not is_first())
