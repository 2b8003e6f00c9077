"""Checks of the arguments: shapes, dtypes, devices, and (on request) values."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

_STACK = " A stack of deep supervision outputs (B, outputs, C, *spatial)? Unpack it with rplib.unstack."
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    logits: Sequence[Tensor], features: Sequence[Tensor] | None, *, features_needed: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Check the tensors of K networks against each other, without looking at values, so that nothing synchronises.

    Returns:
        logits as a list, and features as a list, or None if they are neither needed nor given.

    Raises:
        TypeError: not a sequence of tensors, or a dtype that is not floating point.
        ValueError: numbers, shapes or devices do not fit together.
    """
    logits = _as_list("logits", logits)
    if len(logits) < 2:
        raise ValueError(f"logits holds {len(logits)} tensor; expected one per network, at least 2.")
    first = logits[0]
    if not 3 <= first.ndim <= 5:
        advice = " A stack of deep supervision outputs (B, outputs, C, *spatial) is unpacked by rplib.unstack."
        raise ValueError(
            f"logits[0] has shape {_shape(first)}; expected (B, C, *spatial) with 1 to 3 spatial axes."
            + (advice if first.ndim == 6 else "")
        )
    if first.shape[1] < 2:
        raise ValueError(
            f"logits[0] has shape {_shape(first)}, so C = {first.shape[1]}; expected at least 2 classes "
            "(a single foreground channel becomes two with torch.cat([torch.zeros_like(z), z], dim=1))."
        )
    if first.numel() == 0:
        raise ValueError(f"logits[0] has shape {_shape(first)}; expected at least one sample and one voxel.")
    for k, z in enumerate(logits):
        if z.shape != first.shape:
            raise ValueError(f"logits[{k}] has shape {_shape(z)} but logits[0] has {_shape(first)}; expected equal shapes.")
    if features is None:
        if features_needed:
            raise ValueError(
                'features is None but weighting="similarity" needs one tensor (B, F, *spatial) per network; '
                "pass the input of the last 1x1x1 convolution, or weighting=None."
            )
        _check_devices(logits, [])
        return logits, None
    features = _as_list("features", features)
    if len(features) != len(logits):
        raise ValueError(
            f"features holds {len(features)} tensors but logits holds {len(logits)}; expected one of each per network."
        )
    for k, f in enumerate(features):
        if f.ndim != first.ndim or f.shape[0] != first.shape[0] or f.shape[2:] != first.shape[2:]:
            stacked = f.shape[2:] == first.shape[3:] and f.ndim == first.ndim - 1
            raise ValueError(
                f"features[{k}] has shape {_shape(f)} but logits[0] has {_shape(first)}; "
                "expected (B, F, *spatial) with the same batch and spatial sizes." + (_STACK if stacked else "")
            )
        if f.shape[1] < 1:
            raise ValueError(f"features[{k}] has shape {_shape(f)}; expected at least one feature channel.")
    _check_devices(logits, features)
    return logits, features


def plain(tensor: Tensor) -> Tensor:
    """The tensor without a subclass that only adds metadata (MONAI's MetaTensor): the same memory and graph.

    Subclasses with their own dispatch (DTensor, FakeTensor) are kept.
    """
    kind: Any = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not cast(Any, Tensor).__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


