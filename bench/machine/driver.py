"""Triton's own way to a launch, with this machine at its end instead of a GPU."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from rplib.bench.machine.counts import Counts
from rplib.bench.machine.execution import Launch, parameters_of
from rplib.bench.machine.findings import Finding, Findings
from rplib.bench.machine.memory import Allocation, GlobalMemory
from rplib.bench.machine.program import Program
from rplib.bench.machine.ptx import Unsupported, parse
from rplib.errors import UserError

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability (times ten) -> bytes of shared memory that a block may have."""

_POISON = 0xD7  # every byte of memory that nothing has written
_SCALARS = {"i1": "i1", "u1": "u1", "i8": "i1", "u8": "u1", "i16": "i2", "u16": "u2", "i32": "i4", "u32": "u4", "i64": "i8", "u64": "u8",
            "fp16": "f2", "fp32": "f4", "f32": "f4", "fp64": "f8", "f64": "f8"}  # fmt: skip


@dataclass
class Ran:
    """One launch as it ran: see `Counts` for what it did. ptx, cubin: what was compiled; shared: bytes of a block's shared memory.

    sectors: names of arguments that lie in one piece of memory, joined by "=" -> different 32-byte sectors (loaded, stored).
    """

    name: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    counts: Counts
    program: Program
    ptx: str
    cubin: bytes
    sectors: dict[str, tuple[int, int]]

    @property
    def different_bytes(self) -> int:
        """Of all sectors that the launch touched, loads and stores once each: what the memory must move at least."""
        return 32 * sum(loaded + stored for loaded, stored in self.sectors.values())

    @property
    def instructions(self) -> dict[str, int]:
        """Opcode -> executions by a warp."""
        found: dict[str, int] = {}
        for number, warps in self.counts.executed.items():
            for ins in self.program.kernel.blocks[number]:
                found[ins.opcode] = found.get(ins.opcode, 0) + warps
        return found


@dataclass
class Session:
    """What happened inside `compiled`. launches: in order. findings: of all launches."""

    architecture: int
    launches: list[Ran] = field(default_factory=list)
    _findings: Findings = field(default_factory=Findings)
    _programs: dict[str, Program] = field(default_factory=dict)
    _empty: dict[int, tuple[torch.Tensor, np.ndarray]] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """Violations of the rules of memory, barriers and warps. Empty for a correct kernel."""
        return self._findings.violations

    @property
    def notes(self) -> list[Finding]:
        """What breaks no rule and may be worth a look."""
        return self._findings.notes

    def clear(self) -> None:
        """Forget launches and findings so far."""
        self.launches, self._findings = [], Findings()

    def _program(self, ptx: str) -> Program:
        if ptx not in self._programs:
            self._programs[ptx] = Program(parse(ptx))
        return self._programs[ptx]

    def _made_empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill new memory with a pattern and remember that it holds no value."""
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.untyped_storage().nbytes():
            memory = _bytes(tensor)
            memory[:] = _POISON
            # The tensor is kept: memory that was freed and used again would be taken for undefined.
            self._empty[tensor.untyped_storage().data_ptr()] = tensor, np.zeros(len(memory), bool)
        return tensor

    def _allocations(self, tensors: list[tuple[str, torch.Tensor]]) -> tuple[list[Allocation], list[tuple[Allocation, np.ndarray]]]:
        """Arguments -> memory, one piece per storage; and the pieces that began without values, with their masks by bytes."""
        groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            if tensor.numel():
                groups.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        made, undefined = [], []
        for start, members in groups.items():
            place = min(t.element_size() for _, t in members)
            memory = _bytes(members[0][1])
            allowed = np.zeros(len(memory) // place, bool)
            for _, t in members:
                _elements(allowed, t, place)
            a = Allocation(tuple(n for n, _ in members), start, memory, place, None if allowed.all() else allowed)
            if start in self._empty:
                mask = self._empty[start][1]
                mask |= memory != _POISON  # written by the host meanwhile
                a.defined = mask[: len(mask) // place * place].reshape(-1, place).any(1)
                undefined.append((a, mask))
            made.append(a)
        return made, undefined

    def _launch(self, loaded: Any, signature: dict[str, Any], metadata: Any, grid: tuple[int, int, int], arguments: Any) -> None:
        program = self._program(loaded.ptx)
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise Unsupported(f"{program.kernel.name}: scratch memory or clusters of blocks")
        values, numpy_types, tensors = [], [], []
        for name, type, value in _flat(signature, arguments):
            if type.startswith("*"):
                tensors.append((name, value))
                values.append(value.data_ptr())
                numpy_types.append("u8")
            elif type in _SCALARS:
                values.append(value)
                numpy_types.append(_SCALARS[type])
            else:
                raise Unsupported(f"{program.kernel.name}: argument {name} of type {type}")
        values += [0, 0]  # scratch memory
        numpy_types += ["u8", "u8"]
        allocations, undefined = self._allocations(tensors)
        parameters = parameters_of(program.kernel, values, numpy_types)
        memory = GlobalMemory(allocations)
        launch = Launch(program, parameters, grid, 32 * metadata.num_warps, metadata.shared, memory, self._findings)
        counts = launch.run()
        for a, mask in undefined:
            assert a.defined is not None
            mask[: len(a.defined) * a.place] |= np.repeat(a.defined, a.place)
        sectors = {"=".join(a.names): (int(a.loaded_sectors.sum()), int(a.stored_sectors.sum())) for a in memory.allocations}
        ran = Ran(launch.name, grid, metadata.num_warps, metadata.shared, counts, program, loaded.ptx, loaded.cubin, sectors)
        self.launches.append(ran)


@contextmanager
def compiled(architecture: int = 90) -> Iterator[Session]:
    """Inside, ``kernel[grid](...)`` on CPU tensors compiles for a GPU of this architecture and runs on this machine.

    Tensors that ``torch.empty``, ``torch.empty_like``, ``torch.empty_strided`` and ``Tensor.new_empty`` make inside hold undefined
    values until a kernel, or the host, writes them.

    Args:
        architecture: 80, 90 or 100, the compute capability times ten.

    Raises:
        UserError: this process runs Triton's interpreter, or the architecture is not one of these.
        Unsupported: (at a launch) the compiled kernel holds something that the machine does not know.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture is {architecture}; expected one of {', '.join(map(str, ARCHITECTURES))}.")
    import triton

    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so there is no compiler in this process; unset it and start again.")
    session = Session(architecture)
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        driver = _driver(session, stack)
        triton.runtime.driver.set_active(driver)
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, _tracked(getattr(owner, name), session)))
        yield session


