"""From tensors to launches: strides, grids, outputs. Nothing here copies, synchronises or looks at values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rplib.kernels import tiling
from rplib.kernels.gradient import gradient_kernel
from rplib.kernels.statistics import prototypes_kernel, statistics_kernel
from rplib.kernels.weighting import loss_kernel, weighting_kernel

_INT32_LIMIT = 2**31 - 1
# Programs per multiprocessor that walk over the voxels; the reduction then reads kilobytes.
_PROGRAMS_PER_MULTIPROCESSOR = 8
_PROGRAMS_WITHOUT_GPU = 4


class Statistics(NamedTuple):
    """What the first pass knows: prototypes (B, C, F) float32 per network, counts (2,) int64, poison 0-dim float32."""

    prototypes_a: Tensor
    prototypes_b: Tensor
    counts: Tensor
    poison: Tensor


class _Strides(NamedTuple):
    """Of a tensor (B, channels, *spatial), its spatial axes padded with ones to three."""

    batch: int
    channel: int
    axis0: int
    axis1: int
    axis2: int


def statistics(
    logits: Sequence[Tensor], features: Sequence[Tensor] | None, confidence: str | None, eps: float
) -> Statistics:
    """Run the first pass: 2 launches."""
    za, zb = logits
    batch, classes = za.shape[:2]
    voxels, size1, size2 = _sizes(za)
    read = [*logits, *(features or [])]
    flat, wide = _addressing(read, voxels)
    f_a, f_b = _channels(features)
    tiles = tiling.statistics_tiles(classes, max(f_a, f_b))
    programs, per_program = _split(voxels, tiles.block, batch, za.device)
    feature_blocks = max(1, -(-max(f_a, f_b) // tiles.feature_block))
    new = za.new_empty
    sums_a = new((batch, programs, classes, f_a), dtype=torch.float32)
    sums_b = new((batch, programs, classes, f_b), dtype=torch.float32)
    members = new((2, batch, programs, classes), dtype=torch.int32)
    counts = new((2, batch, programs), dtype=torch.int32)
    poison = new((batch, programs, feature_blocks), dtype=torch.float32)
    fa, fb = features if features else (za, zb)  # not read without features
    with _on(za):
        _launch(
            statistics_kernel, (programs, batch, feature_blocks),
            za, zb, fa, fb, sums_a, sums_b, members, counts, poison,
            voxels, size1, size2, *_strides(za, flat), *_strides(zb, flat), *_strides(fa, flat), *_strides(fb, flat),
            per_program,
            EPS=eps, CLASSES=classes, CLASSES_PAD=tiles.classes_pad, CLASSES_DOT=tiles.classes_dot,
            FEATURES_A=f_a, FEATURES_B=f_b, FEATURE_BLOCK=tiles.feature_block, BLOCK=tiles.block,
            CONFIDENCE=confidence or "none", WITH_FEATURES=features is not None, DOT=tiles.dot, FLAT=flat, WIDE=wide,
            num_warps=tiles.warps,
        )  # fmt: skip
        prototypes_a = new((batch, classes, f_a), dtype=torch.float32)
        prototypes_b = new((batch, classes, f_b), dtype=torch.float32)
        total = new((2,), dtype=torch.int64)
        all_poison = new((), dtype=torch.float32)
        features_pad = tiling.power_of_two(max(f_a, f_b, 1))
        grid = (2 * batch * classes + 1,) if features else (1,)
        _launch(
            prototypes_kernel, grid,
            sums_a, sums_b, members, counts, poison, prototypes_a, prototypes_b, total, all_poison,
            batch, programs, poison.numel(),
            EPS=eps, CLASSES=classes, FEATURES_A=f_a, FEATURES_B=f_b, FEATURES_PAD=features_pad,
            ROWS=max(1, 2048 // features_pad), COUNT_BLOCK=1024, WITH_FEATURES=features is not None,
            num_warps=4,
        )  # fmt: skip
    return Statistics(prototypes_a, prototypes_b, total, all_poison)


def weighting(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    known: Statistics,
    confidence: str | None,
    on_logits: bool,
    eps: float,
    *,
    with_record: bool,
) -> tuple[Tensor, Tensor]:
    """Run the second pass, 2 launches: the loss, 0-dim float32, and the record (planes, B, padded V) float32."""
    za = logits[0]
    record = za.new_empty(record_shape(za, confidence, with_record), dtype=torch.float32)
    numerators = _weight(logits, features, known, confidence, on_logits, eps, record=record, maps=None)
    loss = za.new_empty((), dtype=torch.float32)
    with _on(za):
        _launch(
            loss_kernel, (1,),
            numerators, known.counts, known.poison, loss, numerators[0].numel(), EPS=eps, BLOCK=1024, num_warps=4
        )
    return loss, record


def record_shape(z: Tensor, confidence: str | None, with_record: bool) -> tuple[int, int, int]:
    """(planes, B, V rounded up to whole sectors); no planes unless wanted."""
    planes = (2 if confidence is None else 1) if with_record else 0
    voxels = _sizes(z)[0]
    return planes, z.shape[0], -(-voxels // tiling.RECORD_ALIGNMENT) * tiling.RECORD_ALIGNMENT


def maps(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    known: Statistics,
    confidence: str | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Run the second pass for its weights (2, B, V) float32 and masks (2, B, V) int8, student a first."""
    za = logits[0]
    shape = (2, za.shape[0], _sizes(za)[0])
    weights = za.new_empty(shape, dtype=torch.float32)
    masks = za.new_empty(shape, dtype=torch.int8)
    _weight(logits, features, known, confidence, True, eps, record=None, maps=(weights, masks))
    return weights, masks


