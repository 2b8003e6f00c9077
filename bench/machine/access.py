"""Instructions on memory: loads, stores, atomic operations, asynchronous copies, matrices of shared memory."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from rplib.bench.machine import findings as kinds
from rplib.bench.machine.ptx import BITS, Instruction, Unsupported
from rplib.bench.machine.registers import as_type, meet, to_bits

if TYPE_CHECKING:
    from rplib.bench.machine.execution import Chunk, Step
    from rplib.bench.machine.program import Program

_HINTS = r"(?:\.(?:ca|cg|cs|lu|cv|nc|wb|wt|L1::\w+|L2::\w+))*"
_LOAD_STORE = re.compile(
    rf"(?P<what>ld|st)(?:\.(?:volatile|weak|relaxed))?(?:\.(?:gpu|cta))?\.(?P<space>global|shared|param)(?:::cta)?{_HINTS}"
    r"(?:\.v(?P<count>[248]))?\.(?P<type>[busf](?:8|16|32|64))"
)
_ATOMIC = re.compile(
    r"(?P<what>atom|red)(?:\.(?:relaxed|acq_rel|acquire|release))?(?:\.(?:gpu|cta|sys))?\.global(?:\.(?:gpu|cta|sys))?"
    r"(?:\.(?:acq_rel|relaxed))?\.(?P<how>add|min|max|and|or|xor|exch|cas)(?:\.noftz)?\.(?P<type>[busf](?:16|32|64))"
)
_ATOMICS: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new, "cas": lambda old, expected, new: np.where(old == expected, new, old),
}  # fmt: skip
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_COPY = re.compile(rf"cp\.async\.(?:ca|cg)\.shared(?:::cta)?\.global{_HINTS}(?:\.L2::\w+)*")


def build(ins: Instruction, program: "Program") -> "Step | None":
    """The instruction as a function, or None if this module does not handle it."""
    if found := _LOAD_STORE.fullmatch(ins.opcode):
        what, space, count, type = found.group("what", "space", "count", "type")
        if space == "param":
            return _parameter(ins, program, type) if what == "ld" and count is None else None
        return (_load if what == "ld" else _store)(ins, program, space, int(count or 1), type)
    if found := _ATOMIC.fullmatch(ins.opcode):
        return _atomic(ins, program, *found.group("what", "how", "type"))
    if ins.base == "createpolicy":
        slot = program.register(ins.operands[0])
        return lambda chunk: chunk.write(slot, np.zeros(1, np.uint64), True)
    if found := re.fullmatch(r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", ins.opcode):
        return _matrices(ins, program, found.group(1) == "ldmatrix", int(found.group(2)), bool(found.group(3)))
    if _COPY.fullmatch(ins.opcode):
        return _copy(ins, program)
    if ins.opcode == "cp.async.commit_group":
        return _commit
    if ins.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        left = int(str(ins.operands[0]), 0) if ins.operands else 0
        return lambda chunk: _wait(chunk, left)
    return None


def _address(program: "Program", text: Any, space: str) -> tuple[int, Any]:
    """(slot of the base, offset as a number of the address's type)."""
    found = _ADDRESS.fullmatch(str(text))
    if found is None:
        raise Unsupported(f"address {text}")
    type, width = ("u32", np.uint32) if space == "shared" else ("u64", np.uint64)
    return program.operand(found.group(1), type), np.array(int(found.group(2) or "0", 0)).astype(width)


def _addresses(chunk: "Chunk", ins: Instruction, slot: int, offset: Any, who: np.ndarray) -> np.ndarray:
    chunk.require(chunk.known[slot], "an address", ins)
    return np.asarray(chunk.everywhere(chunk.values[slot])[who] + offset)


def _parameter(ins: Instruction, program: "Program", type: str) -> "Step":
    found = _ADDRESS.fullmatch(str(ins.operands[1]))
    if found is None or found.group(1) not in program.kernel.parameters or int(found.group(2) or "0", 0):
        raise Unsupported(f"line {ins.line}: {ins}")
    slot, name = program.register(ins.operands[0]), found.group(1)
    container = program.classes[slot]
    return lambda chunk: chunk.write(slot, to_bits(as_type(chunk.launch.parameters[name], type), type, container), True)


def _note_shared(program: "Program", space: str, size: int) -> None:
    if space == "shared":
        program.smallest_shared_access = min(program.smallest_shared_access, size)


def _names(operand: Any, count: int, ins: Instruction) -> tuple[str, ...]:
    names = operand if isinstance(operand, tuple) else (operand,)
    if len(names) != count:
        raise Unsupported(f"line {ins.line}: {ins}")
    return names


def _load(ins: Instruction, program: "Program", space: str, count: int, type: str) -> "Step":
    size = BITS[type] // 8
    _note_shared(program, space, size)
    names = _names(ins.operands[0], count, ins)
    targets = [None if name == "_" else program.register(name) for name in names]
    base, offset = _address(program, ins.operands[1], space)

    def step(chunk: "Chunk") -> None:
        who = chunk.who()
        address = _addresses(chunk, ins, base, offset, who)
        if space == "global":
            chunk.counts.on_global(ins.line, ins.opcode, who, address, size * count)
            values, known = chunk.memory.load(chunk, ins, who, address, size, count)
        else:
            chunk.counts.on_shared(ins.line, ins.opcode, who, address, size * count)
            values, known = chunk.shared.load(chunk, ins, who, address, size, count)
        for j, slot in enumerate(targets):
            if slot is not None:
                value = to_bits(as_type(values[j], type), type, program.classes[slot])
                chunk.write_some(slot, who, value, True if known is True else known[j])

    return step


def _store(ins: Instruction, program: "Program", space: str, count: int, type: str) -> "Step":
    size = BITS[type] // 8
    _note_shared(program, space, size)
    sources = [program.operand(name, f"b{8 * size}") for name in _names(ins.operands[1], count, ins)]
    base, offset = _address(program, ins.operands[0], space)

    def step(chunk: "Chunk") -> None:
        who = chunk.who()
        address = _addresses(chunk, ins, base, offset, who)
        values = np.stack([chunk.everywhere(as_type(chunk.values[s], f"u{8 * size}"))[who] for s in sources])
        known: Any = True
        if any(chunk.known[s] is not True for s in sources):
            known = np.stack([chunk.known_everywhere(s)[who] for s in sources])
        if space == "global":
            if known is not True:
                chunk.found(kinds.UNDEFINED_STORE, ins, who, ~known.all(0), ())
            chunk.counts.on_global(ins.line, ins.opcode, who, address, size * count)
            chunk.memory.store(chunk, ins, who, address, values, size)
        else:
            chunk.counts.on_shared(ins.line, ins.opcode, who, address, size * count)
            chunk.shared.store(chunk, ins, who, address, values, known, size)

    return step


def _atomic(ins: Instruction, program: "Program", what: str, how: str, type: str) -> "Step":
    size, function = BITS[type] // 8, _ATOMICS[how]
    operands = list(ins.operands)
    target = program.register(operands.pop(0)) if what == "atom" else None
    base, offset = _address(program, operands.pop(0), "global")
    sources = [program.operand(text, f"b{8 * size}") for text in operands]

    def bits(old: np.ndarray, *new: np.ndarray) -> np.ndarray:
        return to_bits(function(as_type(old, type), *(as_type(n, type) for n in new)), type, old.dtype.type)

    def step(chunk: "Chunk") -> None:
        who = chunk.who()
        address = _addresses(chunk, ins, base, offset, who)
        for s in sources:
            chunk.require(chunk.known[s], "an operand of an atomic operation", ins)
        values = [chunk.everywhere(as_type(chunk.values[s], f"u{8 * size}"))[who] for s in sources]
        chunk.counts.on_global(ins.line, ins.opcode, who, address, size)
        old = chunk.memory.update(chunk, ins, who, address, values, size, bits)
        if target is not None:
            chunk.write_some(target, who, old, True)

    return step


def _matrices(ins: Instruction, program: "Program", load: bool, count: int, transposed: bool) -> "Step":
    """8 x 8 matrices of 16-bit values: lane 8 i + k names row k of matrix i, and holds two values of every matrix."""
    registers, address = ins.operands if load else ins.operands[::-1]
    slots = [program.register(name) for name in _names(registers, count, ins)]
    base, offset = _address(program, address, "shared")
    size = 2 if transposed else 4
    _note_shared(program, "shared", size)

    def step(chunk: "Chunk") -> None:
        chunk.require_whole_warps(ins)
        who = chunk.who()
        rows = np.zeros(chunk.lanes, np.uint32)
        rows[who] = _addresses(chunk, ins, base, offset, who)
        lane, first = chunk.lane[who], chunk.first_of_warp[who]
        for i, slot in enumerate(slots):
            if not transposed:
                at = rows[first + 8 * i + lane // 4] + (4 * (lane % 4)).astype(np.uint32)
                pieces = [at]
            else:
                pieces = [rows[first + 8 * i + 2 * (lane % 4) + h] + (2 * (lane // 4)).astype(np.uint32) for h in (0, 1)]
            whole = rows[first + 8 * i + lane // 4] + (4 * (lane % 4)).astype(np.uint32)  # the 128 bytes that move either way
            chunk.counts.on_shared(ins.line, ins.opcode, who, whole, 4)
            if load:
                value, known = np.zeros(len(who), np.uint32), True
                for h, at in enumerate(pieces):
                    read, defined = chunk.shared.load(chunk, ins, who, at, size, 1)
                    value = value | read[0].astype(np.uint32) << np.uint32(16 * h)
                    known = meet(known, True if defined is True else defined[0])
                chunk.write_some(slot, who, value, known)
            else:
                value, known = chunk.everywhere(chunk.values[slot])[who], chunk.known_everywhere(slot)[who]
                for h, at in enumerate(pieces):
                    piece = (value >> np.uint32(16 * h)).astype(f"u{size}")
                    chunk.shared.store(chunk, ins, who, at, piece[None], known[None], size)

    return step


def _copy(ins: Instruction, program: "Program") -> "Step":
    """cp.async: the copied values arrive when the lane waits for them; until then the target is undefined."""
    size = int(str(ins.operands[2]), 0) if len(ins.operands) > 2 else 0
    if size not in (4, 8, 16):
        raise Unsupported(f"line {ins.line}: {ins}")
    _note_shared(program, "shared", 4)
    to, to_offset = _address(program, ins.operands[0], "shared")
    of, of_offset = _address(program, ins.operands[1], "global")
    amount = program.operand(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def step(chunk: "Chunk") -> None:
        who = chunk.who()
        target = _addresses(chunk, ins, to, to_offset, who)
        source = _addresses(chunk, ins, of, of_offset, who)
        values = np.zeros((size // 4, len(who)), np.uint32)
        known = np.ones(values.shape, bool)  # what is not copied becomes zeros
        read = np.ones(len(who), bool)
        if amount is not None:
            chunk.require(chunk.known[amount], "the size of a copy", ins)
            asked = chunk.everywhere(chunk.values[amount])[who]
            if not np.isin(asked, (0, size)).all():
                raise Unsupported(f"line {ins.line}: {ins}: copies a part")
            read = asked == size
        chunk.counts.on_global(ins.line, ins.opcode, who[read], source[read], size)
        values[:, read], known[:, read] = chunk.memory.load(chunk, ins, who[read], source[read], 4, size // 4)
        chunk.shared.store(chunk, ins, who, target, np.zeros_like(values), np.zeros_like(known), 4)
        chunk.copies.append((ins, who, chunk.committed[who], target, values, known))

    return step


def _commit(chunk: "Chunk") -> None:
    chunk.committed[chunk.who()] += 1


def _wait(chunk: "Chunk", left: int) -> None:
    """Complete all but the last ``left`` groups of copies of the active lanes."""
    active, still = np.zeros(chunk.lanes, bool), []
    active[chunk.who()] = True
    for ins, who, group, target, values, known in chunk.copies:
        lands = active[who] & (group < chunk.committed[who] - left)
        if lands.any():
            chunk.counts.on_shared(ins.line, ins.opcode, who[lands], target[lands], 4 * len(values))
            chunk.shared.store(chunk, ins, who[lands], target[lands], values[:, lands], known[:, lands], 4)
        if not lands.all():
            rest = ~lands
            still.append((ins, who[rest], group[rest], target[rest], values[:, rest], known[:, rest]))
    chunk.copies = still
