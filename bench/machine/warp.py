"""Instructions between the threads of a warp: shuffles, reductions, votes."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from rplib.bench.machine.ptx import Instruction, Unsupported
from rplib.bench.machine.registers import as_type, meet, simplified

if TYPE_CHECKING:
    from rplib.bench.machine.execution import Chunk, Step
    from rplib.bench.machine.program import Program

_REDUCTIONS: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def build(ins: Instruction, program: "Program") -> "Step | None":
    """The instruction as a function, or None if this module does not handle it."""
    if found := re.fullmatch(r"shfl\.sync\.(bfly|idx|up|down)\.b32", ins.opcode):
        return _shuffle(ins, program, found.group(1))
    if found := re.fullmatch(r"redux\.sync\.(add|min|max|and|or|xor)\.([usb]32)|redux\.sync\.(min|max)\.(f32)", ins.opcode):
        return _reduction(ins, program, *filter(None, found.groups()))
    if found := re.fullmatch(r"vote\.sync\.(any|all|ballot)\.(pred|b32)", ins.opcode):
        return _vote(ins, program, found.group(1))
    if ins.opcode == "activemask.b32":
        slot = program.register(ins.operands[0])
        return lambda chunk: chunk.write(slot, np.repeat(_ballot(_active(chunk)), 32), True)
    if ins.opcode == "bar.warp.sync":
        return lambda chunk: None
    if ins.base in ("mma", "wgmma", "tcgen05", "ldtm"):
        raise Unsupported(f"line {ins.line}: {ins.opcode}: products of matrices are not executed")
    return None


def _active(chunk: "Chunk") -> np.ndarray:
    mask = np.ones(chunk.lanes, bool) if chunk.active is None else chunk.active
    return mask.reshape(-1, 32)


def _ballot(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1).astype(np.uint32)


def _everybody(ins: Instruction, program: "Program", text: Any) -> int:
    return program.operand(text, "b32")


def _named(chunk: "Chunk", ins: Instruction, members: int) -> np.ndarray:
    """Lanes (warps, 32) that the mask of members names; reports active warps whose active lanes are others."""
    from rplib.bench.machine.findings import DIVERGENT

    chunk.require(chunk.known[members], "the members of a warp instruction", ins)
    mask = chunk.everywhere(chunk.values[members])
    named = ((mask >> chunk.lane.astype(np.uint32)) & np.uint32(1)).astype(bool).reshape(-1, 32)
    active = _active(chunk)
    wrong = (active & ~named).any(1) | (active.any(1) & (named & ~active).any(1) & _uniform(mask, active))
    chunk.found(DIVERGENT, ins, chunk.first_of_warp[::32], wrong, ())
    return named


def _uniform(mask: np.ndarray, active: np.ndarray) -> np.ndarray:
    """True for warps whose active lanes all give the same mask of members."""
    rows = mask.reshape(-1, 32)
    low, high = np.where(active, rows, 0xFFFFFFFF).min(1), np.where(active, rows, 0).max(1)
    return low == high


def _shuffle(ins: Instruction, program: "Program", mode: str) -> "Step":
    if not isinstance(ins.operands[0], str) or len(ins.operands) != 5:
        raise Unsupported(f"line {ins.line}: {ins}")
    name, _, predicate = ins.operands[0].partition("|")
    target, inside = program.register(name), program.register(predicate) if predicate else None
    value, distance, bounds = (program.operand(text, "b32") for text in ins.operands[1:4])
    members = _everybody(ins, program, ins.operands[4])

    def step(chunk: "Chunk") -> None:
        _named(chunk, ins, members)
        for slot, use in ((distance, "the distance of a shuffle"), (bounds, "the bounds of a shuffle")):
            chunk.require(chunk.known[slot], use, ins)
        n = chunk.everywhere(chunk.values[distance] & np.uint32(31)).astype(np.int64)
        limits = chunk.everywhere(chunk.values[bounds]).astype(np.int64)
        segment, clamp, lane = limits >> 8 & 31, limits & 31, chunk.lane
        lowest = lane & segment
        limit = lowest | (clamp & ~segment)
        source = {"bfly": lane ^ n, "idx": lowest | (n & ~segment), "down": lane + n, "up": lane - n}[mode]
        there = source >= limit if mode == "up" else source <= limit
        at = np.where(there, source, lane) + chunk.first_of_warp
        defined: Any = meet(chunk.known[value])
        if defined is not True:
            defined = np.broadcast_to(defined, (chunk.lanes,))[at]
        if chunk.active is not None:
            defined = defined & chunk.active[at]  # a lane that takes no part gives nothing
        moved = chunk.values[value]
        chunk.write(target, moved if len(moved) == 1 else moved[at], simplified(defined))
        if inside is not None:
            chunk.write(inside, there, True)

    return step


def _reduction(ins: Instruction, program: "Program", name: str, type: str) -> "Step":
    target, value = program.register(ins.operands[0]), program.operand(ins.operands[1], type)
    members = _everybody(ins, program, ins.operands[2])
    function = {"min": np.fmin, "max": np.fmax}[name] if type == "f32" else _REDUCTIONS[name]

    def step(chunk: "Chunk") -> None:
        named = _named(chunk, ins, members)
        values = as_type(chunk.everywhere(chunk.values[value]), type).reshape(-1, 32)
        known = chunk.known_everywhere(value).reshape(-1, 32)
        masks = chunk.everywhere(chunk.values[members]).reshape(-1, 32)
        result, defined = np.zeros_like(values), np.zeros(named.shape, bool)
        for mask in np.unique(masks[_active(chunk)]):  # lanes with the same members
            inside = (int(mask) >> np.arange(32) & 1).astype(bool)
            here = masks == mask
            result = np.where(here, function.reduce(values[:, inside], axis=1, keepdims=True).astype(values.dtype), result)
            defined = np.where(here, known[:, inside].all(1, keepdims=True), defined)
        chunk.write(target, np.ascontiguousarray(result).view(np.uint32).ravel(), simplified(defined.ravel()))

    return step


def _vote(ins: Instruction, program: "Program", how: str) -> "Step":
    target, members = program.register(ins.operands[0]), _everybody(ins, program, ins.operands[2])
    text = str(ins.operands[1])
    value, negated = program.operand(text.removeprefix("!"), "pred"), text.startswith("!")

    def step(chunk: "Chunk") -> None:
        named = _named(chunk, ins, members) & _active(chunk)
        chunk.require(chunk.known[value], "a vote", ins)
        votes = chunk.everywhere(chunk.values[value]).reshape(-1, 32) ^ negated
        if how == "ballot":
            chunk.write(target, np.repeat(_ballot(votes & named), 32), True)
        else:
            chunk.write(target, np.repeat((votes & named).any(1) if how == "any" else (votes | ~named).all(1), 32), True)

    return step