def _weight(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    known: Statistics,
    confidence: str | None,
    on_logits: bool,
    eps: float,
    *,
    record: Tensor | None,
    maps: tuple[Tensor, Tensor] | None,
) -> Tensor:
    za, zb = logits
    batch, classes = za.shape[:2]
    voxels, size1, size2 = _sizes(za)
    flat, wide = _addressing([*logits, *(features or [])], voxels)
    f_a, f_b = _channels(features)
    fa, fb = features if features else (za, zb)
    tiles = tiling.weighting_tiles(
        classes, max(f_a, f_b), max(fa.element_size(), fb.element_size()), channels_last=fa.stride(1) == 1
    )
    programs, per_program = _split(voxels, tiles.groups * tiles.group, batch, za.device)
    numerators = za.new_empty((2, batch, programs), dtype=torch.float32)
    # Pointers that a variant of the kernel does not touch still need a tensor.
    weights, masks = maps if maps else (numerators, known.counts)
    with_record = record is not None and record.numel() > 0
    record_stride = record.shape[2] if record is not None else 0
    with _on(za):
        _launch(
            weighting_kernel, (programs, batch),
            za, zb, fa, fb, known.prototypes_a, known.prototypes_b,
            numerators, record if with_record else numerators, weights, masks,
            voxels, record_stride, size1, size2,
            *_strides(za, flat), *_strides(zb, flat), *_strides(fa, flat), *_strides(fb, flat), per_program,
            EPS=eps, CLASSES=classes, CLASSES_PAD=tiles.classes_pad,
            FEATURES_A=f_a, FEATURES_B=f_b, FEATURE_BLOCK=tiles.feature_block,
            GROUPS=tiles.groups, GROUP=tiles.group, CONFIDENCE=confidence or "none",
            WITH_FEATURES=features is not None, ON_LOGITS=on_logits, WITH_RECORD=with_record, WITH_MAPS=maps is not None,
            UNROLL=tiles.unroll, FLAT=flat, WIDE=wide,
            num_warps=tiles.warps,
        )  # fmt: skip
    return numerators


