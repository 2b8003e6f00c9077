"""How tensors reach a kernel: strides, sizes, grids; and the one place where kernels are launched.

Nothing here copies, synchronises or looks at values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The layouts of voxels.py, as numbers.
ANY, ALIGNED, LAST, PACKED = range(4)
_INT32_LIMIT = 2**31 - 1
# Programs per multiprocessor that walk over the voxels; the reduction then reads kilobytes.
_PROGRAMS_PER_MULTIPROCESSOR = 8
_PROGRAMS_WITHOUT_GPU = 4


class Launch(NamedTuple):
    """One launch: kernel[grid](*arguments, **constants)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_observers: list[Callable[[Launch], bool]] = []


@contextmanager
def observed(observer: Callable[[Launch], bool]) -> Iterator[None]:
    """Show every launch to ``observer`` first; where it returns False the kernel is not run.

    For instruments: counting launches, and compiling for a GPU that is not there.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    asked = Launch(kernel, grid, arguments, constants)
    run = True
    for observer in _observers:
        run = observer(asked) and run
    if run:
        kernel[grid](*arguments, **constants)


def current_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type in ("cpu", "meta"):
        return nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return context


def sizes(z: Tensor) -> tuple[int, int, int]:
    """Voxels per sample, and the sizes of the last two of three spatial axes."""
    spatial = (1, 1, *z.shape[2:])[-3:]
    voxels = spatial[0] * spatial[1] * spatial[2]
    if voxels > _INT32_LIMIT:
        raise ValueError(f"a sample of shape {tuple(z.shape[2:])} has {voxels} voxels; the kernels take fewer than 2^31.")
    return voxels, spatial[1], spatial[2]


def channels(features: Sequence[Tensor] | None) -> tuple[int, int]:
    """F of both networks; 0 without features."""
    return (features[0].shape[1], features[1].shape[1]) if features else (0, 0)


def strides(t: Tensor, flat: bool) -> tuple[int, int, int, int, int]:
    """Of (B, channels, *spatial): batch, channel, three spatial axes; flat: the kernel uses the last axis alone."""
    batch, channel, *spatial = t.stride()
    if flat:
        return batch, channel, 0, 0, _flat_stride(t)
    axes = (0, 0, *spatial)[-3:]
    return batch, channel, axes[0], axes[1], axes[2]


def _is_flat(t: Tensor) -> bool:
    """True where the spatial axes collapse into one axis of constant stride."""
    inner = None
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size > 1:
            if inner is not None and stride != inner:
                return False
            inner = size * stride
    return True


def _flat_stride(t: Tensor) -> int:
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size > 1:
            return stride
    return 1


def layout_of(tensors: Sequence[Tensor]) -> int:
    """The layout of voxels.py that all of these tensors (B, channels, *spatial) have."""
    kinds = {_kind(t) for t in tensors}
    if len(kinds) == 1:
        return kinds.pop()
    return LAST if kinds == {LAST, PACKED} else ANY


def _kind(t: Tensor) -> int:
    sample, channel = t.stride()[:2]
    one = t.shape[0] == 1  # then the sample's stride is never used
    if channel == 1 and t.shape[1] > 1:
        packed = _is_flat(t) and _flat_stride(t) == t.shape[1] and (one or sample % t.shape[1] == 0)
        return PACKED if packed else LAST
    side_by_side = _flat_stride(t) == 1 and _is_flat(t) and t[0, 0].numel() % 16 == 0
    return ALIGNED if side_by_side and channel % 16 == 0 and (one or sample % 16 == 0) else ANY


def addressing(tensors: Sequence[Tensor]) -> tuple[bool, bool]:
    """(all are flat, some sample spans more elements than int32 counts)."""
    wide = False
    for t in tensors:
        span = sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        wide = wide or 2 * span > _INT32_LIMIT  # a block may compute (never read) addresses up to a block beyond the last voxel
    return all(_is_flat(t) for t in tensors), wide


def split(voxels: int, block: int, batch: int, device: torch.device) -> tuple[int, int]:
    """(programs per sample, whole blocks per program); the last program also takes the ragged tail."""
    blocks = max(1, voxels // block)
    wanted = max(1, _programs(device) // batch) if device.type != "cpu" else _PROGRAMS_WITHOUT_GPU
    per_program = -(-blocks // wanted)
    return -(-blocks // per_program), per_program


@cache
def _programs(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count) * _PROGRAMS_PER_MULTIPROCESSOR
    return 1024
