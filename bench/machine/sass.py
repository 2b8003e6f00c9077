"""Machine code (SASS) of the executed PTX: which of its instructions ran, and how often.

The machine executes PTX; the GPU executes the machine code that ptxas generates from it. ptxas writes a table of lines from the
``.loc`` directives of the PTX. Here every PTX instruction gets a ``.loc`` with its own line, so every SASS instruction refers to
the PTX instruction that it came from. The code itself stays the same, which is checked. A basic block of SASS is then counted
as often as most of its PTX instructions were executed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rplib.bench.machine.driver import Ran
from rplib.errors import UserError

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LINE = re.compile(r'\s*//## File "[^"]*", line (\d+)')
_LABEL = re.compile(r"(\.L_\w+):")
_ENDS = re.compile(r"\b(BRA|BRX|JMP|EXIT|RET|BSYNC|CALL)\b")


@dataclass(frozen=True)
class MachineInstruction:
    """One SASS instruction; line: of the PTX instruction that it came from; block: number of its basic block."""

    address: int
    text: str
    line: int
    block: int

    @property
    def opcode(self) -> str:
        """Without guard and modifiers.

        >>> MachineInstruction(0, "@!P0 LDG.E.128 R4, desc[UR4][R2.64]", 1, 0).opcode
        'LDG'
        """
        return re.sub(r"^@!?U?P[0-9T]+\s+", "", self.text).split()[0].partition(".")[0]


def machine_code(ptx: str, cubin: bytes, architecture: int) -> list[MachineInstruction]:
    """The instructions of a compiled kernel, each with the line of the PTX that it came from.

    Raises:
        UserError: with these lines, ptxas generates different code than for Triton.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    numbered = _numbered(ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / name for name in ("lines.ptx", "lines.cubin", "triton.cubin"))
        source.write_text(numbered)
        theirs.write_bytes(cubin)
        name = sm_arch_from_capability(architecture)
        _run(
            get_ptxas(architecture).path, "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={name}", str(source), "-o", str(ours)
        )
        text = _run(knobs.nvidia.nvdisasm.path, "-g", "-c", str(ours))
        before = _run(knobs.nvidia.nvdisasm.path, "-c", str(theirs))
    found = list(_instructions(text))
    if [i.text for i in found] != [i.text for i in _instructions(before)]:
        raise UserError("ptxas generates different machine code than for Triton (are options for ptxas set?).")
    return found


def executed(code: list[MachineInstruction], ran: Ran) -> Counter[str]:
    """Opcode -> executions by a warp in this launch, as far as the line table tells."""
    found: Counter[str] = Counter()
    for instruction, warps in executions(code, ran):
        found[instruction.opcode] += warps
    return found


def executions(code: list[MachineInstruction], ran: Ran) -> list[tuple[MachineInstruction, int]]:
    """Every instruction with its executions by a warp."""
    counts = ran.counts.executed
    of_line = {ins.line: counts[n] for n, block in enumerate(ran.program.kernel.blocks) for ins in block}
    blocks: dict[int, list[MachineInstruction]] = {}
    for instruction in code:
        blocks.setdefault(instruction.block, []).append(instruction)
    found = []
    for members in blocks.values():
        votes = Counter(of_line.get(i.line, 0) for i in members)
        warps = max(votes, key=lambda n: (votes[n], n))
        found += [(i, warps) for i in members]
    return found


def _numbered(ptx: str) -> str:
    """The PTX with a ``.loc`` with its own line before every instruction, and no others."""
    out, depth = [], 0
    for number, line in enumerate(ptx.splitlines(), start=1):
        text = line.partition("//")[0].strip()
        if re.match(r"\.loc\s", text):
            continue
        depth += text.count("{") - text.count("}") if text in ("{", "}") else 0
        if depth == 1 and text.endswith(";") and not text.startswith("."):
            out.append(f"\t.loc 1 {number} 1")
        out.append(line)
    return "\n".join(out) + "\n"


def _instructions(text: str) -> "list[MachineInstruction]":
    found, line, block, fresh = [], 0, 0, False
    for row in text.splitlines():
        if location := _LINE.match(row):
            line = int(location.group(1))
        elif _LABEL.match(row):
            fresh = True
        elif instruction := _INSTRUCTION.match(row):
            if fresh:
                block, fresh = block + 1, False
            body = re.sub(r"`\(\.L_\w+\)", "label", instruction.group(2))
            if body.split()[0] != "NOP":
                found.append(MachineInstruction(int(instruction.group(1), 16), body, line, block))
            fresh = bool(_ENDS.search(body))
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout
