"""Counts of a launch: instructions, barriers, accesses to shared and global memory."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Access:
    """All executions of one memory instruction, over all warps.

    requests: by warps. bytes: of the lanes that took part. units: sectors of 32 bytes (global memory), or passes through the
    banks (shared memory: one pass uses each of 32 banks once; 64- and 128-bit accesses need at least two and four).
    """

    requests: int = 0
    bytes: int = 0
    units: int = 0


@dataclass
class Counts:
    """warps: per block. blocks: of the launch. executed: number of a basic block -> warps that ran it. global_accesses,
    shared_accesses: line of the PTX -> accesses of the instruction there; `opcodes` names it."""

    warps: int
    blocks: int
    executed: Counter[int] = field(default_factory=Counter)
    barrier_warps: int = 0
    global_accesses: dict[int, Access] = field(default_factory=dict)
    shared_accesses: dict[int, Access] = field(default_factory=dict)
    opcodes: dict[int, str] = field(default_factory=dict)
    _passes: dict[int, int] = field(default_factory=dict)

    @property
    def barriers(self) -> float:
        """Barriers passed by blocks, over all blocks."""
        return self.barrier_warps / self.warps

    @property
    def shared_passes(self) -> int:
        return sum(access.units for access in self.shared_accesses.values())

    @property
    def sectors(self) -> int:
        """32-byte sectors requested by warps, counted once per instruction and warp."""
        return sum(access.units for access in self.global_accesses.values())

    def on_global(self, line: int, opcode: str, who: np.ndarray, address: np.ndarray, size: int) -> None:
        """Count one instruction: lanes ``who`` of a chunk take ``size`` bytes each at ``address``."""
        if len(who):
            warps = (who >> 5).astype(np.int64)
            first, last = address.astype(np.int64) >> 5, (address.astype(np.int64) + size - 1) >> 5
            sectors = np.concatenate([warps << 48 | first, (warps << 48 | last)[first != last]])
            self._add(self.global_accesses, line, opcode, who, size, len(np.unique(sectors)))

    def on_shared(self, line: int, opcode: str, who: np.ndarray, address: np.ndarray, size: int) -> None:
        """The same for shared memory."""
        if len(who):
            key = hash((size, who.tobytes(), address.tobytes()))  # loops repeat themselves
            if key not in self._passes:
                self._passes[key] = passes(who, address, size)
            self._add(self.shared_accesses, line, opcode, who, size, self._passes[key])

    def _add(self, table: dict[int, Access], line: int, opcode: str, who: np.ndarray, size: int, units: int) -> None:
        self.opcodes[line] = opcode
        access = table.setdefault(line, Access())
        access.requests += len(np.unique(who >> 5))
        access.bytes += len(who) * size
        access.units += units


def passes(who: np.ndarray, address: np.ndarray, size: int) -> int:
    """Passes through the 32 banks of shared memory.

    Lanes are processed in groups of at most 128 bytes. A group needs as many passes as its busiest bank has different
    4-byte words.

    >>> lanes = np.arange(32)
    >>> [passes(lanes, 4 * stride * lanes, 4) for stride in (0, 1, 2, 32, 33)]
    [1, 1, 2, 32, 1]
    >>> passes(lanes, 16 * lanes, 16)  # 512 bytes
    4
    """
    words = max(size // 4, 1)
    group = who // max(32 // words, 1)
    word = (address.astype(np.int64) // 4)[:, None] + np.arange(words)
    distinct = np.unique(np.repeat(group, words).astype(np.int64) << 32 | word.ravel())
    _, load = np.unique(distinct >> 32 << 5 | distinct & 31, return_counts=True)
    of_group = np.unique(distinct >> 32 << 5 | distinct & 31) >> 5
    first = np.flatnonzero(np.diff(of_group, prepend=-1))
    return int(np.maximum.reduceat(load, first).sum())
