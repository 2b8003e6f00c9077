"""From counts to a time: the maximum over three parts of a GPU. README.md lists what this ignores.

>>> needed = Needs(instructions=8.0, shared_passes=0.5, bytes=144.0)  # of a voxel, say
>>> {part: f"{1e12 * seconds:.1f} ps" for part, seconds in times(needed, GPUS["H200"]).items()}
{'issue': '8.9 ps', 'shared': '2.2 ps', 'memory': '30.0 ps'}
"""

from typing import NamedTuple


class GPU(NamedTuple):
    """multiprocessors; clock in Hz, as sustained under load; memory bandwidth in bytes/s, as stated by the manufacturer."""

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
    """Seconds that each part of the GPU is busy, with all multiprocessors in use."""
    return {
        "issue": needs.instructions / (_SCHEDULERS * gpu.multiprocessors * gpu.clock),
        "shared": needs.shared_passes / (gpu.multiprocessors * gpu.clock),
        "memory": needs.bytes / gpu.bandwidth,
    }


def predicted(needs: Needs, gpu: GPU) -> float:
    """Seconds: the busiest part hides the others."""
    return max(times(needs, gpu).values())


def gpu_named(name: str) -> GPU | None:
    """The known GPU with this driver name, or None.

    >>> gpu_named("NVIDIA H100 80GB HBM3").name
    'H100'
    >>> gpu_named("NVIDIA GeForce RTX 3090") is None
    True
    """
    return next((gpu for short, gpu in GPUS.items() if short in name), None)
