"""How tensors reach a kernel: strides, sizes, grids; and the one place where kernels are launched.

Nothing here copies, synchronises or looks at values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class Strides(NamedTuple):
    """Of a tensor (B, channels, *spatial), its spatial axes padded with ones to three."""

    batch: int
    channel: int
    axis0: int
    axis1: int
    axis2: int


def current_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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


def strides(t: Tensor, flat: bool) -> Strides:
    """Of (B, channels, *spatial)."""
    batch, channel, *spatial = t.stride()
    if flat:  # the kernel uses the last axis alone
        return Strides(batch, channel, 0, 0, _flat_stride(t))
    axes = (0, 0, *spatial)[-3:]
    return Strides(batch, channel, axes[0], axes[1], axes[2])


def _is_flat(t: Tensor) -> bool:
    """True where the spatial axes collapse into one axis of constant stride."""
    axes = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size > 1]
    return all(s == next_size * next_s for (_, s), (next_size, next_s) in pairwise(axes))


def _flat_stride(t: Tensor) -> int:
    axes = [stride for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size > 1]
    return axes[-1] if axes else 1


def addressing(tensors: Sequence[Tensor], voxels: int) -> tuple[bool, bool]:
    """(all are flat, some sample spans more elements than int32 counts)."""
    spans = (
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors
    )
    # A block may compute (never read) addresses up to a block beyond the last voxel.
    return all(_is_flat(t) for t in tensors), any(2 * span > _INT32_LIMIT for span in spans)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """True where every channel of every sample begins at a multiple of 16 elements, as the compiler wants for wide loads."""
    return all(t.stride(0) % 16 == 0 and t.stride(1) % 16 == 0 for t in tensors)


def packed(tensors: Sequence[Tensor]) -> bool:
    """True where every tensor (B, C, *spatial) has its channels side by side, voxel after voxel: channels last."""
    return all(
        t.stride(1) == 1 and _is_flat(t) and _flat_stride(t) == t.shape[1] and t.stride(0) % t.shape[1] == 0 for t in tensors
    )


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
