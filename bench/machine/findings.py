"""Findings of a run: violations of the rules of memory and barriers, and notes that violate none."""

from dataclasses import dataclass

from rplib.bench.machine.ptx import Instruction

OUT_OF_BOUNDS = "access outside every tensor"
OUT_OF_SHARED = "access outside shared memory"
BETWEEN_ELEMENTS = "access between the elements of a strided view"
MISALIGNED = "misaligned access"
UNDEFINED_USE = "undefined value used as"
UNDEFINED_STORE = "undefined value stored to global memory"
SHARED_RACE = "race in shared memory"
GLOBAL_RACE = "race in global memory"
LANES_DISAGREE = "threads of one instruction write different values to one place"
DIVERGENT = "warp instruction without all threads of the warp"
DEADLOCK = "barrier that some threads never reach"
MIXED_BARRIERS = "threads of a block meet at different barriers"
SAME_VALUE = "two warps write the same value without a barrier"  # a note: layouts that hold values twice do it


@dataclass
class Finding:
    """kind: one of the constants of this module, followed by details. count: number of threads; example: the first of them."""

    kind: str
    kernel: str
    instruction: str
    source: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: [{self.instruction}] {self.source}: {self.count} times, first {self.example}"


class Findings:
    """Findings, one per kind and instruction; ``notes`` are those that violate no rule."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str, int], Finding] = {}

    def add(self, kind: str, kernel: str, instruction: Instruction, count: int, example: str) -> None:
        """Count ``count`` more threads; ``example`` is kept for the first."""
        key = (kind, kernel, instruction.line)
        if key in self._all:
            self._all[key].count += count
        else:
            self._all[key] = Finding(kind, kernel, str(instruction), instruction.source, count, example)

    @property
    def violations(self) -> list[Finding]:
        return [f for f in self._all.values() if f.kind != SAME_VALUE]

    @property
    def notes(self) -> list[Finding]:
        return [f for f in self._all.values() if f.kind == SAME_VALUE]