def valid_only(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Set the tensor to 0 where ``keep`` (broadcast to it) is False, even if NaN, with a gradient of 0; None keeps all."""
    return tensor if keep is None else torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def check_mask(mask: Tensor | None, z: Tensor) -> Tensor | None:
    """The mask of valid voxels for logits z (B, C, *spatial), as (B, *spatial) bool.

    Raises:
        TypeError, ValueError: states what was given and what was expected.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; expected a bool tensor (B, *spatial), True where a voxel counts.")
    mask = plain(mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, True where a voxel counts (mask > 0 makes one).")
    shape = (z.shape[0], *z.shape[2:])
    if tuple(mask.shape) == (z.shape[0], 1, *z.shape[2:]):
        mask = mask.squeeze(1)
    if tuple(mask.shape) != shape:
        stacked = tuple(mask.shape) in ((z.shape[0], *z.shape[3:]), (z.shape[0], 1, *z.shape[3:]))
        raise ValueError(
            f"mask has shape {_shape(mask)} but logits[0] has {_shape(z)}; expected {shape}." + (_STACK if stacked else "")
        )
    if mask.device != z.device:
        raise ValueError(f"mask is on {mask.device} but logits[0] is on {z.device}; expected one device for all.")
    return mask.detach()


def check_sample_weights(weights: Tensor | Sequence[float] | None, z: Tensor) -> Tensor | None:
    """Factors of the B samples of logits z (B, C, *spatial), as (B,) on their device.

    Raises:
        TypeError, ValueError: states what was given and what was expected.
    """
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        try:
            weights = torch.as_tensor(weights, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"sample_weights is {weights!r}; expected B numbers, or a tensor (B,).") from error
        weights = weights.to(z.device)
    weights = plain(weights)
    if weights.dtype.is_complex or weights.dtype == torch.bool:
        raise TypeError(f"sample_weights has dtype {weights.dtype}; expected real numbers (B,).")
    if tuple(weights.shape) != (z.shape[0],):
        raise ValueError(
            f"sample_weights has shape {_shape(weights)} but logits[0] has {_shape(z)}; expected one number per sample: "
            f"({z.shape[0]},)."
        )
    if weights.device != z.device:
        raise ValueError(f"sample_weights is on {weights.device} but logits[0] is on {z.device}; expected one device for all.")
    looking = weights.device.type == "cpu" and looks_allowed(weights.device)
    if looking and not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError(f"sample_weights is {weights.tolist()}; expected finite non-negative numbers.")
    return weights.detach()


def looks_allowed(device: torch.device) -> bool:
    """False where values cannot be read: under torch.compile and CUDA graph capture."""
    if torch.compiler.is_compiling():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def check_finite(logits: Sequence[Tensor], features: Sequence[Tensor] | None, mask: Tensor | None = None) -> None:
    """Look for NaN and infinities at the voxels that count; synchronises with the device.

    A logit of -inf (a class that is ruled out) is allowed: the formula is defined there, and infinite where that class is the
    pseudo-label or the target.

    Raises:
        ValueError: names the tensor and the number of its non-finite values.
        RuntimeError: called under torch.compile or CUDA graph capture, where values cannot be read.
    """
    if not looks_allowed(logits[0].device):
        raise RuntimeError(
            "check_finite=True reads values, which is not possible under torch.compile and CUDA graph capture; "
            "pass check_finite=False there."
        )
    keep = None if mask is None else mask.unsqueeze(1)
    for k, z in enumerate(logits):
        z = valid_only(z, keep)
        bad = int((z.isnan() | z.isposinf()).sum())
        if bad:
            raise ValueError(f"logits[{k}] has {bad} NaN or +inf of {z.numel()} values; expected finite values.")
    for k, f in enumerate(features or ()):
        bad = f.numel() - int(valid_only(f, keep).isfinite().sum())
        if bad:
            raise ValueError(f"features[{k}] has {bad} NaN or infinite of {f.numel()} values; expected finite values.")


def _as_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} is a {type(tensors).__name__}; expected a list or tuple with one tensor per network.")
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{k}] is a {type(tensor).__name__}; expected a torch.Tensor.")
        if tensor.dtype not in _FLOATING:
            raise TypeError(
                f"{name}[{k}] has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64 "
                "(raw network outputs, not labels)."
            )
    return [plain(tensor) for tensor in tensors]


def _check_devices(logits: list[Tensor], features: list[Tensor]) -> None:
    device = logits[0].device
    for name, tensors in (("logits", logits), ("features", features)):
        for k, tensor in enumerate(tensors):
            if tensor.device != device:
                raise ValueError(f"{name}[{k}] is on {tensor.device} but logits[0] is on {device}; expected one device for all.")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
