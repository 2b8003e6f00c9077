"""Bytes moved by the Triton form, counted in Triton's interpreter, in a separate process, on any machine.

The interpreter must be enabled before Triton is imported, so a process that times kernels on a GPU cannot count their bytes:
`metered` starts another one. It uses a smaller volume, because the interpreter needs about a millisecond per block; bytes per
voxel hardly depend on the size.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from math import prod

from rplib.bench.shapes import Case, Shape

_TIME_LIMIT = 600  # seconds
_MOST_VOXELS = 50_000


@dataclass(frozen=True)
class Metered:
    """Figures of one forward and backward pass.

    Attributes:
        volume: the size that was counted, as B x spatial.
        lane_bytes, sector_bytes: per voxel, loads and stores together (see `rplib.bench.traffic`).
        launches: of kernels.
        right, verdict: whether loss and gradient agree with the formula in float64, and the errors.
    """

    volume: str
    lane_bytes: float
    sector_bytes: float
    launches: int
    right: bool
    verdict: str


class MeterFailedError(Exception):
    """The subprocess gave no figures; the message is the reason, in one line."""


def reduced(case: Case) -> Case:
    """One sample, reduced to 32^3 or 128^2 voxels. Shapes that differ only in size become equal.

    >>> from rplib.bench.shapes import SHAPES
    >>> str(reduced(Case(SHAPES["left-atrium"])).shape)
    '1x2x16x32x32x32'
    """
    shape = case.shape
    most = 32 if len(shape.spatial) == 3 else 128
    spatial = shape.spatial if prod(shape.spatial) <= _MOST_VOXELS else tuple(min(size, most) for size in shape.spatial)
    return replace(case, shape=Shape("reduced", 1, shape.classes, shape.features, spatial))


def metered(case: Case) -> Metered:
    """Count the bytes of ``case`` (see `reduced`).

    Raises:
        MeterFailedError: Triton is missing, a kernel failed, or it took too long.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "rplib.bench.metered", json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise MeterFailedError(f"the interpreter took more than {_TIME_LIMIT} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MeterFailedError(lines[-1])
    return Metered(**json.loads(done.stdout.splitlines()[-1]))


def count(case: Case) -> Metered:
    """The figures, in a process started with TRITON_INTERPRET=1."""
    import torch

    import rplib
    from rplib.bench.correctness import Truth
    from rplib.bench.shapes import make_inputs
    from rplib.bench.traffic import kernel_traffic

    logits, features = make_inputs(case, torch.device("cpu"))
    loss_fn = rplib.ReliableMutualLoss(impl="triton")
    with kernel_traffic() as traffic:
        loss = loss_fn(logits, features)
        loss.backward()
    gradients = [z.grad for z in logits if z.grad is not None]
    verdict = Truth(logits, features).judge(loss, gradients, exact_order=True)
    shape = case.shape
    return Metered(
        volume="x".join(map(str, (shape.batch, *shape.spatial))),
        lane_bytes=traffic.lane_bytes / shape.voxels,
        sector_bytes=traffic.sector_bytes / shape.voxels,
        launches=traffic.launches,
        right=verdict.right,
        verdict=str(verdict),
    )


def main() -> int:
    fields = json.loads(sys.argv[1])
    shape = fields.pop("shape")
    case = Case(Shape(**{**shape, "spatial": tuple(shape["spatial"])}), **fields)
    print(json.dumps(asdict(count(case))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
