"""Choice of device, and numerical precision on GPUs."""

import contextlib
import os
from collections.abc import Iterator

import torch

from rplib.errors import UserError


def find_device(device: str | torch.device | None) -> torch.device:
    """A device that works on this machine; None selects cuda if available, else cpu.

    Raises:
        UserError: the device is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except Exception as error:  # torch raises RuntimeError, AssertionError, NotImplementedError, by device and build
        reason = str(error).strip().splitlines()[0][:120]
        raise UserError(f"--device {device} does not work on this machine ({reason}); use cpu, or omit --device.") from error
    return found


@contextlib.contextmanager
def numerics(device: torch.device, deterministic: bool = False, tf32: bool = False, search: bool = True) -> Iterator[None]:
    """Set how a GPU computes within the context; restores the settings afterwards.

    Args:
        deterministic: use algorithms that give identical results on every run.
        tf32: use TensorFloat-32 in convolutions and matrix products.
        search: let cuDNN benchmark its algorithms and use the fastest (ignored if `deterministic`).
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    cudnn.benchmark = device.type == "cuda" and search and not deterministic
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[1:]
