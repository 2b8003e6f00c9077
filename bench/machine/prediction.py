"""From counts to a time: the largest of what three parts of a GPU need. What this leaves out is in README.md.

>>> needed = Needs(instructions=8.0, shared_passes=0.5, bytes=144.0)  # of a voxel, say
>>> {part: f"{1e12 * seconds:.1f} ps" for part, seconds in times(needed, GPUS["H200"]).items()}
{'issue': '8.9 ps', 'shared': '2.2 ps', 'memory': '30.0 ps'}
"""

from typing import NamedTuple


class GPU(NamedTuple):
    """multiprocessors; clock in Hz, as it holds under load; bandwidth of the memory in bytes/s, as its maker states it."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 108, 1.41e9, 2.039e12),
        GPU("H100", 132, 1.7e9, 3.35e12),
        GPU("H200", 132, 1.7e9, 4.8e12),
        GPU("B200", 148, 1.8e9, 8.0e12),
    )
}
_SCHEDULERS = 4  # of a multiprocessor: warp instructions that it can issue in a clock


class Needs(NamedTuple):
    """SASS instructions by warps, passes through shared memory, bytes that the memory moves: of a launch, or of a voxel."""

    instructions: float
    shared_passes: float
    bytes: float


def times(needs: Needs, gpu: GPU) -> dict[str, float]:
    """Seconds that each part of the GPU is busy, all multiprocessors at work."""
    return {
        "issue": needs.instructions / (_SCHEDULERS * gpu.multiprocessors * gpu.clock),
        "shared": needs.shared_passes / (gpu.multiprocessors * gpu.clock),
        "memory": needs.bytes / gpu.bandwidth,
    }


def predicted(needs: Needs, gpu: GPU) -> float:
    """Seconds: the busiest part hides the others."""
    return max(times(needs, gpu).values())


def gpu_named(name: str) -> GPU | None:
    """The known GPU that a driver's name means.

    >>> gpu_named("NVIDIA H100 80GB HBM3").name
    'H100'
    >>> gpu_named("NVIDIA GeForce RTX 3090") is None
    True
    """
    return next((gpu for short, gpu in GPUS.items() if short in name), None)
