"""Which implementation computes a call, and why."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from rplib.averages import NOTHING, Extras
from rplib.options import Implementation, Options


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


_TRITON_INSTALLED = _is_installed("triton")

Form = Literal["triton", "torch", "naive"]

# The oldest GPUs that Triton supports; on older ones the lean form is used.
_OLDEST_COMPUTE_CAPABILITY = (7, 5)
# Tiles hold all classes (and a slice of the features) of a block of voxels in registers.
MOST_CLASSES = 64
MOST_FEATURES = 1024

# Options that the kernels do not support: under ``impl="auto"`` a call with one of these uses the lean form on a GPU too.
BEYOND_KERNELS = {
    "mask": "the kernels take no mask",
    "sample_weights": "the kernels take no sample_weights",
    "students": "the kernels teach every network, and students= names some",
    "ignore_index": "the kernels know no ignore_index",
    "labelled": "the kernels take the first samples of the batch as the labelled ones",
    "minimum_confidence": "the kernels know no minimum_confidence",
    "temperature": "the kernels know no temperature but 1",
    "class_weights": "the kernels know no class_weights",
    "prototypes": 'the kernels make prototypes per "sample"',
    "reduction": 'the kernels compute reduction="mean"',
}


def choose(
    impl: Implementation,
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    asked: Sequence[str] = (),
) -> Form:
    """The form that computes this call.

    Args:
        asked: names in `BEYOND_KERNELS` of the options that the call uses.

    Raises:
        ValueError: ``impl="triton"`` is not possible; states why and what to use instead.
    """
    if impl == "naive" or impl == "torch":
        return impl
    obstacle = triton_obstacle(logits, features, explicit=impl == "triton", asked=asked)
    if impl == "triton" and obstacle:
        raise ValueError(f'impl="triton" is impossible here: {obstacle}; use impl="torch" or impl="auto".')
    return "torch" if obstacle else "triton"


def asked_of(options: Options, mask: Tensor | None, extras: Extras = NOTHING) -> list[str]:
    """Names in `BEYOND_KERNELS` of the options that a call of the loss uses."""
    used = {
        "mask": mask is not None,
        "sample_weights": extras.sample_weights is not None,
        "students": options.students is not None,
        "minimum_confidence": options.minimum_confidence is not None,
        "temperature": options.temperature != 1,
        "class_weights": options.class_weights is not None,
        "prototypes": options.prototypes != "sample" and options.weighting is not None,
        "reduction": options.reduction != "mean",
    }
    return [name for name, asked in used.items() if asked]


def triton_obstacle(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    *,
    explicit: bool = False,
    asked: Sequence[str] = (),
) -> str | None:
    """Why the kernels cannot compute this call, or None.

    Args:
        explicit: the kernels were requested by name, so Triton's interpreter may be used on a CPU.
        asked: names in `BEYOND_KERNELS` of the options that the call uses.
    """
    if asked:
        return BEYOND_KERNELS[asked[0]]
    everything = [*logits, *(features or ())]
    if len(logits) != 2:
        return f"the kernels take K = 2 networks, got {len(logits)}"
    for tensor in everything:
        if tensor.dtype == torch.float64:
            return "the kernels compute in float32 and the input is float64"
        if type(tensor).__name__ == "DTensor":
            return "the input is a DTensor and the kernels take local tensors (tensor.to_local())"
    if logits[0].shape[1] > MOST_CLASSES:
        return f"the kernels take up to {MOST_CLASSES} classes, got {logits[0].shape[1]}"
    if any(f.shape[1] > MOST_FEATURES for f in features or ()):
        return f"the kernels take up to {MOST_FEATURES} feature channels"
    voxels = logits[0][0, 0].numel()
    if voxels >= 2**31:
        return f"a sample has {voxels} voxels and the kernels take fewer than 2^31"
    return device_obstacle(logits[0].device, explicit=explicit)


def device_obstacle(device: torch.device, *, explicit: bool = False) -> str | None:
    """Why the kernels cannot run on this device at all, or None."""
    if not triton_installed():
        return 'Triton is not installed (GPU builds of torch bring it; else pip install "rplib[triton]", Linux)'
    if device.type == "cuda":
        # torch.compile cannot trace this query, and needs such a GPU for its own Triton code anyway.
        return None if torch.compiler.is_compiling() else _cuda_obstacle(device.index) or _compiler_obstacle()
    if device.type == "xpu":
        return None if torch.compiler.is_compiling() else _compiler_obstacle()
    if device.type == "cpu":
        if explicit and interpreting():
            return None
        hint = " (TRITON_INTERPRET=1 would run the kernels in Triton's interpreter, slowly, for debugging)" if explicit else ""
        return "the tensors are on the CPU" + hint
    return f"there are no Triton kernels for device {device.type!r}"


def triton_installed() -> bool:
    """True if ``import triton`` would find a package."""
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """True if Triton runs its kernels in its interpreter (set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _cuda_obstacle(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_COMPUTE_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, Triton needs 7.5"
    return None


@cache
def _compiler_obstacle() -> str | None:
    """Triton compiles a small C program for every kernel that it launches."""
    if os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang")):
        return None
    return "Triton needs a C compiler and finds neither gcc nor clang (install one, or name it in the environment variable CC)"
