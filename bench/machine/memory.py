"""Global and shared memory with their checks: bounds, alignment, what is defined, races.

An access names lanes of the chunk (``who``), addresses, the size of an element and how many of them a lane takes. Findings
go to the launch; a lane whose address is wrong reads zeros, undefined, and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rplib.bench.machine import findings as kinds
from rplib.bench.machine.ptx import Instruction
from rplib.bench.machine.races import Touched

if TYPE_CHECKING:
    from rplib.bench.machine.execution import Chunk

SHARED_BASE = 1 << 16  # so that an address of zero is out of bounds
SECTOR = 32


@dataclass
class Allocation:
    """One piece of memory, of one or several arguments of a kernel.

    names: of the arguments. base: address. bytes: the memory itself. place: bytes per entry of the masks, the smallest element.
    allowed: places that belong to an element of an argument; None: all. defined: places that hold a value; None: all.
    """

    names: tuple[str, ...]
    base: int
    bytes: np.ndarray
    place: int
    allowed: np.ndarray | None = None
    defined: np.ndarray | None = None
    between_blocks: Touched = field(init=False)
    between_warps: Touched = field(init=False)
    loaded_sectors: np.ndarray = field(init=False)
    stored_sectors: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        places = -(-len(self.bytes) // self.place)
        self.between_blocks, self.between_warps = Touched(places), Touched(places)
        sectors = (self.base % SECTOR + len(self.bytes)) // SECTOR + 1
        self.loaded_sectors, self.stored_sectors = np.zeros(sectors, bool), np.zeros(sectors, bool)

    @property
    def end(self) -> int:
        return self.base + len(self.bytes)

    def places(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Places (accesses, n) of accesses of ``size`` bytes at byte offsets."""
        return (offsets // self.place)[:, None] + np.arange(max(size // self.place, 1))

    def elements(self, size: int) -> np.ndarray:
        return self.bytes[: len(self.bytes) // size * size].view(f"u{size}")


def by_component(known: np.ndarray, count: int) -> Any:
    """Masks of places (accesses, n) -> of the components of a vector (count, accesses)."""
    if known.shape[1] < count:
        return np.broadcast_to(known.all(1), (count, len(known)))
    return known.reshape(len(known), count, -1).all(2).T


class GlobalMemory:
    """Global memory: the tensors of a launch."""

    def __init__(self, allocations: Sequence[Allocation]) -> None:
        self.allocations = sorted((a for a in allocations if len(a.bytes)), key=lambda a: a.base)
        self._bases = np.array([a.base for a in self.allocations], np.int64)
        self._ends = np.array([a.end for a in self.allocations], np.int64)

    def load(self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, size: int, count: int) -> tuple[Any, Any]:
        """-> values (count, lanes) and where they are defined."""
        values = np.zeros((count, len(who)), f"u{size}")
        defined = np.zeros((count, len(who)), bool)
        for a, lanes, offset, places in self._resolve(chunk, ins, who, address, size * count):
            memory = a.elements(size)
            for j in range(count):
                values[j, lanes] = memory[offset // size + j]
            defined[:, lanes] = True if a.defined is None else by_component(a.defined[places], count)
            a.loaded_sectors[(a.base % SECTOR + offset) // SECTOR] = True
            agents = chunk.block[who[lanes]], chunk.agent[who[lanes]]
            race = a.between_blocks.read(places, agents[0], np.zeros_like(agents[0]))
            race |= a.between_warps.read(places, agents[1], chunk.epoch_of(who[lanes]))
            chunk.found(f"{kinds.GLOBAL_RACE}: read of what another warp writes", ins, who[lanes], race, a.names)
        return values, True if defined.all() else defined

    def store(self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, values: np.ndarray, size: int) -> None:
        """values (count, lanes)."""
        count = len(values)
        for a, lanes, offset, places in self._resolve(chunk, ins, who, address, size * count):
            memory, at = a.elements(size), (offset // size)[None, :] + np.arange(count)[:, None]
            mine = values[:, lanes]
            same = (memory[at] == mine).all(0)
            memory[at] = mine
            clash = (memory[at] != mine).any(0)
            a.stored_sectors[(a.base % SECTOR + offset) // SECTOR] = True
            if a.defined is not None:
                a.defined[places] = True
            read, earlier, together = (np.zeros(len(offset), bool) for _ in range(3))
            block, warp = chunk.block[who[lanes]], chunk.agent[who[lanes]]
            for touched, agents, epochs in (
                (a.between_blocks, block, np.zeros_like(block)),  # nothing orders two blocks
                (a.between_warps, warp, chunk.epoch_of(who[lanes])),
            ):
                earlier |= touched.rivals(places, agents, epochs)
                read |= touched.write(places, agents, epochs)
                together |= touched.crowded(places, agents)
            differ = (earlier & ~same) | (together & clash)
            chunk.found(f"{kinds.GLOBAL_RACE}: write to what another warp reads", ins, who[lanes], read, a.names)
            chunk.found(f"{kinds.GLOBAL_RACE}: two warps write", ins, who[lanes], differ, a.names)
            chunk.found(kinds.SAME_VALUE, ins, who[lanes], (earlier | together) & ~differ, a.names)
            chunk.found(kinds.LANES_DISAGREE, ins, who[lanes], clash & ~together, a.names)

    def update(self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, operands: Any, size: int, how: Any) -> Any:
        """An atomic operation, lane after lane: the new value is ``how(old, *operands)``. Returns the old values (lanes,)."""
        old = np.zeros(len(who), f"u{size}")
        for a, lanes, offset, places in self._resolve(chunk, ins, who, address, size):
            memory = a.elements(size)
            undefined = np.zeros(len(offset), bool) if a.defined is None else ~a.defined[places].all(1)
            chunk.found(f"{kinds.UNDEFINED_USE} the target of an atomic operation", ins, who[lanes], undefined, a.names)
            for at, lane in zip(offset // size, np.arange(len(who))[lanes], strict=True):
                old[lane] = memory[at]
                memory[at] = how(memory[at : at + 1], *(o[lane : lane + 1] for o in operands))[0]
            a.loaded_sectors[(a.base % SECTOR + offset) // SECTOR] = True
            a.stored_sectors[(a.base % SECTOR + offset) // SECTOR] = True
        return old

    def _resolve(self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, size: int) -> Any:
        """(allocation, lanes of it, byte offsets, places) of the accesses that are right; the others are reported."""
        if not len(who):
            return
        address = address.astype(np.int64)
        wrong = address % size != 0
        chunk.found(kinds.MISALIGNED, ins, who, wrong, lambda i: f"address {address[i]:#x}, {size} bytes")
        which = np.searchsorted(self._bases, address, "right") - 1
        inside = which >= 0
        if len(self.allocations):
            inside &= address + size <= self._ends[which]
        chunk.found(kinds.OUT_OF_BOUNDS, ins, who, ~inside, lambda i: self._near(int(address[i]), size))
        good = inside & ~wrong
        for k in range(len(self.allocations)):
            mine = good & (which == k)
            if not mine.any():
                continue
            a = self.allocations[k]
            lanes = slice(None) if mine.all() else np.flatnonzero(mine)
            offset = address[lanes] - a.base
            places = a.places(offset, size)
            if a.allowed is not None:
                outside = ~a.allowed[places].all(1)
                chunk.found(kinds.BETWEEN_ELEMENTS, ins, who[lanes], outside, a.names)
            yield a, lanes, offset, places

    def _near(self, address: int, size: int) -> str:
        below = [a for a in self.allocations if a.base <= address]
        if not below:
            return f"address {address:#x}, {size} bytes"
        a = below[-1]
        return f"{size} bytes at {address - a.base} of {'='.join(a.names)}, which has {len(a.bytes)}"


class SharedMemory:
    """Of all blocks of a chunk, one after the other; ``place``: the smallest access that the kernel makes."""

    def __init__(self, size: int, blocks: int, place: int) -> None:
        self.size, self.place = size, place
        self.stride = -(-max(size, 1) // 16) * 16
        self.bytes = np.full(self.stride * blocks, 0xA5, np.uint8)
        self.defined = np.zeros(len(self.bytes) // place, bool)
        self._touched = Touched(len(self.defined))

    def load(self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, size: int, count: int) -> tuple[Any, Any]:
        """-> values (count, lanes) and where they are defined."""
        values = np.zeros((count, len(who)), f"u{size}")
        defined = np.zeros((count, len(who)), bool)
        lanes, offset, places = self._resolve(chunk, ins, who, address, size * count)
        memory = self.bytes.view(f"u{size}")
        for j in range(count):
            values[j, lanes] = memory[offset // size + j]
        defined[:, lanes] = by_component(self.defined[places], count)
        race = self._touched.read(places, chunk.agent[who[lanes]], chunk.epoch_of(who[lanes]))
        chunk.found(f"{kinds.SHARED_RACE}: read of what another warp writes", ins, who[lanes], race, self._where(offset))
        return values, True if defined.all() else defined

    def store(
        self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, values: np.ndarray, defined: Any, size: int
    ) -> None:
        """values (count, lanes); defined has the same shape, or is True."""
        count = len(values)
        lanes, offset, places = self._resolve(chunk, ins, who, address, size * count)
        memory, at = self.bytes.view(f"u{size}"), (offset // size)[None, :] + np.arange(count)[:, None]
        mine = values[:, lanes]
        same = (memory[at] == mine).all(0)
        memory[at] = mine
        clash = (memory[at] != mine).any(0)
        agents, epochs, where = chunk.agent[who[lanes]], chunk.epoch_of(who[lanes]), self._where(offset)
        if defined is True:
            self.defined[places] = True
        else:
            self.defined[places] = np.repeat(defined[:, lanes].T, places.shape[1] // count, axis=1)
        earlier = self._touched.rivals(places, agents, epochs)
        race = self._touched.write(places, agents, epochs)
        together = self._touched.crowded(places, agents)
        chunk.found(f"{kinds.SHARED_RACE}: write to what another warp reads", ins, who[lanes], race, where)
        differ = (earlier & ~same) | (together & clash)
        chunk.found(f"{kinds.SHARED_RACE}: two warps write", ins, who[lanes], differ, where)
        chunk.found(kinds.SAME_VALUE, ins, who[lanes], (earlier | together) & ~differ, where)
        chunk.found(kinds.LANES_DISAGREE, ins, who[lanes], clash & ~together, where)

    def _resolve(self, chunk: "Chunk", ins: Instruction, who: Any, address: np.ndarray, size: int) -> tuple[Any, Any, Any]:
        at = address.astype(np.int64) - SHARED_BASE
        outside = (at < 0) | (at + size > self.size)
        misaligned = at % size != 0
        where = lambda i: f"byte {at[i]} of {self.size}"  # noqa: E731
        chunk.found(kinds.OUT_OF_SHARED, ins, who, outside, where)
        chunk.found(kinds.MISALIGNED, ins, who, misaligned, where)
        wrong = outside | misaligned
        lanes = np.flatnonzero(~wrong) if wrong.any() else slice(None)
        offset = at[lanes] + chunk.local_block[who[lanes]] * self.stride
        return lanes, offset, (offset // self.place)[:, None] + np.arange(max(size // self.place, 1))

    def _where(self, offset: np.ndarray) -> Any:
        return lambda i: f"byte {offset[i] % self.stride}"