def _tracked(make: Any, session: Session) -> Any:
    def made(*arguments: Any, **keywords: Any) -> Any:
        return session._made_empty(make(*arguments, **keywords))

    return made


def _driver(session: Session, stack: ExitStack) -> Any:
    """The driver that Triton asks for everything: devices, compilers' targets, how to load and to launch."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    loading = SimpleNamespace(ptx="")

    def about_to_load(module: Any, function: Any, name: str, group: dict[str, str], hash: str) -> None:
        (path,) = (path for file, path in group.items() if file.endswith(".ptx"))
        with open(path) as file:
            loading.ptx = file.read()

    knobs.runtime.kernel_load_start_hook.add(about_to_load)
    stack.callback(knobs.runtime.kernel_load_start_hook.remove, about_to_load)

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.signature, self.metadata = source.signature, metadata

        def __call__(self, x: int, y: int, z: int, stream: Any, loaded: Any, *rest: Any) -> None:
            _, _, enter, leave, *arguments = rest
            _current(session)._launch(loaded, self.signature, self.metadata, (x, y, z), arguments)

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.launcher_cls = Launcher
            self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

        @staticmethod
        def _load(name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
            return object(), SimpleNamespace(ptx=loading.ptx, cubin=cubin), 0, 0, 1024

        @staticmethod
        def _properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": ARCHITECTURES[session.architecture], "multiprocessor_count": 132, "warpSize": 32}

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, type: str) -> str:
            return type

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", session.architecture, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return session.architecture  # Triton keeps what it has compiled by device

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is timed on this machine")

    _SESSIONS[session.architecture] = session
    return Driver()


_SESSIONS: dict[int, Session] = {}  # kernels that Triton has kept belong to an architecture, not to a session


def _current(session: Session) -> Session:
    return _SESSIONS[session.architecture]


def _flat(signature: Any, arguments: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of what reaches the compiled kernel; tuples are taken apart, constants are left out."""
    named = signature.items() if isinstance(signature, dict) else ((str(n), type) for n, type in enumerate(signature))
    for (name, type), value in zip(named, arguments, strict=True):
        if isinstance(type, tuple):
            yield from _flat(type, value, f"{prefix}{name}.")
        elif type != "constexpr":
            yield prefix + name, re.sub(r"^\*k?", "*", type), value


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage of a tensor, as it is."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _elements(mask: np.ndarray, tensor: torch.Tensor, place: int) -> None:
    """Set the places of a storage that belong to elements of the tensor."""
    flags = torch.from_numpy(mask)
    wide = tensor.element_size() // place
    start = tensor.storage_offset() * wide
    if tensor.is_contiguous():
        flags[start : start + tensor.numel() * wide] = True
        return
    sizes, strides = [*tensor.shape, wide], [*(s * wide for s in tensor.stride()), 1]
    torch.as_strided(flags, sizes, strides, start).fill_(True)
