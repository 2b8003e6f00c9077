"""Peak memory that a forward and a backward pass allocate in addition to what was allocated before them.

On a GPU the figures come from the caching allocator. On a CPU they come from the profiler, which reports every allocation of
eager operations, custom operators and compiled code. Memory that a library allocates outside torch (a BLAS workspace, say) is
not counted.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rplib.errors import UserError

# The profiler writes a line on stderr whenever it starts or stops, unless this is set before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_FORWARD, _BACKWARD = "rplib.memory forward", "rplib.memory backward"


@dataclass(frozen=True)
class PeakMemory:
    """Peak of live bytes during each pass, minus the bytes live before the forward pass.

    The figure of the backward pass includes the tensors that the forward pass saved for it, and the gradients.
    """

    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def peak_memory(forward: Callable[[], Tensor], device: torch.device) -> PeakMemory:
    """Run ``forward()``, then ``backward()`` of the 0-dim tensor that it returns, and measure both.

    Gradients are counted only if the call allocates them, so set those of the leaves to None first.

    Raises:
        UserError: memory cannot be measured on this kind of device.

    Example:
        >>> import torch
        >>> x = torch.ones(1000, requires_grad=True)
        >>> peak_memory(lambda: x.exp().sum(), torch.device("cpu")).forward  # its exponential: 4000 bytes; the sum: 4
        4004
    """
    if device.type == "cuda":
        return _on_cuda(forward, device)
    if device.type == "cpu":
        return _on_cpu(forward)
    raise UserError(f"peak memory cannot be measured on device {device.type!r}; expected cpu or cuda.")


def _on_cuda(forward: Callable[[], Tensor], device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss = forward()
    torch.cuda.synchronize(device)
    forward_peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    loss.backward()
    torch.cuda.synchronize(device)
    return PeakMemory(forward_peak, torch.cuda.max_memory_allocated(device) - before)


def _on_cpu(forward: Callable[[], Tensor]) -> PeakMemory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        with record_function(_FORWARD):
            loss = forward()
        with record_function(_BACKWARD):
            loss.backward()
    moments = sorted(_moments(found), key=lambda moment: moment[0])
    live = list(accumulate(change for _, _, change in moments))
    split = next(n for n, (_, name, _) in enumerate(moments) if name == _BACKWARD)
    # The backward pass starts at the level that the forward pass left.
    return PeakMemory(max(live[: split + 1]), max(live[split:]))


def _moments(found: profile) -> Iterator[tuple[int, str, int]]:
    """(time in ns, name of a pass that begins or "", change of live bytes)."""
    results = getattr(found.profiler, "kineto_results", None)
    if results is None:
        raise UserError(f"torch {torch.__version__} keeps its profiler's events elsewhere; memory cannot be measured here.")
    for event in results.events():
        name = event.name()
        if name == "[memory]" and event.device_type() == DeviceType.CPU:
            yield event.start_ns(), "", event.nbytes()
        elif name in (_FORWARD, _BACKWARD):
            yield event.start_ns(), name, 0
