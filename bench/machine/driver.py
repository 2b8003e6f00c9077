"""A Triton driver whose launches run on this machine instead of a GPU."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from rplib.bench.machine.counts import Counts
from rplib.bench.machine.execution import Launch, parameters_of
from rplib.bench.machine.findings import Finding, Findings
from rplib.bench.machine.memory import GlobalMemory
from rplib.bench.machine.program import Program
from rplib.bench.machine.ptx import BITS, Unsupported, parse
from rplib.bench.machine.tensors import Tensors
from rplib.errors import UserError

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability (times ten) -> bytes of shared memory that a block may have."""

_SCALARS = {f"{sign}{bits}": f"{sign}{bits // 8}" for sign in "iu" for bits in (8, 16, 32, 64)}
_SCALARS |= {"i1": "i1", "u1": "u1", "fp16": "f2", "fp32": "f4", "f32": "f4", "fp64": "f8", "f64": "f8"}
"""Triton's types of numbers -> numpy's."""


@dataclass
class Ran:
    """One executed launch; see `Counts` for its counts.

    ptx, cubin: the compiled code. shared: bytes of shared memory per block. sectors: argument -> distinct 32-byte sectors
    (loaded, stored); arguments that share memory are joined by "=".
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
        """Bytes of all distinct sectors loaded, plus those stored: the minimum that the memory must move."""
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
    """The record of `compiled`. launches: in order. findings: of all launches."""

    architecture: int
    launches: list[Ran] = field(default_factory=list)
    _findings: Findings = field(default_factory=Findings)
    _programs: dict[str, Program] = field(default_factory=dict)
    _tensors: Tensors = field(default_factory=Tensors)

    @property
    def findings(self) -> list[Finding]:
        """Violations of the rules of memory, barriers and warps. Empty for a correct kernel."""
        return self._findings.violations

    @property
    def notes(self) -> list[Finding]:
        """Observations that violate no rule but may be of interest."""
        return self._findings.notes

    def clear(self) -> None:
        """Discard all launches and findings so far."""
        self.launches, self._findings = [], Findings()

    def _launch(self, loaded: Any, signature: dict[str, Any], metadata: Any, grid: tuple[int, int, int], arguments: Any) -> None:
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise Unsupported(f"{metadata.name}: scratch memory or clusters of blocks")
        named = list(_flat(signature, arguments))
        for name, type, _ in named:
            if not type.startswith("*") and type not in _SCALARS:
                raise Unsupported(f"{metadata.name}: argument {name} of type {type}")
        values = [(name, value, _SCALARS.get(type, "u8")) for name, type, value in named]
        values += [("scratch memory", 0, "u8")] * 2
        self._run(loaded, grid, 32 * metadata.num_warps, metadata.shared, values)

    def _run(
        self, loaded: Any, grid: tuple[int, int, int], threads: int, shared: int, values: list[tuple[str, Any, str]]
    ) -> None:
        """values: (name, tensor or number, numpy type of a number)."""
        if loaded.ptx not in self._programs:
            self._programs[loaded.ptx] = Program(parse(loaded.ptx))
        program = self._programs[loaded.ptx]
        allocations = self._tensors.allocations([(name, v) for name, v, _ in values if isinstance(v, torch.Tensor)])
        numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v for _, v, _ in values]
        parameters = parameters_of(program.kernel, numbers, [kind for _, _, kind in values])
        memory = GlobalMemory(allocations)
        counts = Launch(program, parameters, grid, threads, shared, memory, self._findings).run()
        self._tensors.written(allocations)
        sectors = {"=".join(a.names): (int(a.loaded_sectors.sum()), int(a.stored_sectors.sum())) for a in memory.allocations}
        ran = Ran(program.kernel.name, grid, threads // 32, shared, counts, program, loaded.ptx, loaded.cubin, sectors)
        self.launches.append(ran)


def execute(
    ptx: str, grid: tuple[int, int, int], arguments: Sequence[torch.Tensor | int], *, shared: int = 0, empty: Sequence[int] = ()
) -> Session:
    """Run the text of one kernel, without Triton.

    Args:
        ptx: with ``.reqntid``, a multiple of 32 threads.
        grid: blocks along x, y and z.
        arguments: a CPU tensor per pointer, an integer per other parameter.
        shared: bytes of shared memory of a block, which the kernel calls ``global_smem``.
        empty: positions of arguments that hold no values yet; they are overwritten.

    >>> doubled = torch.arange(64.0)
    >>> ran = execute('''
    ... .visible .entry doubling(.param .u64 doubling_param_0)
    ... .reqntid 32
    ... {
    ...   .reg .b32 %r<4>; .reg .b64 %rd<4>;
    ...   ld.param.b64 %rd1, [doubling_param_0];
    ...   mov.u32 %r1, %tid.x;
    ...   mul.wide.u32 %rd2, %r1, 4;
    ...   add.s64 %rd3, %rd1, %rd2;
    ...   ld.global.b32 %r2, [%rd3+128];
    ...   add.f32 %r3, %r2, %r2;
    ...   st.global.b32 [%rd3+128], %r3;
    ...   ret;
    ... }''', (1, 1, 1), [doubled])
    >>> doubled[30:34].tolist(), ran.findings, ran.launches[0].sectors
    ([30.0, 31.0, 64.0, 66.0], [], {'0': (4, 4)})
    """
    session = Session(0)
    kernel = parse(ptx)
    if kernel.threads is None or kernel.threads % 32:
        raise Unsupported(f"{kernel.name} must state its threads (.reqntid), a multiple of 32; it states {kernel.threads}")
    for n in empty:
        session._tensors.made_empty(arguments[n])  # type: ignore[arg-type]
    values = []
    for n, (value, type) in enumerate(zip(arguments, kernel.parameters.values(), strict=True)):
        values.append((str(n), value, f"{'i' if type[0] == 's' else 'u'}{BITS[type] // 8}"))
    session._run(SimpleNamespace(ptx=ptx, cubin=b""), grid, kernel.threads, shared, values)
    return session


@contextmanager
def compiled(architecture: int = 90) -> Iterator[Session]:
    """Inside, ``kernel[grid](...)`` on CPU tensors compiles for a GPU of this architecture and runs here.

    Tensors that ``torch.empty``, ``torch.empty_like``, ``torch.empty_strided`` and ``Tensor.new_empty`` make inside hold
    undefined values until a kernel, or the host, writes them.

    Args:
        architecture: 80, 90 or 100, the compute capability times ten.

    Raises:
        UserError: this process runs Triton's interpreter, or the architecture is not one of these.
        Unsupported: (at a launch) the compiled kernel has something that the machine does not support.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture is {architecture}; expected one of {', '.join(map(str, ARCHITECTURES))}.")
    import triton

    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so there is no compiler in this process; unset it and restart.")
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
        return session._tensors.made_empty(make(*arguments, **keywords))

    return made


def _driver(session: Session, stack: ExitStack) -> Any:
    """The driver that Triton uses for everything: devices, compilation targets, loading and launching."""
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
            _current(session)._launch(loaded, self.signature, self.metadata, (x, y, z), rest[4:])  # after metadata and hooks

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
            return session.architecture  # Triton caches compiled kernels by device

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is timed on this machine")

    _SESSIONS[session.architecture] = session
    return Driver()


_SESSIONS: dict[int, Session] = {}  # kernels that Triton has cached belong to an architecture, not to a session


def _current(session: Session) -> Session:
    return _SESSIONS[session.architecture]


def _flat(signature: Any, arguments: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of the arguments of the compiled kernel: tuples are flattened, constants omitted."""
    named = signature.items() if isinstance(signature, dict) else ((str(n), type) for n, type in enumerate(signature))
    for (name, type), value in zip(named, arguments, strict=True):
        if isinstance(type, tuple):
            yield from _flat(type, value, f"{prefix}{name}.")
        elif type != "constexpr":
            yield prefix + name, re.sub(r"^\*k?", "*", type), value
