"""Instructions as functions: a parsed kernel becomes a `Program`, or raises `Unsupported` before anything runs."""

import re
from functools import partial
from typing import Any

import numpy as np

from rplib.bench.machine import access, warp
from rplib.bench.machine.alu import Rule, decode, of_three
from rplib.bench.machine.execution import Chunk, End, Step, barrier, branch, fall
from rplib.bench.machine.memory import SHARED_BASE
from rplib.bench.machine.ptx import Instruction, Kernel, Unsupported
from rplib.bench.machine.registers import Halves, as_type, halves, meet, simplified, storage, to_bits


class Program:
    """A kernel with its instructions as functions. Anything not supported raises `Unsupported` here, before anything runs."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.classes: list[Any] = []  # numpy type of every slot
        self.constants: list[tuple[int, np.ndarray]] = []
        self.smallest_shared_access = 16
        self._slots: dict[tuple[str, Any], int] = {}
        self.blocks = [self._block(number) for number in range(len(kernel.blocks))]

    def register(self, name: str | tuple[str, ...]) -> int:
        """Slot of a register."""
        known = isinstance(name, str) and re.fullmatch(r"(%[a-z]+)\d+", name)
        if not known or known.group(1) not in self.kernel.registers:
            raise Unsupported(f"operand {name} where a register is expected")
        return self._slot((str(name), None), storage(self.kernel.registers[known.group(1)]))

    def operand(self, text: str | tuple[str, ...], type: str) -> int:
        """Slot of a register or of a constant of this type."""
        if isinstance(text, str) and text.startswith("%"):
            return self.register(text)
        container = storage(type) if type == "pred" or type[1:].isdigit() else storage("b" + _digits(type))
        value = SHARED_BASE if text == "global_smem" else _literal(text)
        bits = np.array([value & (2 ** (8 * np.dtype(container).itemsize) - 1)], np.uint64).astype(container)
        return self._slot((str(text), np.dtype(container)), container, bits)

    def _slot(self, key: tuple[str, Any], container: Any, constant: np.ndarray | None = None) -> int:
        if key not in self._slots:
            self._slots[key] = len(self.classes)
            self.classes.append(container)
            if constant is not None:
                self.constants.append((self._slots[key], constant))
        return self._slots[key]

    def _block(self, number: int) -> tuple[list[Step], End]:
        steps, instructions = [], self.kernel.blocks[number]
        end: End = partial(fall, number)
        for ins in instructions:
            if ins.ends_block:
                end = self._end(ins, number)
            else:
                steps.append(self._guarded(ins, self._step(ins)))
        return steps, end

    def _step(self, ins: Instruction) -> Step:
        if step := access.build(ins, self) or warp.build(ins, self):
            return step
        if ins.base == "mov" and len(ins.operands) == 2:
            target, source = ins.operands
            if isinstance(source, tuple):
                return _join(self, ins.opcode, target, source)
            if isinstance(target, tuple):
                return _part(self, ins.opcode, target, source)
            if source in Chunk.SPECIAL:
                slot = self.register(target)
                return lambda chunk: chunk.write(slot, chunk.special(source).astype(self.classes[slot]), True)
        if ins.base == "setp" and ins.opcode.endswith(("f16x2", "bf16x2")):
            return _compare_pairs(self, ins)
        if rule := decode(ins.opcode):
            return _pure(self, ins, of_three(rule) if ins.base in ("min", "max") and len(ins.operands) == 4 else rule)
        raise Unsupported(f"line {ins.line}: {ins}")

    def _guarded(self, ins: Instruction, step: Step) -> Step:
        if ins.guard is None:
            return step
        slot = self.register(ins.guard)

        def guarded(chunk: Chunk) -> None:
            chunk.require(chunk.known[slot], "a guard", ins)
            before, on = chunk.active, chunk.everywhere(chunk.values[slot]) ^ ins.negated
            mask = on if before is None else on & before
            if mask.all():
                step(chunk)
            elif mask.any():
                chunk.active = mask
                step(chunk)
                chunk.active = before

        return guarded

    def _end(self, ins: Instruction, number: int) -> End:
        if ins.base in ("bar", "barrier"):
            if ins.opcode not in ("bar.sync", "barrier.sync") or ins.operands != ("0",) or ins.guard:
                raise Unsupported(f"line {ins.line}: {ins}")
            return partial(barrier, number, ins)
        condition = None if ins.guard is None else self.register(ins.guard)
        if ins.base == "bra":
            if ins.operands[0] not in self.kernel.labels:
                raise Unsupported(f"line {ins.line}: branch to {ins.operands[0]}")
            return partial(branch, number, ins, condition, self.kernel.labels[str(ins.operands[0])])
        return partial(branch, number, ins, condition, None)


def _digits(type: str) -> str:
    """Bits of a constant of a type or a packed one: f32x2 -> 64."""
    bits, _, packed = type.lstrip("bfsu").partition("x")
    return str(int(bits) * (2 if packed else 1))


def _literal(text: Any) -> int:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", str(text)):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", str(text)):
        return int(text.rstrip("U"), 0)
    raise Unsupported(f"operand {text}")


def _pure(program: Program, ins: Instruction, rule: Rule) -> Step:
    if len(ins.operands) != 1 + len(rule.inputs):
        raise Unsupported(f"line {ins.line}: {ins}")
    target = program.register(ins.operands[0])
    sources = [program.operand(text, type) for text, type in zip(ins.operands[1:], rule.inputs, strict=True)]
    inputs, container, moves = rule.inputs, program.classes[target], ins.base == "mov"

    def step(chunk: Chunk) -> None:
        values = [as_type(chunk.values[s], t) for s, t in zip(sources, inputs, strict=True)]
        known = [chunk.known[s] for s in sources]
        if moves:
            defined = known[0]
        elif rule.selects:
            defined = meet(simplified(np.where(values[2], meet(known[0]), meet(known[1]))), known[2])
        elif rule.decides is not None and not (known[0] is True and known[1] is True):
            settled = [k & (v == rule.decides) for k, v in zip(map(meet, known), values, strict=True)]
            defined = simplified(np.asarray(meet(*known) | settled[0] | settled[1]))
        elif rule.result.endswith("x2"):
            defined = Halves(*(meet(*side) for side in zip(*map(halves, known), strict=True)))
        else:
            defined = meet(*known)
        chunk.write(target, to_bits(rule.function(*values), rule.result, container), defined)

    return step


def _join(program: Program, opcode: str, target: Any, parts: tuple[str, ...]) -> Step:
    """mov.b64 %rd, {%r, %r} and similar instructions."""
    slot = program.register(target)
    each = int(opcode.rpartition(".b")[2]) // len(parts)
    slots = [program.operand(part, f"b{each}") for part in parts]
    wide = program.classes[slot]

    def step(chunk: Chunk) -> None:
        value = np.zeros(1, wide)
        for i, part in enumerate(slots):
            value = value | chunk.values[part].astype(wide) << wide(each * i)
        known = [chunk.known[part] for part in slots]
        chunk.write(slot, value, Halves(*map(meet, known)) if len(parts) == 2 else meet(*known))

    return step


def _part(program: Program, opcode: str, targets: tuple[str, ...], source: Any) -> Step:
    """mov.b64 {%r, %r}, %rd and similar instructions."""
    bits = opcode.rpartition(".")[2]
    each = int(bits[1:]) // len(targets)
    slot = program.operand(source, bits)
    slots = [None if name == "_" else program.register(name) for name in targets]

    def step(chunk: Chunk) -> None:
        value, known = chunk.values[slot], chunk.known[slot]
        sides = halves(known) if len(targets) == 2 else [meet(known)] * len(targets)
        for i, target in enumerate(slots):
            if target is not None:
                part = as_type(value >> value.dtype.type(each * i), f"u{each}")
                chunk.write(target, part.astype(program.classes[target]), sides[i])

    return step


def _compare_pairs(program: Program, ins: Instruction) -> Step:
    """setp.gt.bf16x2 %p|%q, %r, %r: a predicate for each half."""
    rule = decode(ins.opcode.removesuffix("x2"))
    names = str(ins.operands[0]).split("|")
    if rule is None or len(names) != 2 or len(ins.operands) != 3:
        raise Unsupported(f"line {ins.line}: {ins}")
    targets, sources = [program.register(name) for name in names], [program.operand(text, "b32") for text in ins.operands[1:]]
    type = rule.inputs[0] + "x2"

    def step(chunk: Chunk) -> None:
        result = rule.function(*(as_type(chunk.values[s], type) for s in sources))
        known = [halves(chunk.known[s]) for s in sources]
        for half, target in enumerate(targets):
            chunk.write(target, result[:, half], meet(*(k[half] for k in known)))

    return step
