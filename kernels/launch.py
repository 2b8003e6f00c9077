"""How tensors reach a kernel: strides, sizes, grids; and the one place where kernels are launched.

Nothing here copies, synchronises or looks at values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The layouts of voxels.py, as numbers.
ANY, ALIGNED, LAST, PACKED = range(4)
_INT32_LIMIT = 2**31 - 1
_USUAL = 90  # the architecture whose tiles are used where nothing else is known
# Programs per multiprocessor that walk over the voxels; the reduction then reads kilobytes.
_PROGRAMS_PER_MULTIPROCESSOR = 8
_PROGRAMS_WITHOUT_GPU = 4
_BLOCKS_PER_PROGRAM = 4096  # of at most 8 voxels a row: a row's voxels of one class can be counted in 16 bits


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
        _run(kernel, grid, arguments, constants)


class _Compiled(NamedTuple):
    """A variant of a kernel, ready to be launched, and the constants that follow its arguments."""

    kernel: Any
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], _Compiled] = {}


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """kernel[grid](*arguments, **constants), which costs Triton 60 us to look up; here it is a dictionary lookup.

    No integer is specialised (voxels.SIZES), so a variant is identified by its constants, the types of its arguments and whether
    tensors begin at a multiple of 16 bytes.
    """
    traits = tuple([_trait(argument) for argument in arguments])
    key = (kernel, arguments[0].device, traits, *constants.values())
    found = _compiled.get(key)
    if found is None or kernel.pre_run_hooks:
        compiled = kernel[grid](*arguments, **constants)
        if hasattr(compiled, "launch_metadata"):  # the interpreter returns nothing
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = _Compiled(compiled, tuple(constants[name] for name in names))
    else:
        found.kernel[(*grid, 1, 1)[:3]](*arguments, *found.constants)


def _trait(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument.bit_length() > 31
    return None


_tiles_for: int | str = _USUAL


@contextmanager
def tiles_for(architecture: int | str) -> Iterator[None]:
    """Tensors that are not on a GPU get the tiles of this one: 80, 90, 100 (ten times the compute capability) or "gfx942".

    For instruments that compile for a GPU that is not there.
    """
    global _tiles_for
    before, _tiles_for = _tiles_for, architecture
    try:
        yield
    finally:
        _tiles_for = before


def architecture(device: torch.device) -> int:
    """Ten times the compute capability of the GPU that tiles are chosen for; AMD's take those of 90."""
    found = _architecture(device) if device.type == "cuda" else _tiles_for
    return found if isinstance(found, int) else _USUAL


@cache
def _architecture(device: torch.device) -> int:
    if torch.version.hip:
        return _USUAL
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def current_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
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


class Geometry(NamedTuple):
    """How a tensor (B, channels, *spatial) lies in memory.

    strides: batch, channel, three spatial axes (flat: the last is the step between voxels). kind: its layout, see voxels.py.
    flat: the spatial axes collapse into one. span: of a sample, in elements.
    """

    strides: tuple[int, int, int, int, int]
    flat_stride: int
    kind: int
    flat: bool
    span: int

    def axes(self, flat: bool) -> tuple[int, int, int, int, int]:
        """The strides as a kernel wants them; flat: every tensor of the launch is."""
        return (*self.strides[:2], 0, 0, self.flat_stride) if flat else self.strides


def geometry(t: Tensor) -> Geometry:
    return _geometry(t.shape, t.stride())


@lru_cache(maxsize=4096)
def _geometry(shape: tuple[int, ...], stride: tuple[int, ...]) -> Geometry:
    sizes = shape[2:]
    sample, channel, *axes = stride
    flat, inner, flat_stride = True, 0, 1
    for size, step in zip(reversed(sizes), reversed(axes), strict=True):
        if size > 1:
            if not inner:
                flat_stride = step
            elif step != inner:
                flat = False
            inner = size * step
            if not step:  # expanded: every axis has to be
                flat = all(a == 0 for n, a in zip(sizes, axes, strict=True) if n > 1)
                break
    span = sum((n - 1) * step for n, step in zip(shape[1:], stride[1:], strict=True))
    kind = _kind(shape, sample, channel, flat, flat_stride)
    axis0, axis1, axis2 = (0, 0, *axes)[-3:]
    return Geometry((sample, channel, axis0, axis1, axis2), flat_stride, kind, flat, span)


def _kind(shape: tuple[int, ...], sample: int, channel: int, flat: bool, flat_stride: int) -> int:
    batch, channels, *sizes = shape
    one = batch == 1  # then the sample's stride is never used
    if channel == 1 and channels > 1:
        packed = flat and flat_stride == channels and (one or sample % channels == 0)
        return PACKED if packed else LAST
    side_by_side = flat and flat_stride == 1 and math.prod(sizes) % 16 == 0
    return ALIGNED if side_by_side and channel % 16 == 0 and (one or sample % 16 == 0) else ANY


def layout_of(tensors: Sequence[Geometry]) -> int:
    """The layout of voxels.py that all of these tensors have."""
    kinds = {g.kind for g in tensors}
    if len(kinds) == 1:
        return kinds.pop()
    return LAST if kinds == {LAST, PACKED} else ANY


def addressing(tensors: Sequence[Geometry]) -> tuple[bool, bool]:
    """(all are flat, some sample spans more elements than int32 counts)."""
    # A block may compute (never read) addresses up to a block beyond the last voxel.
    return all(g.flat for g in tensors), any(2 * g.span > _INT32_LIMIT for g in tensors)


def split(voxels: int, block: int, batch: int, device: torch.device) -> tuple[int, int]:
    """(programs per sample, whole blocks per program); the last program also takes the ragged tail."""
    blocks = max(1, voxels // block)
    wanted = max(1, _programs(device) // batch) if device.type != "cpu" else _PROGRAMS_WITHOUT_GPU
    per_program = min(-(-blocks // wanted), _BLOCKS_PER_PROGRAM)
    return -(-blocks // per_program), per_program


@cache
def _programs(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count) * _PROGRAMS_PER_MULTIPROCESSOR
    return 1024
