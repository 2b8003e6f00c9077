"""Compile a Triton kernel without its target GPU, and read its resource usage from the machine code.

Works for any ``@triton.jit`` function. NVIDIA code is disassembled with the tools in the Triton package; AMD assembly
has resource usage as metadata.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rplib.errors import UserError

WIDE_BITS = 128


@dataclass(frozen=True)
class Target:
    """A GPU architecture, with the vendor's name for it."""

    name: str
    backend: str
    architecture: int | str
    warp_size: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32),
        Target("sm_90", "cuda", 90, 32),
        Target("sm_100", "cuda", 100, 32),
        Target("gfx942", "hip", "gfx942", 64),
    )
}


@dataclass(frozen=True)
class Resources:
    """Resource usage of one compiled kernel.

    registers: per thread (AMD: vector and accumulation registers together). spills: to memory; NVIDIA: loads and stores of the
    stack in the code; AMD: spilled vector registers. scalar_spills: AMD's scalar registers kept in lanes of a vector register
    (no memory access). stack_bytes: per thread; on NVIDIA a frame may be reserved and never used, so this alone is not a
    spill. shared_bytes: shared memory per program. loads: bits per thread -> number of global load instructions in the code;
    stores: the same for stores.
    """

    registers: int
    spills: int
    scalar_spills: int
    stack_bytes: int
    shared_bytes: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]

    @property
    def load_count(self) -> int:
        return sum(self.loads.values())

    @property
    def wide_load_share(self) -> float | None:
        """Fraction of global load instructions that are at least 128 bits wide; None without loads."""
        if not self.load_count:
            return None
        return sum(n for bits, n in self.loads.items() if bits >= WIDE_BITS) / self.load_count


def compile_for(
    target: Target,
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    attrs: Mapping[tuple[int], list[list[Any]]],
    **options: Any,
) -> Resources:
    """Compile a kernel and read its resources.

    Args:
        target: one of `TARGETS`.
        kernel: a function decorated with ``@triton.jit``.
        signature: argument -> type as Triton writes it (``"*fp32"``, ``"i32"``, ``"constexpr"``).
        constexprs: argument -> value of the constants.
        attrs: ``{(position,): [["tt.divisibility", 16]]}`` for arguments known to be divisible; the only way to pass
            alignment to the compiler, without which no load is 128 bits wide.
        **options: of the compilation, such as ``num_warps=4`` or ``maxnreg=32``.

    Raises:
        UserError: this process runs Triton's interpreter, which replaces the compiler.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise UserError("TRITON_INTERPRET is set, so there is no compiler in this process; unset it and restart.")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, dict(signature), dict(constexprs), dict(attrs))
    gpu = GPUTarget(target.backend, target.architecture, target.warp_size)
    compiled = triton.compile(source, target=gpu, options=options)
    shared = int(compiled.metadata.shared)
    if target.backend == "cuda":
        return read_cubin(compiled.asm["cubin"], shared)
    return read_amdgcn(compiled.asm["amdgcn"], shared)


def read_cubin(cubin: bytes, shared_bytes: int = 0) -> Resources:
    """Resources of NVIDIA machine code; dynamic shared memory is not recorded there and is passed by the caller."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    figures = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if figures is None:
        raise UserError(f"cuobjdump shows no register count; Triton's package may have changed. It said: {usage[-300:]}")
    registers, stack, static_shared, local = map(int, figures.groups())
    return Resources(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        scalar_spills=0,
        stack_bytes=stack + local,
        shared_bytes=shared_bytes + static_shared,
        loads=_widths_in_sass(code, "LDG"),
        stores=_widths_in_sass(code, "STG"),
    )


def read_amdgcn(assembly: str, shared_bytes: int = 0) -> Resources:
    """Resources of AMD assembly text."""

    def figure(name: str) -> int:
        found = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise UserError(f"the AMD assembly has no .{name}; Triton's output may have changed.")
        return int(found.group(1))

    return Resources(
        registers=figure("vgpr_count"),  # on gfx90a and later the accumulation registers are part of it
        spills=figure("vgpr_spill_count"),
        scalar_spills=figure("sgpr_spill_count"),
        stack_bytes=figure("private_segment_fixed_size"),
        shared_bytes=max(shared_bytes, figure("group_segment_fixed_size")),
        loads=_widths_in_amdgcn(assembly, "load"),
        stores=_widths_in_amdgcn(assembly, "store"),
    )


def _cuobjdump(option: str, path: str) -> str:
    from triton import knobs

    done = subprocess.run([knobs.nvidia.cuobjdump.path, option, path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"cuobjdump {option} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _widths_in_sass(code: str, mnemonic: str) -> dict[int, int]:
    """LDG.E.128, LDG.E.U16.CONSTANT, LDG.E (32 bits) ... -> bits: count."""
    counts: dict[int, int] = {}
    for modifiers in re.findall(rf"\b{mnemonic}((?:\.\w+)*)", code):
        width = re.search(r"\.[USB]?(8|16|64|128|256)\b", modifiers)
        bits = int(width.group(1)) if width else 32
        counts[bits] = counts.get(bits, 0) + 1
    return counts


def _widths_in_amdgcn(assembly: str, what: str) -> dict[int, int]:
    """global_load_dwordx4, buffer_load_ushort ... -> bits: count."""
    named = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}
    counts: dict[int, int] = {}
    for kind in re.findall(rf"^\s*(?:global|buffer|flat)_{what}_(\w+)", assembly, re.MULTILINE):
        multiple = re.match(r"dwordx(\d)", kind)
        base = re.match(r"[a-z]+", kind)
        bits = 32 * int(multiple.group(1)) if multiple else named.get(base.group() if base else "", 0)
        if not bits:
            raise UserError(f"unknown AMD instruction {what}_{kind}; its width has to be added to compiled_code.py.")
        counts[bits] = counts.get(bits, 0) + 1
    return counts
