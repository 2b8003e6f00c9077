"""Inputs for the tests of the loss: values, memory layouts, implementations, block sizes of the kernels."""

import importlib.util
import os
from collections.abc import Sequence

import pytest
import quick_interpreter
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()  # in processes that tests start, too

NAIVE = "naive"
TORCH = "torch"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"))
IMPLS = [NAIVE, TORCH, TRITON]
FAST_IMPLS = [TORCH, TRITON]  # the forms that owe float32 accuracy; the naive form owes it in float64
ANY_K_IMPLS = [NAIVE, TORCH]


def blocks(classes: int, features: int, *, itemsize: int = 4, channels_innermost: bool = False) -> set[int]:
    """Voxels per block of the kernels' three passes, as they choose them for this call."""
    from rplib.kernels import tiling

    weighting = tiling.weighting_tiles(classes, features, itemsize, channels_last=channels_innermost)
    gradient = tiling.gradient_tiles(classes, itemsize)
    return {
        tiling.statistics_tiles(classes, features, itemsize).block,
        weighting.groups * weighting.group,
        gradient.groups * gradient.group,
    }


def around(sizes: set[int]) -> list[int]:
    """Each size, one less and one more."""
    return sorted({size + step for size in sizes for step in (-1, 0, 1)})


def networks(
    spatial: Sequence[int],
    classes: int = 2,
    features: int | Sequence[int] = 16,
    *,
    batch: int = 2,
    count: int = 2,
    dtype: torch.dtype = torch.float32,
    feature_dtype: torch.dtype | None = None,
    scale: float = 2.0,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and features of ``count`` networks; ``features`` may differ per network. Features carry class structure."""
    generator = torch.Generator().manual_seed(seed)
    per_network = [features] * count if isinstance(features, int) else list(features)
    logits, feats = [], []
    for channels in per_network:
        z = scale * torch.randn(batch, classes, *spatial, generator=generator)
        f = torch.randn(batch, channels, *spatial, generator=generator)
        directions = torch.randn(classes, channels, generator=generator)
        f += directions[z.argmax(1)].movedim(-1, 1)
        logits.append(z.to(DEVICE, dtype))
        feats.append(f.to(DEVICE, feature_dtype or dtype))
    return logits, feats


# ------------------------------------------------------------------------------------------------------- memory layouts
# Each takes a contiguous (B, C, *spatial) tensor and gives one of the same shape whose strides are unusual.


def channels_last(x: Tensor) -> Tensor:
    """Channels innermost, for any number of spatial axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def spatial_slice(x: Tensor) -> Tensor:
    """Every second voxel of the last axis, away from the border, of a larger tensor filled with NaN elsewhere."""
    shape = [*x.shape[:2], *(n + 2 for n in x.shape[2:-1]), 2 * x.shape[-1] + 3]
    big = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    inner = big
    for axis in range(2, x.dim() - 1):
        inner = inner.narrow(axis, 1, x.shape[axis])
    inner = inner[..., 1 : 1 + 2 * x.shape[-1] : 2]
    inner.copy_(x)
    return inner


def channel_slice(x: Tensor) -> Tensor:
    big = torch.full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    big[:, 1::2] = x
    return big[:, 1::2]


def batch_slice(x: Tensor) -> Tensor:
    big = torch.full((2 * x.shape[0] + 1, *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
    big[1::2] = x
    return big[1::2]


def transposed(x: Tensor) -> Tensor:
    """All axes stored in reverse order."""
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def offset_storage(x: Tensor) -> Tensor:
    """Contiguous, but begins three elements into its storage, so not aligned to 16 bytes."""
    flat = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype, device=x.device)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)


def expanded_voxels(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def expanded_channels(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


LAYOUTS = {
    f.__name__: f
    for f in (
        channels_last,
        spatial_slice,
        channel_slice,
        batch_slice,
        transposed,
        offset_storage,
        expanded_voxels,
        expanded_batch,
    )
}
