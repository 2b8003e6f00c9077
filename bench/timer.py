"""Interleaved timing of several callables on one device: median and spread, with a device copy as the upper bound.

Interleaved because a machine's speed drifts: a ratio of two medians is meaningful only if both were measured over the same
period. Every round calls each of them once, starting with a different one.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

# Written between calls on a GPU to flush the L2 cache: several times the largest L2.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in order.

    >>> t = Timing((3.0, 1.0, 2.0, 5.0, 4.0))
    >>> t.median, t.minimum, t.quartiles
    (3.0, 1.0, (2.0, 4.0))
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; for a single run, that run."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


class Clock(Protocol):
    """Seconds of one synchronised call on a device."""

    def __call__(self, call: Call) -> float: ...


def clock_for(device: torch.device) -> Clock:
    """On a CPU wall-clock time; on a CUDA GPU events around the call, with a cold L2 cache; elsewhere wall-clock time."""
    if device.type == "cuda":
        return _CudaClock(device)
    if device.type == "cpu":
        return _wall_clock
    return _WaitingClock(device)


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repeats: int, *, warmup: int = 1, before: Call | None = None
) -> dict[str, Timing]:
    """Time every call ``repeats`` times, interleaved.

    Args:
        calls: name -> what to time.
        device: where the calls run.
        repeats: number of rounds; use at least 5 for ratios.
        warmup: untimed rounds (compilers, caches, allocators).
        before: called before every run, outside the timing.

    Raises:
        ValueError: nothing to time.

    Example:
        >>> import torch
        >>> timings = interleaved({"a": lambda: sum(range(10)), "b": lambda: None}, torch.device("cpu"), repeats=3)
        >>> [len(t.seconds) for t in timings.values()]
        [3, 3]
    """
    if not calls or repeats < 1 or warmup < 0:
        raise ValueError(f"{len(calls)} calls, {repeats} repeats, warmup {warmup}; expected at least one call and one repeat.")
    clock = clock_for(device)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before()
            elapsed = clock(calls[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class DeviceCopy:
    """A copy of ``size`` bytes in device memory, to measure its bandwidth. Time it interleaved with the others.

    >>> import torch
    >>> copy = DeviceCopy(torch.device("cpu"), 1 << 20)
    >>> copy()
    >>> copy.moved  # read once, written once
    2097152
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._source = torch.ones(size // 4, dtype=torch.float32, device=device)
        self._target = torch.zeros_like(self._source)
        self.moved = 2 * 4 * self._source.numel()

    def __call__(self) -> None:
        self._target.copy_(self._source)

    def bandwidth(self, timing: Timing) -> float:
        """Bytes per second of the median run, reads and writes together."""
        return self.moved / timing.median


def copy_size(device: torch.device) -> int:
    """A size beyond all caches that leaves memory for the rest: 1 GiB on a GPU, 256 MiB on a CPU."""
    return 1 << 30 if device.type == "cuda" else 1 << 28


def as_cuda_graph(call: Call) -> Call:
    """Capture ``call`` on the current CUDA device and return its replay: the same kernels without launch overhead.

    Raises:
        RuntimeError: the call cannot be captured, for example because it synchronises the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _wall_clock(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self._device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            # The flush keeps the device busy while the host prepares the first launches, which hides their latency.
            self._flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1000


class _WaitingClock:
    def __init__(self, device: torch.device) -> None:
        self._wait = getattr(torch, device.type).synchronize

    def __call__(self, call: Call) -> float:
        self._wait()
        begin = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - begin