def gradient(
    upstream: Tensor,
    known_counts: Tensor,
    poison: Tensor,
    record: Tensor,
    logits: Sequence[Tensor],
    on_logits: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Run the backward pass, 1 launch: gradients with the shapes and dtypes of the logits."""
    za, zb = logits
    batch, classes = za.shape[:2]
    voxels, size1, size2 = _sizes(za)
    grads = torch.empty_like(za), torch.empty_like(zb)
    flat, wide = _addressing([*logits, *grads], voxels)
    tiles = tiling.gradient_tiles(classes)
    with _on(za):
        _launch(
            gradient_kernel, (-(-voxels // tiles.block), batch),
            upstream, known_counts, poison, record, za, zb, *grads,
            voxels, record.shape[2], size1, size2,
            *_strides(za, flat), *_strides(zb, flat), *_strides(grads[0], flat), *_strides(grads[1], flat),
            EPS=eps, CLASSES=classes, CLASSES_PAD=tiles.classes_pad, BLOCK=tiles.block,
            BOTH=record.shape[0] == 2, ON_LOGITS=on_logits, FLAT=flat, WIDE=wide,
            num_warps=tiles.warps,
        )  # fmt: skip
    return grads


class Launch(NamedTuple):
    """One launch: kernel[grid](*arguments, **constants)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_observers: list[Callable[[Launch], bool]] = []


@contextmanager
def observed(observer: Callable[[Launch], bool]) -> Iterator[None]:
    """Show every launch to ``observer`` first; where it returns False the kernel is not run.

    For instruments: counting launches, and compiling for a GPU that is not there.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    launch = Launch(kernel, grid, arguments, constants)
    run = True
    for observer in _observers:
        run = observer(launch) and run
    if run:
        kernel[grid](*arguments, **constants)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _sizes(z: Tensor) -> tuple[int, int, int]:
    """Voxels per sample, and the sizes of the last two of three spatial axes."""
    spatial = (1, 1, *z.shape[2:])[-3:]
    voxels = spatial[0] * spatial[1] * spatial[2]
    if voxels > _INT32_LIMIT:
        raise ValueError(f"a sample of shape {tuple(z.shape[2:])} has {voxels} voxels; the kernels take fewer than 2^31.")
    return voxels, spatial[1], spatial[2]


def _channels(features: Sequence[Tensor] | None) -> tuple[int, int]:
    return (features[0].shape[1], features[1].shape[1]) if features else (0, 0)


def _strides(t: Tensor, flat: bool) -> _Strides:
    batch, channel, *spatial = t.stride()
    if flat:  # the kernel uses the last axis alone
        return _Strides(batch, channel, 0, 0, _flat_stride(t))
    axes = (0, 0, *spatial)[-3:]
    return _Strides(batch, channel, axes[0], axes[1], axes[2])


def _is_flat(t: Tensor) -> bool:
    """True where the spatial axes collapse into one axis of constant stride."""
    axes = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size > 1]
    return all(s == next_size * next_s for (_, s), (next_size, next_s) in pairwise(axes))


def _flat_stride(t: Tensor) -> int:
    axes = [stride for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size > 1]
    return axes[-1] if axes else 1


def _addressing(tensors: Sequence[Tensor], voxels: int) -> tuple[bool, bool]:
    """(all are flat, some sample spans more elements than int32 counts)."""
    spans = (
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors
    )
    # A block may compute (never read) addresses up to a block beyond the last voxel.
    return all(_is_flat(t) for t in tensors), any(2 * span > _INT32_LIMIT for span in spans)


def _split(voxels: int, block: int, batch: int, device: torch.device) -> tuple[int, int]:
    """(programs per sample, whole blocks per program); the last program also takes the ragged tail."""
    blocks = max(1, voxels // block)
    wanted = max(1, _programs(device) // batch) if device.type != "cpu" else _PROGRAMS_WITHOUT_GPU
    per_program = -(-blocks // wanted)
    return -(-blocks // per_program), per_program


@cache
def _programs(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count) * _PROGRAMS_PER_MULTIPROCESSOR
    return 1024
