"""`rplib info`: versions, machine, devices, and the implementation that `impl="auto"` selects and why."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

from rplib import __version__, dispatch

# Packages whose versions affect results or compatibility.
_PACKAGES = ("triton", "numpy", "monai", "h5py", "nibabel", "scipy", "matplotlib", "tensorboard")
# Variables that affect the implementation, its speed, or the device.
_VARIABLES = (
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
)

Report = dict[str, dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib info`."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    found = report()
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def report() -> Report:
    """The report as section -> name -> value, all text.

    >>> from rplib.info import report
    >>> sorted(report())
    ['auto', 'devices', 'environment', 'machine', 'packages', 'versions']
    >>> report()["auto"]["cpu"].partition(":")[0]
    'torch'
    """
    devices = _devices()
    return {
        "versions": {
            "rplib": f"{__version__} in {Path(__file__).resolve().parent}",
            "python": f"{platform.python_version()} ({platform.python_implementation()}) in {sys.prefix}",
            "torch": f"{torch.__version__} ({_build()})",
        },
        "packages": {name: _installed(name) for name in _PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": f"{_usable_cpus()} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": devices,
        "auto": {name: _auto_on(torch.device(name)) for name in devices},
    }


def as_text(found: Report) -> str:
    """The report as text."""
    width = max(len(name) for section in found.values() for name in section)
    lines = []
    for section, rows in found.items():
        title = 'impl="auto" selects, for K = 2 networks in half or single precision' if section == "auto" else section
        lines += [title, *(f"  {name:{width}}  {value}" for name, value in rows.items())]
        if not rows:
            lines.append("  (nothing set)")
    return "\n".join(lines)


def _build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    hip: str | None = torch.version.hip
    return f"ROCm {hip}" if hip else "no CUDA"


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> dict[str, str]:
    found = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.multi_processor_count} multiprocessors"
        )
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            found[f"xpu:{index}"] = torch.xpu.get_device_name(index)
    return found


def _auto_on(device: torch.device) -> str:
    # Dispatch depends on number, shapes, dtypes and devices, so real tensors on the device are needed.
    try:
        tensors = [torch.empty(1, 2, 1, device=device)] * 2  # (B, C, V)
    except RuntimeError as error:
        return f"not usable: {str(error).partition(chr(10))[0]}"
    obstacle = dispatch.triton_obstacle(tensors, tensors)
    if obstacle:
        return f"torch: {obstacle}"
    return f"triton: the kernels support this device; torch with {', '.join(dispatch.BEYOND_KERNELS)}"
