"""Checks of what a caller passes: shapes, dtypes, devices, and (on request) values."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    logits: Sequence[Tensor], features: Sequence[Tensor] | None, *, features_needed: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Check the tensors of K networks against each other; nothing here looks at values, so nothing synchronises.

    Returns:
        logits as a list, features as a list, or None where they are neither needed nor given.

    Raises:
        TypeError: not a sequence of tensors, or a dtype that is not floating point.
        ValueError: numbers, shapes or devices that do not fit together.
    """
    logits = _as_list("logits", logits)
    if len(logits) < 2:
        raise ValueError(f"logits holds {len(logits)} tensor; expected one per network, at least 2.")
    first = logits[0]
    if not 3 <= first.ndim <= 5:
        raise ValueError(f"logits[0] has shape {_shape(first)}; expected (B, C, *spatial) with 1 to 3 spatial axes.")
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
                "pass what the last 1x1x1 convolution reads, or weighting=None."
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
            raise ValueError(
                f"features[{k}] has shape {_shape(f)} but logits[0] has {_shape(first)}; "
                "expected (B, F, *spatial) with the same batch and spatial sizes."
            )
        if f.shape[1] < 1:
            raise ValueError(f"features[{k}] has shape {_shape(f)}; expected at least one feature channel.")
    _check_devices(logits, features)
    return logits, features


def check_finite(logits: Sequence[Tensor], features: Sequence[Tensor] | None) -> None:
    """Look for NaN and infinities; synchronises with the device.

    A logit of -inf (a class that is ruled out) is allowed: the formula is defined there.

    Raises:
        ValueError: names the tensor and says how many of its values are bad.
        RuntimeError: called under torch.compile or CUDA graph capture, where a look at values is impossible.
    """
    if torch.compiler.is_compiling() or (logits[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            "check_finite=True looks at values, which torch.compile and CUDA graph capture cannot do; "
            "pass check_finite=False there."
        )
    for k, z in enumerate(logits):
        bad = int((z.isnan() | z.isposinf()).sum())
        if bad:
            raise ValueError(f"logits[{k}] has {bad} NaN or +inf of {z.numel()} values; expected finite values.")
    for k, f in enumerate(features or ()):
        bad = f.numel() - int(f.isfinite().sum())
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
    return list(tensors)


def _check_devices(logits: list[Tensor], features: list[Tensor]) -> None:
    device = logits[0].device
    for name, tensors in (("logits", logits), ("features", features)):
        for k, tensor in enumerate(tensors):
            if tensor.device != device:
                raise ValueError(f"{name}[{k}] is on {tensor.device} but logits[0] is on {device}; expected one device for all.")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_target(target: Tensor, z: Tensor) -> int:
    """B_l, the number of labelled samples, of a target that belongs to logits z (B, C, *spatial).

    Raises:
        TypeError, ValueError: says what came and what was expected.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target is a {type(target).__name__}; expected a torch.Tensor of class indices.")
    labelled = target.shape[0] if target.ndim else 0
    spatial = tuple(z.shape[2:])
    fits = tuple(target.shape[1:]) in (spatial, (1, *spatial))
    if not fits or labelled > z.shape[0]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but logits[0] has {tuple(z.shape)}; expected (B_l, *spatial) "
            f"or (B_l, 1, *spatial) with B_l <= {z.shape[0]}."
        )
    if target.device != z.device:
        raise ValueError(f"target is on {target.device} but logits[0] is on {z.device}; expected one device for all.")
    return labelled


def check_dice_classes(classes: Sequence[int] | None, z: Tensor) -> None:
    """Refuse classes that logits z (B, C, *spatial) do not have."""
    if classes is not None and max(classes) >= z.shape[1]:
        raise ValueError(f"dice_classes is {tuple(classes)} but logits[0] has {z.shape[1]} classes.")
