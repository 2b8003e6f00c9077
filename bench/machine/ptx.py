"""The text of one PTX kernel -> parameters, registers, basic blocks of instructions. Nothing is executed here.

>>> kernel = parse('''
... .visible .entry twice(.param .u64 twice_param_0)
... .reqntid 32
... {
...   .reg .b32 %r<3>;
...   mov.u32 %r1, %tid.x;
...   shl.b32 %r2, %r1, 1;
...   ret;
... }''')
>>> kernel.name, kernel.threads, [str(i) for i in kernel.blocks[0]]
('twice', 32, ['mov.u32 %r1, %tid.x', 'shl.b32 %r2, %r1, 1', 'ret'])
"""

import math
import re
from dataclasses import dataclass, field

BITS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)} | {"f32": 32, "f64": 64}
"""Bits of a register class or of the type of an instruction, packed and short floats apart."""


class Unsupported(Exception):  # noqa: N818
    """Something in the PTX that the machine does not support. Nothing is ever skipped silently."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; operands are texts, a vector operand is a tuple of texts.

    line: of the PTX, from 1. source: where it comes from, as the compiler says, such as ``kernels.py:12:8``.
    """

    opcode: str
    operands: tuple[str | tuple[str, ...], ...]
    guard: str | None
    negated: bool
    line: int
    source: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def ends_block(self) -> bool:
        """A branch, a return, or a barrier of the thread block."""
        return self.base in _ENDS_BLOCK and not self.opcode.startswith("bar.warp")

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        operands = ", ".join(o if isinstance(o, str) else "{" + ", ".join(o) + "}" for o in self.operands)
        return f"{guard}{self.opcode} {operands}".strip()


@dataclass
class Kernel:
    """blocks: basic blocks in the order of the text; the last instruction of each may be a branch, a return or a barrier.
    labels: name -> number of the block that follows. registers: prefix such as ``%r`` -> class such as ``b32``."""

    name: str
    parameters: dict[str, str]
    threads: int | None
    registers: dict[str, str] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)


_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+(\w+)")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|align\s+\d+)\s+)*(\w+)$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>$")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_LABEL = re.compile(r"(\$?\w+):\s*")
# A frame of local memory is harmless while nothing refers to it, and so is a constant that libdevice leaves behind.
_HARMLESS = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+__local_depot\w*\[\d+\]$|\.reg\s+\.b64\s+%SPL?$|\.pragma\b")
_UNUSED_CONSTANT = re.compile(r"\.global\s+\.align\s+1\s+\.b8\s+_\$_str")
_ENDS_BLOCK = {"bra", "ret", "exit", "bar", "barrier"}


def parse(text: str) -> Kernel:
    """Parse the only kernel in ``text``.

    Raises:
        Unsupported: it contains no kernel, several, or something that is not supported.
    """
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines) if _ENTRY.match(line.strip())]
    if len(starts) != 1 or any(re.match(r"\s*(?:\.visible\s+|\.weak\s+)?\.func\b", line) for line in lines):
        raise Unsupported(f"the PTX must hold one kernel and no other function; it holds {len(starts)} kernels")
    for line in lines[: starts[0]]:
        if re.match(r"\s*\.(global|const|shared)\b", line) and not _UNUSED_CONSTANT.match(line.strip()):
            raise Unsupported(f"variable of the module: {line.strip()}")
    kernel, body = _head(lines, starts[0])
    _body(kernel, lines, body)
    return kernel


def _head(lines: list[str], start: int) -> tuple[Kernel, int]:
    """The kernel with its parameters, and the line where its body begins."""
    body = next((n for n in range(start, len(lines)) if "{" in _plain(lines[n])), None)
    entry = _ENTRY.match(lines[start].strip())
    if entry is None or body is None:
        raise Unsupported(f"line {start + 1}: {lines[start]}")
    kernel = Kernel(entry.group(1), {}, None)
    text = " ".join(map(_plain, lines[start:body])).strip()
    inside, _, directives = text[text.find("(") + 1 :].partition(")") if "(" in text else ("", "", "")
    for parameter in filter(None, map(str.strip, inside.split(","))):
        if not (found := _PARAMETER.match(parameter)) or found.group(1) not in BITS:
            raise Unsupported(f"parameter of {kernel.name}: {parameter}")
        kernel.parameters[found.group(2)] = found.group(1)
    for name, value in re.findall(r"\.(\w+)\s+([\d,\s]+)", directives):
        if name in ("reqntid", "maxntid"):
            kernel.threads = math.prod(int(n) for n in value.split(",") if n.strip())
        elif name not in ("minnctapersm", "maxnreg"):
            raise Unsupported(f"directive of {kernel.name}: .{name}")
    return kernel, body


def _body(kernel: Kernel, lines: list[str], start: int) -> None:
    source, pending = "", ""
    for n in range(start, len(lines)):
        if location := re.match(r"\s*\.loc\s+[^/]*//\s*(.*?)\s*$", lines[n]):
            source = location.group(1)
        text = _plain(lines[n]).strip()
        if n == start:
            text = text.removeprefix("{").strip()
        if text == "}" and not pending:
            return
        if not text or re.match(r"\.(loc|file)\s", text):
            continue
        while label := _LABEL.match(text) if not pending else None:
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[label.group(1)] = len(kernel.blocks) - 1
            text = text[label.end() :]
        pending += " " + text
        *statements, pending = pending.split(";")
        pending = pending.strip()
        for statement in filter(None, map(str.strip, statements)):
            _statement(kernel, statement, n + 1, source)
    raise Unsupported(f"kernel {kernel.name} does not end")


def _statement(kernel: Kernel, text: str, line: int, source: str) -> None:
    if registers := _REGISTERS.match(text):
        if registers.group(1) not in BITS:
            raise Unsupported(f"line {line}: registers of class {registers.group(1)}")
        kernel.registers[registers.group(2)] = registers.group(1)
        return
    if _HARMLESS.match(text):
        return
    found = _STATEMENT.match(text)
    if found is None or "{" in (text[:1], text.strip()[-1:]):
        raise Unsupported(f"line {line}: {text}")
    negated, guard, opcode, operands = found.groups()
    instruction = Instruction(opcode, _operands(operands), guard, bool(negated), line, source)
    kernel.blocks[-1].append(instruction)
    if instruction.ends_block:
        kernel.blocks.append([])


def _operands(text: str) -> tuple[str | tuple[str, ...], ...]:
    """Split at the commas outside braces and brackets."""
    pieces = [p.strip() for p in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{\[\s][^,{\[]*", text)]
    return tuple(tuple(x.strip() for x in p[1:-1].split(",")) if p.startswith("{") else p for p in pieces)


def _plain(line: str) -> str:
    return line.partition("//")[0]
