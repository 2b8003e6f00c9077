"""Count the bytes that Triton kernels load and store, on any machine, using Triton's interpreter.

Works for any ``@triton.jit`` kernel:

    with kernel_traffic(tensors={"input": x}) as traffic:      # in a process started with TRITON_INTERPRET=1
        kernel[grid](x, y, n, BLOCK=1024)
    traffic.lane_bytes, traffic.sector_bytes                   # loads and stores together
    traffic.kernels["kernel"].load_sector_bytes                # by kernel
    traffic.kernels["kernel"].by_argument["x"].lane_bytes      # by argument of that kernel
    traffic.by_tensor["input"].sector_bytes                    # by tensor, over all kernels

Two figures, both exact and reproducible for the given inputs:

lane bytes     unmasked lanes x element size: the bytes requested. Lanes of one load or store that share an address count
               once: a GPU reads the element once and hands it to all of them.
sector bytes   distinct sectors (32 bytes, the smallest memory transfer of a GPU) that one load or store touches in one program,
               x 32: the memory traffic if nothing stays in a cache between two instructions. More than the lane bytes if
               accesses are strided or masked within a sector.

Not modelled: caches (a sector that two instructions or two programs touch counts twice; a GPU's L2 may serve the second),
registers, shared memory, time. Whether an access becomes a wide instruction depends on the compiler: see ``compiled_code.py``. An
atomic operation counts as a load and a store of its lanes.
"""

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rplib.errors import UserError

OTHER = "other"
SECTOR_BYTES = 32


@dataclass
class Bytes:
    """Bytes of loads and of stores, by lane and by sector."""

    load_lane_bytes: int = 0
    load_sector_bytes: int = 0
    store_lane_bytes: int = 0
    store_sector_bytes: int = 0

    @property
    def lane_bytes(self) -> int:
        """Loads and stores together."""
        return self.load_lane_bytes + self.store_lane_bytes

    @property
    def sector_bytes(self) -> int:
        """Loads and stores together."""
        return self.load_sector_bytes + self.store_sector_bytes

    def _add(self, load: bool, lane_bytes: int, sector_bytes: int) -> None:
        if load:
            self.load_lane_bytes += lane_bytes
            self.load_sector_bytes += sector_bytes
        else:
            self.store_lane_bytes += lane_bytes
            self.store_sector_bytes += sector_bytes


@dataclass
class KernelTraffic(Bytes):
    """All launches of one kernel.

    by_argument: pointer arguments by name ("other": an address within none of them, which is a bug in the kernel unless pointers
    come from elsewhere). Arguments that share memory count under the first of them.
    """

    launches: int = 0
    programs: int = 0
    by_argument: dict[str, Bytes] = field(default_factory=dict)


