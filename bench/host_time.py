"""Host time of the loss: Python, PyTorch's dispatcher and Triton's launches, without the work on the GPU, on any machine.

    python -m rplib.bench.host_time [--rounds 30] [--calls 100]

A driver that launches nothing replaces that of the GPU: Triton looks up and compiles kernels as for sm_90, and skips only the
launch itself. What remains is the work of the host for one forward and backward pass. For comparison, two ``F.cross_entropy`` on
tensors of one voxel, whose computation is negligible, are timed in the same rounds. Times are processor times
(``time.process_time``), which depend less on other programs than wall-clock times.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rplib.bench.command import main
from rplib.errors import UserError

SHAPE = (2, 2, 16, 16, 16, 16)  # batch, classes, features, spatial axes; nothing is computed, so the size does not matter


def launch_nothing() -> None:
    """Make Triton compile for sm_90 and launch nothing, for the rest of the process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Nothing:
        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, *_: Any) -> None:
            pass

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.launcher_cls = Nothing
            self.utils = SimpleNamespace(
                load_binary=lambda *_: (object(), object(), 0, 0, 1024),
                get_device_properties=lambda _: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132},
            )

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return SimpleNamespace(current_device=lambda: 0)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    triton.runtime.driver.set_active(Driver())


def calls() -> dict[str, Callable[[], object]]:
    """The calls to time, each one forward and backward pass."""
    import rplib
    from rplib import dispatch

    launch_nothing()
    dispatch.device_obstacle = lambda *_, **__: None  # the tensors are on the CPU and nothing reads them
    batch, classes, features, *spatial = SHAPE
    z = [torch.zeros(batch, classes, *spatial, requires_grad=True) for _ in range(2)]
    f = [torch.zeros(batch, features, *spatial) for _ in range(2)]
    target = torch.zeros(1, *spatial, dtype=torch.uint8)
    loss_fn, objective = rplib.ReliableMutualLoss(impl="triton"), rplib.MutualObjective(impl="triton")
    small = [torch.zeros(1, classes, 1, 1, 1, requires_grad=True) for _ in range(2)]
    label = torch.zeros(1, 1, 1, 1, dtype=torch.int64)

    def backward(value: Tensor, of: list[Tensor]) -> None:
        torch.autograd.grad(value, of)

    return {
        "ReliableMutualLoss": lambda: backward(loss_fn(z, f), z),
        "MutualObjective": lambda: backward(objective(z, f, target, 0.1).total, z),
        "two F.cross_entropy": lambda: backward(sum(torch.nn.functional.cross_entropy(x, label) for x in small), small),  # type: ignore[arg-type]
    }


def measure(timed: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """Microseconds per call: the minimum of the rounds' means, with the rounds of all calls interleaved."""
    for call in timed.values():
        for _ in range(3):
            call()
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(rounds):
        for name, call in timed.items():
            start = time.process_time()
            for _ in range(count):
                call()
            best[name] = min(best[name], (time.process_time() - start) / count * 1e6)
    return best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=30, help="rounds of timing (default %(default)s)")
    parser.add_argument("--calls", type=int, default=50, help="calls per round (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise UserError("TRITON_INTERPRET is set, so there is no launch in this process; unset it and restart.")
    torch.set_num_threads(1)
    found = measure(calls(), args.rounds, args.calls)
    for name, microseconds in found.items():
        print(f"{name:<22}{microseconds:8.0f} us   {microseconds / found['two F.cross_entropy']:5.1f} x two F.cross_entropy")
    return 0


if __name__ == "__main__":
    sys.exit(main("host_time", __doc__, add_arguments, run))
