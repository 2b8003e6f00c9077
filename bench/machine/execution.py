"""Runs a program: the threads of many blocks as lanes of numpy arrays, basic blocks one after the other under masks.

Of the basic blocks that some lanes have reached, the first in the text runs next, for all of those lanes, so that lanes
separated by a branch run together again where their paths join. A barrier holds lanes until all lanes of their thread block
have reached it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rplib.bench.machine import findings as kinds
from rplib.bench.machine.counts import Counts
from rplib.bench.machine.findings import Findings
from rplib.bench.machine.memory import GlobalMemory, SharedMemory
from rplib.bench.machine.ptx import BITS, Instruction, Kernel
from rplib.bench.machine.registers import choose, meet, simplified

if TYPE_CHECKING:
    from rplib.bench.machine.program import Program

Step = Callable[["Chunk"], None]
End = Callable[["Chunk", np.ndarray], None]
WARP = 32
MOST_LANES = 8192  # of a chunk: large enough for numpy, small enough for a cache
_MOST_STEPS = 2_000_000


class Launch:
    """One launch: the state that all of its blocks share.

    parameters: name -> array of one unsigned integer. grid: blocks along x, y and z. shared: bytes of shared memory per block.
    """

    def __init__(
        self,
        program: "Program",
        parameters: dict[str, np.ndarray],
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        memory: GlobalMemory,
        findings: Findings,
    ) -> None:
        self.program, self.parameters, self.grid, self.threads = program, parameters, grid, threads
        self.shared, self.memory, self.findings = shared, memory, findings
        self.name = program.kernel.name
        self.counts = Counts(threads // WARP, grid[0] * grid[1] * grid[2])

    def run(self, most_lanes: int = MOST_LANES) -> Counts:
        """Execute every block."""
        blocks = np.arange(self.grid[0] * self.grid[1] * self.grid[2])
        at_once = max(1, most_lanes // self.threads)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), at_once):
                Chunk(self, blocks[start : start + at_once]).run()
        return self.counts


class Chunk:
    """The lanes of some blocks of a launch, and the basic block that each of them has reached."""

    SPECIAL = ("%laneid", "%warpid", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"))

    def __init__(self, launch: Launch, blocks: np.ndarray) -> None:
        self.launch, self.program, self.counts = launch, launch.program, launch.counts
        threads = launch.threads
        self.lanes, self.blocks = len(blocks) * threads, len(blocks)
        self.block = np.repeat(blocks, threads)
        self.local_block = np.repeat(np.arange(len(blocks)), threads)
        self.thread = np.tile(np.arange(threads), len(blocks))
        self.lane = self.thread % WARP
        self.first_of_warp = np.arange(self.lanes) // WARP * WARP
        self.agent = (self.block * (threads // WARP) + self.thread // WARP).astype(np.int32)
        self.epoch = np.zeros(self.blocks, np.int64)
        self._all = np.arange(self.lanes)
        self.memory = launch.memory
        self.shared = SharedMemory(launch.shared, self.blocks, self.program.smallest_shared_access)
        self.values = [np.zeros(1, container) for container in self.program.classes]
        self.known: list[Any] = [False] * len(self.values)
        for slot, value in self.program.constants:
            self.values[slot], self.known[slot] = value, True
        self.active: np.ndarray | None = None  # None: all lanes
        self.copies: list[Any] = []  # cp.async on the way, see access.py
        self.committed = np.zeros(self.lanes, np.int64)
        self.alive = np.ones(self.lanes, bool)
        self._reached: dict[int, np.ndarray] = {0: np.ones(self.lanes, bool)}
        self._held: list[tuple[int, np.ndarray, Instruction]] = []  # lanes at a barrier

    # ------------------------------------------------------------------------------------------- what instructions use

    def write(self, slot: int, value: np.ndarray, known: Any) -> None:
        """Set a register of the active lanes."""
        if self.active is None:
            self.values[slot], self.known[slot] = value, known
        else:
            self.values[slot] = np.where(self.active, value, self.values[slot])
            self.known[slot] = choose(self.active, known, self.known[slot])

    def write_some(self, slot: int, who: np.ndarray, value: np.ndarray, known: Any) -> None:
        """Set a register of the lanes ``who``: those that are active, or fewer."""
        container = self.program.classes[slot]
        if len(who) == self.lanes:
            self.write(slot, value.astype(container), known if known is True else simplified(known))
            return
        whole, defined, mask = np.zeros(self.lanes, container), np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        whole[who], defined[who], mask[who] = value, known, True
        before, self.active = self.active, mask
        self.write(slot, whole, defined)
        self.active = before

    def everywhere(self, value: Any) -> Any:
        """One value per lane."""
        return value if len(value) == self.lanes else np.broadcast_to(value, (self.lanes,))

    def known_everywhere(self, slot: int) -> np.ndarray:
        return np.broadcast_to(np.asarray(meet(self.known[slot])), (self.lanes,))

    def who(self) -> np.ndarray:
        """Numbers of the active lanes."""
        return self._all if self.active is None else np.flatnonzero(self.active)

    def epoch_of(self, who: np.ndarray) -> np.ndarray:
        """Differs between blocks, and within one before and after a barrier."""
        return self.block[who] * (1 << 24) + self.epoch[self.local_block[who]]

    def special(self, name: str) -> np.ndarray:
        kind, _, axis = name[1:].partition(".")
        gx, gy, _ = self.launch.grid
        along = {"x": self.block % gx, "y": self.block // gx % gy, "z": self.block // (gx * gy)}
        sizes = {"x": self.launch.threads, "y": 1, "z": 1}
        if kind == "laneid":
            return self.lane
        if kind == "warpid":
            return self.thread // WARP
        if kind == "tid":
            return self.thread if axis == "x" else np.zeros(1, np.int64)
        if kind == "ctaid":
            return along[axis]
        return np.array([sizes[axis] if kind == "ntid" else self.launch.grid["xyz".index(axis)]])

    def require(self, known: Any, use: str, ins: Instruction) -> None:
        """Report active lanes whose value is undefined."""
        known = meet(known)
        if known is not True:
            who = self.who()
            self.found(f"{kinds.UNDEFINED_USE} {use}", ins, who, ~np.broadcast_to(known, (self.lanes,))[who], ())

    def found(self, kind: str, ins: Instruction, who: np.ndarray, bad: Any, detail: Any) -> None:
        """Report the lanes ``who`` where ``bad`` is set; detail: names of tensors, or a text for the n-th of ``who``."""
        if not bad.any():
            return
        first = int(np.argmax(bad))
        gx, gy, _ = self.launch.grid
        block, thread = int(self.block[who[first]]), int(self.thread[who[first]])
        text = detail(first) if callable(detail) else "=".join(detail)
        example = f"block ({block % gx}, {block // gx % gy}, {block // (gx * gy)}) thread {thread}" + (
            f", {text}" if text else ""
        )
        self.launch.findings.add(kind, self.launch.name, ins, int(bad.sum()), example)

    def require_whole_warps(self, ins: Instruction) -> None:
        if self.active is not None:
            warps = self.active.reshape(-1, WARP)
            self.found(kinds.DIVERGENT, ins, self.first_of_warp[::WARP], warps.any(1) & ~warps.all(1), ())

    # ----------------------------------------------------------------------------------------------------- control flow

    def run(self) -> None:
        steps = 0
        while self._reached or self._held:
            if not self._reached:
                _, mask, ins = self._held[0]
                self.found(kinds.DEADLOCK, ins, self._all, mask, ())
                return
            number = min(self._reached)
            mask = self._reached.pop(number)
            whole = bool(mask.all())
            self.active = None if whole else mask
            self.counts.executed[number] += self.lanes // WARP if whole else int(mask.reshape(-1, WARP).any(1).sum())
            instructions, end = self.program.blocks[number]
            for step in instructions:
                step(self)
            end(self, mask)
            steps += 1
            if steps > _MOST_STEPS:
                raise RuntimeError(f"{self.launch.name} has run {steps} basic blocks and does not end")

    def reach(self, number: int, mask: np.ndarray) -> None:
        """These lanes continue at a basic block."""
        if mask.any():
            self._reached[number] = self._reached[number] | mask if number in self._reached else mask

    def hold(self, number: int, ins: Instruction, mask: np.ndarray) -> None:
        """These lanes wait at a barrier; blocks whose lanes have all reached it continue."""
        self.counts.barrier_warps += int(mask.reshape(-1, WARP).any(1).sum())
        self._held.append((number, mask, ins))
        here = np.logical_or.reduce([held for _, held, _ in self._held]).reshape(self.blocks, -1)
        alive = self.alive.reshape(self.blocks, -1)
        ready = (here | ~alive).all(1) & here.any(1)
        if not ready.any():
            return
        everyone, homes = ready[self.local_block], np.zeros(self.blocks, int)
        waiting, self._held = self._held, []
        for at, held, where in waiting:
            homes += (held & everyone).reshape(self.blocks, -1).any(1)
            self.reach(at, held & everyone)
            if (held & ~everyone).any():
                self._held.append((at, held & ~everyone, where))
        first_lanes = np.arange(self.blocks) * self.launch.threads
        self.found(kinds.MIXED_BARRIERS, ins, first_lanes, homes > 1, ())
        self.found(kinds.DEADLOCK, ins, first_lanes, ready & ~alive.all(1), lambda _: "the others have exited")
        self.epoch[ready] += 1


def fall(number: int, chunk: Chunk, mask: np.ndarray) -> None:
    if number + 1 < len(chunk.program.blocks):
        chunk.reach(number + 1, mask)


def branch(number: int, ins: Instruction, condition: int | None, target: int | None, chunk: Chunk, mask: np.ndarray) -> None:
    """A branch, or with ``target`` None a return."""
    taken = mask
    if condition is not None:
        chunk.require(chunk.known[condition], "the condition of a branch", ins)
        taken = mask & (chunk.everywhere(chunk.values[condition]) ^ ins.negated)
        fall(number, chunk, mask & ~taken)
    if target is None:
        chunk.alive &= ~taken
    else:
        chunk.reach(target, taken)


def barrier(number: int, ins: Instruction, chunk: Chunk, mask: np.ndarray) -> None:
    chunk.hold(number + 1, ins, mask)


def parameters_of(kernel: Kernel, values: Sequence[int | float], kinds_of: Sequence[str]) -> dict[str, np.ndarray]:
    """Arguments -> bits, for `Launch`. kinds_of: numpy types such as "i4" or "f4" per argument, as the caller holds it.

    Raises:
        ValueError: number or sizes of the arguments do not match the kernel's parameters.
    """
    if len(values) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} has {len(kernel.parameters)} parameters, got {len(values)} arguments.")
    found = {}
    for (name, type), value, kind in zip(kernel.parameters.items(), values, kinds_of, strict=True):
        bits = np.array([value], kind)
        if bits.dtype.itemsize * 8 != BITS[type]:
            raise ValueError(f"{kernel.name}: parameter {name} is a {type}, got {kind}.")
        found[name] = bits.view(f"u{bits.dtype.itemsize}")
    return found