class Traffic(Bytes):
    """Bytes moved by the kernels inside ``kernel_traffic``.

    kernels: by name, in order of first launch. by_tensor: for each name given to ``kernel_traffic``, and "other". Figures grow
    while the kernels run and stay after the context is left.
    """

    def __init__(self, sector_bytes: int, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.sector_size = sector_bytes
        self.kernels: dict[str, KernelTraffic] = {}
        self.by_tensor = {name: Bytes() for name in (*tensors, OTHER)}
        self._tensors = tensors
        self._named: list[_Span] = []
        self._arguments: list[_Span] = []
        self._kernel = KernelTraffic()
        self._where: dict[str, Any] = {}  # kernel's name -> its code: two kernels may share a name

    @property
    def launches(self) -> int:
        """Total of all kernels."""
        return sum(kernel.launches for kernel in self.kernels.values())

    def _launched(self, function: Any, arguments: Sequence["_Argument"]) -> None:
        """A launch begins: ``arguments`` are its tensors as the caller has them and as the interpreter reads them."""
        name = function.__name__
        code = function.__code__
        if self._where.setdefault(name, code) is not code:
            name = f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        self._kernel = self.kernels.setdefault(name, KernelTraffic())
        self._kernel.launches += 1
        # The interpreter works on copies of tensors on a GPU: the copy's address stands for the tensor's.
        moved = {
            a.given.untyped_storage().data_ptr(): a.read.untyped_storage().data_ptr() - a.given.untyped_storage().data_ptr()
            for a in arguments
        }
        self._arguments = [_Span(*_extent(a.read), a.name) for a in arguments if a.read.numel()]
        self._named = [
            _Span(start + shift, end + shift, name)
            for name, tensor in _flat("", self._tensors)
            if tensor.numel()
            for shift in [moved.get(tensor.untyped_storage().data_ptr(), 0)]
            for start, end in [_extent(tensor)]
        ]

    def _access(self, load: bool, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        mask = np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape)  # some masks come as integers 0 and 1
        touched = np.asarray(addresses[mask], dtype=np.uint64)  # also flattens
        if touched.size == 0:
            return
        lanes, sectors = self._count(touched, size)
        self._add(load, lanes, sectors)
        self._kernel._add(load, lanes, sectors)
        first, last = int(touched.min()), int(touched.max())
        for spans, table in ((self._arguments, self._kernel.by_argument), (self._named, self.by_tensor)):
            holder = _holder(spans, first)
            if holder is not None and last < holder.end:  # nearly always: one instruction, one tensor
                table.setdefault(holder.name, Bytes())._add(load, lanes, sectors)
            else:
                self._share_out(load, touched, size, spans, table)

    def _share_out(self, load: bool, touched: np.ndarray, size: int, spans: Sequence["_Span"], table: dict[str, Bytes]) -> None:
        """Lane by lane, where one instruction touches several tensors or none."""
        rest = touched
        for span in spans:
            inside = (rest >= span.start) & (rest < span.end)
            if inside.any():
                table.setdefault(span.name, Bytes())._add(load, *self._count(rest[inside], size))
                rest = rest[~inside]
        if rest.size:
            table.setdefault(OTHER, Bytes())._add(load, *self._count(rest, size))

    def _count(self, touched: np.ndarray, size: int) -> tuple[int, int]:
        touched = np.unique(touched)
        sectors = touched // np.uint64(self.sector_size)
        if (touched % np.uint64(size)).any():  # unaligned elements may lie across a boundary
            sectors = np.unique(np.concatenate([sectors, (touched + np.uint64(size - 1)) // np.uint64(self.sector_size)]))
        return touched.size * size, (1 + int(np.count_nonzero(np.diff(sectors)))) * self.sector_size


class _Span(NamedTuple):
    """Addresses from start up to, not including, end."""

    start: int
    end: int
    name: str


class _Argument(NamedTuple):
    name: str
    given: Any
    read: Any


@contextmanager
def kernel_traffic(*, sector_bytes: int = SECTOR_BYTES, tensors: Mapping[str, Any] | None = None) -> Iterator[Traffic]:
    """Count loads and stores of every Triton kernel launched inside. Contexts may be nested; each counts everything inside.

    Args:
        sector_bytes: a power of two; 32 on NVIDIA GPUs.
        tensors: name -> tensor, or a list or tuple of tensors, to tell apart what is read and written. What matches none
            is "other". Tensors of different names must not lie within each other's range of memory.

    Raises:
        UserError: TRITON_INTERPRET is not set, a kernel was defined before it was set, Triton's interpreter is not
            supported, or tensors of different names overlap.
    """
    if sector_bytes < 1 or sector_bytes & (sector_bytes - 1):
        raise UserError(f"sector_bytes must be a power of two, got {sector_bytes}.")
    tensors = dict(tensors or {})
    _check_apart(tensors)
    interpreter, jit = _triton()
    traffic = Traffic(sector_bytes, tensors)
    with _hooked(interpreter, jit, traffic):
        yield traffic


def _triton() -> tuple[Any, Any]:
    try:
        import triton
    except ImportError:
        raise UserError("the traffic meter runs kernels in Triton's interpreter, and Triton is not installed.") from None
    if not triton.knobs.runtime.interpret:
        raise UserError(
            "the traffic meter needs Triton's interpreter; start the process with TRITON_INTERPRET=1 in its environment."
        )
    import triton.runtime.interpreter as interpreter
    import triton.runtime.jit as jit

    return interpreter, jit


@contextmanager
def _hooked(interpreter: Any, jit: Any, traffic: Traffic) -> Iterator[None]:
    """Patch the interpreter's memory operations and launches; restored afterwards."""
    try:
        builder = interpreter.interpreter_builder
        executor = interpreter.GridExecutor
        load, store = builder.create_masked_load, builder.create_masked_store  # unmasked ones and descriptors end here too
        swap, atomic = builder.create_atomic_cas, builder.create_atomic_rmw
        init_arguments, set_grid = executor._init_args_hst, builder.set_grid_dim
    except AttributeError as error:
        version = importlib.metadata.version("triton")
        raise UserError(
            f"the traffic meter does not support the interpreter of Triton {version} ({error}); it supports Triton 3.7.1."
        ) from None

    def counted_load(pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        traffic._access(True, pointers.data, _array(mask), _element_size(pointers))
        return load(pointers, mask, *rest, **keywords)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        traffic._access(False, pointers.data, _array(mask), _element_size(pointers))
        return store(pointers, value, mask, *rest, **keywords)

    def counted_swap(pointers: Any, *rest: Any, **keywords: Any) -> Any:
        for is_load in (True, False):
            traffic._access(is_load, pointers.data, np.ones_like(pointers.data, dtype=bool), _element_size(pointers))
        return swap(pointers, *rest, **keywords)

    def counted_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        for is_load in (True, False):
            traffic._access(is_load, pointers.data, _array(mask), _element_size(pointers))
        return atomic(operation, pointers, value, mask, *rest, **keywords)

    def watched_arguments(self: Any, given: Any, given_keywords: Any) -> Any:
        read, read_keywords = init_arguments(self, given, given_keywords)
        pairs = [*zip(self.arg_names, given, read, strict=False)]
        pairs += [(name, value, read_keywords[name]) for name, value in given_keywords.items()]
        arguments = [argument for pair in pairs for argument in _tensor_arguments(*pair)]
        traffic._launched(self.fn, arguments)
        return read, read_keywords

    def watched_grid(*grid: int) -> None:
        traffic._kernel.programs += math.prod(grid)
        set_grid(*grid)

    def refused(self: Any, *_: Any, **__: Any) -> Any:
        raise UserError(
            f"kernel {self.fn.__name__} was defined before TRITON_INTERPRET was set, so it would run uncounted; "
            "set TRITON_INTERPRET=1 before the process starts."
        )

    with ExitStack() as stack:
        for owner, name, replacement in (
            (builder, "create_masked_load", counted_load),
            (builder, "create_masked_store", counted_store),
            (builder, "create_atomic_cas", counted_swap),
            (builder, "create_atomic_rmw", counted_atomic),
            (executor, "_init_args_hst", watched_arguments),
            (builder, "set_grid_dim", watched_grid),
            (jit.JITFunction, "run", refused),
        ):
            stack.enter_context(replaced(owner, name, replacement))
        yield


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Set ``replacement`` on the object or class itself, overriding inherited attributes."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _array(mask: Any) -> np.ndarray:
    """A mask is a handle, or for tensor descriptors an array."""
    return mask if isinstance(mask, np.ndarray) else mask.data


def _element_size(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)  # Triton keeps a bool in a byte


def _tensor_arguments(name: str, given: Any, read: Any) -> Iterator[_Argument]:
    """The tensors of one argument: itself, those of a tuple, or the base of a tensor descriptor or a reinterpreted tensor."""
    if isinstance(given, tuple):
        for n, (one_given, one_read) in enumerate(zip(given, read, strict=True)):
            yield from _tensor_arguments(f"{name}[{n}]", one_given, one_read)
    elif hasattr(given, "untyped_storage"):
        yield _Argument(name, given, read)
    elif hasattr(given, "base"):
        yield from _tensor_arguments(name, given.base, read.base)


def _extent(tensor: Any) -> tuple[int, int]:
    """First address and the one after the last of a tensor of any strides, not empty."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (span + 1) * tensor.element_size()


def _holder(spans: Sequence[_Span], address: int) -> _Span | None:
    return next((span for span in spans if span.start <= address < span.end), None)


def _flat(name: str, tensors: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a mapping whose values are tensors or sequences of them."""
    if isinstance(tensors, Mapping):
        for key, value in tensors.items():
            yield from _flat(key, value)
    elif isinstance(tensors, list | tuple):
        for value in tensors:
            yield from _flat(name, value)
    elif hasattr(tensors, "untyped_storage"):
        yield name, tensors
    elif tensors is not None:
        raise UserError(f"tensors[{name!r}] must be a tensor or a list of tensors, got {type(tensors).__name__}.")


def _check_apart(tensors: Mapping[str, Any]) -> None:
    if OTHER in tensors:
        raise UserError(f"tensors: the name {OTHER!r} is taken by what matches no tensor; choose another.")
    spans = sorted(_Span(*_extent(tensor), name) for name, tensor in _flat("", tensors) if tensor.numel())
    reach: dict[str, int] = {}
    for span in spans:
        for name, end in reach.items():
            if name != span.name and span.start < end:
                raise UserError(
                    f"tensors: {name!r} and {span.name!r} share a range of memory, so their bytes cannot be separated; "
                    "give them one name or copy one of them."
                )
        reach[span.name] = max(reach.get(span.name, 0), span.end)
