"""The passes over the voxels, from tensors to launches: statistics (2 launches), weighting (2), gradient (1)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rplib.kernels import tiling
from rplib.kernels.gradient import gradient_kernel
from rplib.kernels.launch import (
    ALIGNED,
    ANY,
    LAST,
    PACKED,
    Geometry,
    addressing,
    architecture,
    channels,
    current_device,
    geometry,
    launch,
    layout_of,
    sizes,
    split,
)
from rplib.kernels.prototypes import prototypes_kernel
from rplib.kernels.rules import Rules
from rplib.kernels.statistics import statistics_kernel
from rplib.kernels.total import loss_kernel
from rplib.kernels.weighting import weighting_kernel


class Statistics(NamedTuple):
    """Results of the first pass.

    prototypes_a, prototypes_b: (B, C, F) float32. counts: int64, (2,) reliable voxels of student a and b, or with
    ``rules.detailed`` (3 + 2 C,), see prototypes_kernel. sums: float32, (1,), 0 or NaN for non-finite input, and with a target
    the sums of dice.py. A reduction over ranks adds counts and sums.
    """

    prototypes_a: Tensor
    prototypes_b: Tensor
    counts: Tensor
    sums: Tensor


class Batch(NamedTuple):
    """The tensors of a call.

    logits: (B, C, *spatial) of both networks. features: (B, F, *spatial) of both, or None. target: (B_l, *spatial) or
    (B_l, 1, *spatial), classes of the first B_l samples; None: no supervised term. B_l may be 0, since another rank may have
    labels. mask: (B, *spatial) bool, True where a voxel counts, or None for everywhere. sample_weights: (B,) float32 or None.
    order: (B,) int32, indices of the samples, those with a target first, or None where they are the first ones.
    """

    logits: Sequence[Tensor]
    features: Sequence[Tensor] | None = None
    target: Tensor | None = None
    mask: Tensor | None = None
    sample_weights: Tensor | None = None
    order: Tensor | None = None

    @property
    def labels(self) -> Tensor | None:
        """The target as (B_l, 1, *spatial), of a type that the kernels read."""
        target = self.target
        if target is None:
            return None
        if target.ndim < self.logits[0].ndim:
            target = target.unsqueeze(1)
        return target.view(torch.uint8) if target.dtype == torch.bool else target

    @property
    def kept(self) -> Tensor | None:
        """The mask as (B, 1, *spatial) uint8."""
        return None if self.mask is None else self.mask.unsqueeze(1).view(torch.uint8)

    @property
    def labelled(self) -> int:
        return 0 if self.target is None else self.target.shape[0]


class Weights(NamedTuple):
    """Weights of the terms: the total is dice_weight * supervised + mutual_factor * mutual_weight * mutual.

    mutual_weight: a 0-dim tensor or None for 1.
    """

    dice_weight: float = 0.0
    mutual_factor: float = 1.0
    mutual_weight: Tensor | None = None


class Record(NamedTuple):
    """Results of the second pass for the backward pass, see weighting.py.

    values: (B + samples with two planes, V rounded up to whole sectors) float32; code: (B, the same) uint8 for C > 2.
    """

    values: Tensor
    code: Tensor


MUTUAL_ALONE = Weights()


def statistics(batch: Batch, rules: Rules) -> Statistics:
    """Run the first pass: 2 launches."""
    za, zb = batch.logits
    samples, classes = za.shape[:2]
    voxels, size1, size2 = sizes(za)
    labels, labelled, mask = batch.labels, batch.labelled, batch.kept
    f_a, f_b = channels(batch.features)
    fa, fb = batch.features if batch.features else (za, zb)  # not read without features
    g_za, g_zb, g_fa, g_fb = geometries = [geometry(t) for t in (za, zb, fa, fb)]
    g_labels = None if labels is None else geometry(labels)
    g_mask = None if mask is None else geometry(mask)
    flat, wide = addressing([*geometries, *(g for g in (g_labels, g_mask) if g is not None)])
    z_layout, f_layout = layout_of(geometries[:2]), layout_of(geometries[2:])
    tiles = tiling.statistics_tiles(
        classes, max(f_a, f_b), max(t.element_size() for t in (za, zb, fa, fb)),
        channels_last=f_layout in (LAST, PACKED), aligned=f_layout != ANY, plain=flat and not wide,
        dice=labels is not None, architecture=architecture(za.device),
    )  # fmt: skip
    programs, per_program = split(voxels, tiles.block, samples, za.device)
    feature_blocks = max(1, -(-max(f_a, f_b) // tiles.feature_block))
    new = za.new_empty
    sums_a = new((samples, programs, classes, f_a), dtype=torch.float32)
    sums_b = new((samples, programs, classes, f_b), dtype=torch.float32)
    members = new((3, samples, programs, classes), dtype=torch.int32)
    counts = new((3 if rules.detailed else 2, samples, programs), dtype=torch.int32)
    nonfinite = new((samples, programs, feature_blocks), dtype=torch.float32)
    dice = new((labelled, programs, 4 * classes + (2 if rules.entropy else 0)), dtype=torch.float32)
    with current_device(za):
        launch(
            statistics_kernel, (programs * samples, feature_blocks),
            za, zb, fa, fb, za if labels is None else labels, za if mask is None else mask, _order(batch),
            sums_a, sums_b, members, dice, counts, nonfinite,
            labelled, voxels, size1, size2, *_strides(g_labels, flat), *_strides(g_mask, flat),
            *g_za.axes(flat), *g_zb.axes(flat), *g_fa.axes(flat), *g_fb.axes(flat), programs, per_program,
            CLASSES=classes, CLASSES_PAD=tiles.classes_pad, CLASSES_DOT=tiles.classes_dot,
            FEATURES_A=f_a, FEATURES_B=f_b, FEATURE_BLOCK=tiles.feature_block, BLOCK=tiles.block,
            VECTOR=tiles.vector, VOXEL_GROUPS=tiles.voxel_groups, FEATURE_GROUPS=tiles.feature_groups,
            WITH_FEATURES=batch.features is not None, DOT=tiles.dot, IN_REGISTERS=tiles.in_registers, RULES=rules,
            Z_LAYOUT=z_layout, F_LAYOUT=f_layout, M_LAYOUT=_mask_layout(g_mask), FLAT=flat, WIDE=wide, num_warps=tiles.warps,
        )  # fmt: skip
        prototypes_a = new((samples, classes, f_a), dtype=torch.float32)
        prototypes_b = new((samples, classes, f_b), dtype=torch.float32)
        all_counts = new(counts_shape(classes, rules), dtype=torch.int64)
        all_sums = new(sums_shape(classes, rules), dtype=torch.float32)
        features_pad = tiling.power_of_two(max(f_a, f_b, 1))
        grid = (2 * samples * classes if batch.features else 0) + all_sums.numel() + (2 * classes if rules.detailed else 0)
        launch(
            prototypes_kernel, (grid,),
            sums_a, sums_b, members, counts, nonfinite, dice, prototypes_a, prototypes_b, all_counts, all_sums,
            samples, programs, nonfinite.numel(), labelled,
            CLASSES=classes, FEATURES_A=f_a, FEATURES_B=f_b, FEATURES_PAD=features_pad,
            ROWS=max(1, 2048 // features_pad), COUNT_BLOCK=1024, WITH_FEATURES=batch.features is not None,
            RULES=rules, num_warps=4,
        )  # fmt: skip
    return Statistics(prototypes_a, prototypes_b, all_counts, all_sums)


def counts_shape(classes: int, rules: Rules) -> tuple[int]:
    """Shape of `Statistics.counts`."""
    return (3 + 2 * classes if rules.detailed else 2,)


def terms_shape(classes: int, rules: Rules) -> tuple[int]:
    """Shape of the terms that `weighting` returns."""
    return (9 + 2 * classes if rules.detailed else 2,)


def sums_shape(classes: int, rules: Rules) -> tuple[int]:
    """Shape of `Statistics.sums`."""
    return (1 + 5 * classes + (2 if rules.entropy else 0) if rules.supervised else 1,)


def weighting(
    batch: Batch, known: Statistics, rules: Rules, weights: Weights = MUTUAL_ALONE, *, with_record: bool
) -> tuple[Tensor, Tensor, Record]:
    """Run the second pass, 2 launches: the total (0-dim), the terms that loss_kernel writes, the record."""
    za = batch.logits[0]
    values, code = record_shapes(za, rules, with_record, batch.labelled)
    record = Record(za.new_empty(values, dtype=torch.float32), za.new_empty(code, dtype=torch.uint8))
    numerators = _weight(batch, known, rules, weights, record=record, maps=None)
    total = za.new_empty((), dtype=torch.float32)
    terms = za.new_empty(terms_shape(za.shape[1], rules), dtype=torch.float32)
    with current_device(za):
        launch(
            loss_kernel, (1,),
            numerators, known.counts, known.sums, _weight_pointer(weights, known), total, terms,
            weights.mutual_factor, weights.dice_weight, numerators[0].numel(),
            CLASSES=za.shape[1], RULES=rules, HAS_WEIGHT=weights.mutual_weight is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return total, terms, record


def record_shapes(z: Tensor, rules: Rules, with_record: bool, labelled: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `Record`: nothing unless wanted, and no code where both networks may learn everywhere or C = 2."""
    if not with_record:
        return (0, 0), (0, 0)
    samples, classes = z.shape[:2]
    width = -(-sizes(z)[0] // tiling.RECORD_ALIGNMENT) * tiling.RECORD_ALIGNMENT
    if not rules.compare:
        return (2 * samples, width), (0, 0)
    if classes > 2:
        return (samples, width), (samples, width)
    return (samples + labelled, width), (0, 0)


def maps(batch: Batch, known: Statistics, rules: Rules) -> tuple[Tensor, Tensor]:
    """Run the second pass for its weights (2, B, V) float32 and masks (2, B, V) int8, student a first."""
    za = batch.logits[0]
    shape = (2, za.shape[0], sizes(za)[0])
    weights = za.new_empty(shape, dtype=torch.float32)
    masks = za.new_empty(shape, dtype=torch.int8)
    _weight(batch, known, rules, MUTUAL_ALONE, record=None, maps=(weights, masks))
    return weights, masks


def _weight(
    batch: Batch,
    known: Statistics,
    rules: Rules,
    factors: Weights,
    *,
    record: Record | None,
    maps: tuple[Tensor, Tensor] | None,
) -> Tensor:
    za, zb = batch.logits
    samples, classes = za.shape[:2]
    voxels, size1, size2 = sizes(za)
    with_record = record is not None and record.values.numel() > 0
    labels = batch.labels if with_record and classes == 2 else None  # for C > 2 the backward pass reads them
    mask = batch.kept
    f_a, f_b = channels(batch.features)
    fa, fb = batch.features if batch.features else (za, zb)
    g_za, g_zb, g_fa, g_fb = geometries = [geometry(t) for t in (za, zb, fa, fb)]
    g_labels = None if labels is None else geometry(labels)
    g_mask = None if mask is None else geometry(mask)
    flat, wide = addressing([*geometries, *(g for g in (g_labels, g_mask) if g is not None)])
    z_layout, f_layout = layout_of(geometries[:2]), layout_of(geometries[2:])
    # 128-bit loads give a thread 8 voxels (float32: 4), whose logits of many classes do not fit its registers.
    too_wide = za.element_size() == 2 or rules.masked or architecture(za.device) >= tiling.BLACKWELL
    if classes > 4 and too_wide and ALIGNED in (z_layout, f_layout):
        z_layout = f_layout = ANY
    tiles = tiling.weighting_tiles(
        classes, max(f_a, f_b), max(fa.element_size(), fb.element_size()),
        channels_last=f_layout in (LAST, PACKED), aligned=f_layout != ANY,
        plain=flat and not wide and with_record, detailed=rules.detailed, masked=rules.masked,
        architecture=architecture(za.device),
    )  # fmt: skip
    programs, per_program = split(voxels, tiles.groups * tiles.group, samples, za.device)
    numerators = za.new_empty((4 if rules.detailed else 2, samples, programs), dtype=torch.float32)
    # Pointers that a variant of the kernel does not touch still need a tensor.
    weights, masks = maps if maps else (numerators, known.counts)
    values, code = record if record is not None and with_record else (numerators, numerators)
    with current_device(za):
        launch(
            weighting_kernel, (programs * samples,),
            za, zb, fa, fb, za if labels is None else labels, za if mask is None else mask, _order(batch),
            known.prototypes_a, known.prototypes_b,
            known.counts, known.sums, _weight_pointer(factors, known),
            numerators if batch.sample_weights is None else batch.sample_weights,
            numerators, values, code if code.numel() else numerators, weights, masks,
            factors.mutual_factor, factors.dice_weight, batch.labelled,
            voxels, values.shape[1] if with_record else 0, size1, size2, *_strides(g_labels, flat), *_strides(g_mask, flat),
            *g_za.axes(flat), *g_zb.axes(flat), *g_fa.axes(flat), *g_fb.axes(flat), programs, per_program,
            CLASSES=classes, CLASSES_PAD=tiles.classes_pad,
            FEATURES_A=f_a, FEATURES_B=f_b, FEATURE_BLOCK=tiles.feature_block,
            GROUPS=tiles.groups, GROUP=tiles.group, WITH_FEATURES=batch.features is not None,
            WITH_RECORD=with_record, TARGET_IN_RECORD=labels is not None, HAS_WEIGHT=factors.mutual_weight is not None,
            WITH_MAPS=maps is not None, RULES=rules, UNROLL=tiles.unroll,
            Z_LAYOUT=z_layout, F_LAYOUT=f_layout, M_LAYOUT=_mask_layout(g_mask), FLAT=flat, WIDE=wide, num_warps=tiles.warps,
        )  # fmt: skip
    return numerators


def gradient(
    upstream: Tensor, sums: Tensor, record: Record, batch: Batch, rules: Rules, dice_weight: float
) -> tuple[Tensor, Tensor]:
    """Run the backward pass, 1 launch: gradients like the logits, empty for a network that does not learn."""
    za, zb = batch.logits
    samples, classes = za.shape[:2]
    voxels, size1, size2 = sizes(za)
    labels, mask = batch.labels, batch.kept
    grads = new_gradient(za, rules.learns_a), new_gradient(zb, rules.learns_b)
    g_za, g_zb, g_ga, g_gb = geometries = [geometry(t) for t in (za, zb, *(g if g.numel() else za for g in grads))]
    g_labels = None if labels is None else geometry(labels)
    g_mask = None if mask is None else geometry(mask)
    flat, wide = addressing([*geometries, *(g for g in (g_labels, g_mask) if g is not None)])
    layout = layout_of(geometries)
    tiles = tiling.gradient_tiles(
        classes, max(za.element_size(), zb.element_size()), aligned=layout != ANY,
        channels_last=layout in (LAST, PACKED), dice=labels is not None, architecture=architecture(za.device),
    )  # fmt: skip
    with current_device(za):
        launch(
            gradient_kernel, (-(-voxels // (tiles.groups * tiles.group)) * samples,),
            upstream, sums, record.values, record.code if record.code.numel() else record.values, za, zb,
            za if labels is None else labels, za if mask is None else mask, _order(batch), *grads,
            dice_weight, batch.labelled,
            voxels, record.values.shape[1], size1, size2, *_strides(g_labels, flat), *_strides(g_mask, flat),
            *g_za.axes(flat), *g_zb.axes(flat), *g_ga.axes(flat), *g_gb.axes(flat),
            CLASSES=classes, CLASSES_PAD=tiles.classes_pad, GROUPS=tiles.groups, GROUP=tiles.group,
            RULES=rules, LAYOUT=layout, M_LAYOUT=_mask_layout(g_mask), FLAT=flat, WIDE=wide, num_warps=tiles.warps,
        )  # fmt: skip
    return grads


def new_gradient(z: Tensor, learns: bool) -> Tensor:
    """Memory for the gradient of a network's logits; none where it does not learn."""
    return torch.empty_like(z) if learns else z.new_empty(0)


def _order(batch: Batch) -> Tensor:
    return batch.logits[0] if batch.order is None else batch.order


def _strides(of: Geometry | None, flat: bool) -> tuple[int, ...]:
    """Batch and spatial strides of labels or a mask; zeros without."""
    if of is None:
        return 0, 0, 0, 0
    batch, _, *axes = of.axes(flat)
    return (batch, *axes)


def _mask_layout(mask: Geometry | None) -> int:
    return ALIGNED if mask is not None and mask.kind == ALIGNED else ANY


def _weight_pointer(weights: Weights, known: Statistics) -> Any:
    return known.sums if weights.mutual_weight is None else weights.mutual_weight
