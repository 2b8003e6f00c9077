"""The Triton form as torch operators: statistics, weighting and gradient are separate, and so opaque to torch.compile.

A reduction over ranks fits between statistics (counts, sums) and weighting. Only the total of ``mutual_weighting`` carries a
gradient, to the logits and to the weight of the mutual term; the former is ``mutual_gradient``, which refuses to be
differentiated again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rplib import ranks
from rplib.inputs import valid_only
from rplib.kernels import passes
from rplib.kernels.passes import Batch, Record, Statistics, Weights
from rplib.kernels.rules import Rules, decoded, encoded, rules_of
from rplib.maps import Reliability, ordered_pairs
from rplib.options import Options
from rplib.similarity import similarity
from rplib.statistics import ObjectiveStatistics
from rplib.supervision import Supervision


def loss(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """The mutual loss of two networks, a 0-dim float32 tensor, differentiable once with respect to the logits."""
    rules = rules_of(options, masked=mask is not None, sample_weighted=sample_weights is not None)
    value, terms = _run(logits, features, mask, sample_weights, options, rules)
    return ranks.as_one_process(value, ranks.detached_sum(terms[1], options.process_group), options.process_group)


def objective(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    supervision: Supervision,
    target: Tensor,
    consistency_weight: float | Tensor,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    rows: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, ObjectiveStatistics | None]:
    """The whole objective: total (0-dim float32, differentiable once); its terms Dice and mutual, and statistics, detached.

    Args:
        rows: the samples that the target belongs to, in its order.
    """
    group = options.process_group
    order = _labelled_first(rows, logits[0])
    rules = rules_of(
        options, supervision, logits[0].shape[1],
        masked=mask is not None, sample_weighted=sample_weights is not None, reordered=order is not None,
    )  # fmt: skip
    local, terms = _run(
        logits, features, mask, sample_weights, options, rules, target.detach(), supervision.dice_weight, consistency_weight,
        order,
    )  # fmt: skip
    terms = terms.detach()
    dice, shared = terms[0], ranks.detached_sum(terms[1:6], group)
    mutual = shared[0]
    statistics = None
    if rules.detailed:  # views of what loss_kernel reports: nothing is launched
        pseudo_labels = terms[9:].view(2, logits[0].shape[1])
        pairs = slice(0 if rules.learns_a else 1, 2 if rules.learns_b else 1)  # whose student learns
        statistics = ObjectiveStatistics(terms[6:8][pairs], shared[1:3][pairs], shared[3:5][pairs], pseudo_labels, terms[8])
    if group is not None:
        local = ranks.as_one_process(local, supervision.dice_weight * dice + consistency_weight * mutual, group)
    return local, dice, mutual, statistics


def _run(
    logits: list[Tensor],
    features: list[Tensor] | None,
    mask: Tensor | None,
    sample_weights: Tensor | None,
    options: Options,
    rules: Rules,
    target: Tensor | None = None,
    dice_weight: float = 0.0,
    consistency_weight: float | Tensor = 1.0,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's share of the total, and (dice, mutual)."""
    _refuse_forward_mode(*logits, *([consistency_weight] if isinstance(consistency_weight, Tensor) else []))
    fa, fb = _two(features)
    packed = encoded(rules)
    prototypes_a, prototypes_b, counts, sums = statistics(
        logits[0].detach(), logits[1].detach(), fa, fb, target, mask, order, *packed
    )  # fmt: skip
    counts, sums = ranks.detached_sum(counts, options.process_group), ranks.detached_sum(sums, options.process_group)
    factor = 1.0
    weight: Tensor | None = None
    if isinstance(consistency_weight, Tensor):
        weight = consistency_weight.to(logits[0].device, non_blocking=True)
    elif torch.compiler.is_compiling():  # a number that changes would be recompiled each time
        weight = torch.full((), consistency_weight, dtype=torch.float32, device=logits[0].device)
    else:
        factor = float(consistency_weight)
    wanted = torch.is_grad_enabled() and (any(z.requires_grad for z in logits) or (weight is not None and weight.requires_grad))
    value: Tensor
    terms: Tensor
    value, terms, _, _ = weighting(
        logits[0], logits[1], weight, fa, fb, target, mask, order, _float32(sample_weights),
        prototypes_a, prototypes_b, counts, sums, *packed, factor, dice_weight, wanted,
    )  # fmt: skip
    return value, terms


def maps(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> list[Reliability]:
    """Masks and weights from the loss's own kernels, and the maps that explain them."""
    fa, fb = _two(features)
    spatial = logits[0].shape[2:]
    packed = encoded(rules_of(options, masked=mask is not None, sample_weighted=sample_weights is not None))
    known = statistics(logits[0], logits[1], fa, fb, None, mask, None, *packed)
    weights, masks = weighting_maps(logits[0], logits[1], fa, fb, mask, _float32(sample_weights), *known, *packed)
    keep = None if mask is None else mask.unsqueeze(1)  # (B, 1, *spatial)
    result = []
    for i, j in ordered_pairs(2, options.students):
        similar = None
        if features is not None:
            similar = similarity(valid_only(features[j], keep).flatten(2).float(), known[j])[0].unflatten(2, spatial)
        result.append(
            Reliability(
                student=i,
                teacher=j,
                mask=masks[i].bool().unflatten(1, spatial),
                weight=weights[i].unflatten(1, spatial),
                pseudo_label=valid_only(logits[j], keep).argmax(dim=1),
                prototypes=None if features is None else known[j],
                similarity=similar,
            )
        )
    return result


@torch.library.custom_op("rplib::mutual_statistics", mutates_args=())
def statistics(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    rules: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prototypes (B, C, F) of both networks, reliable voxels per student (2,) int64, and sums, see passes.Statistics."""
    batch = _batch(logits_a, logits_b, features_a, features_b, target, mask, order)
    return tuple(passes.statistics(batch, decoded(rules, numbers)))  # type: ignore[return-value]


@statistics.register_fake
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    rules: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def prototypes(features: Tensor | None) -> Tensor:
        channels = 0 if features is None else features.shape[1]
        return logits_a.new_empty((logits_a.shape[0], logits_a.shape[1], channels), dtype=torch.float32)

    counts = logits_a.new_empty(passes.counts_shape(logits_a.shape[1], decoded(rules)), dtype=torch.int64)
    sums = logits_a.new_empty(passes.sums_shape(logits_a.shape[1], decoded(rules)), dtype=torch.float32)
    return prototypes(features_a), prototypes(features_b), counts, sums


@torch.library.custom_op("rplib::mutual_weighting", mutates_args=())
def weighting(
    logits_a: Tensor,
    logits_b: Tensor,
    mutual_weight: Tensor | None,
    features_a: Tensor | None,
    features_b: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    sample_weights: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    sums: Tensor,
    rules: str,
    numbers: Sequence[float],
    mutual_factor: float,
    dice_weight: float,
    with_record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total (0-dim float32), (dice, mutual), and the two parts of passes.Record, empty unless wanted."""
    known = Statistics(prototypes_a, prototypes_b, counts, sums)
    batch = _batch(logits_a, logits_b, features_a, features_b, target, mask, order, sample_weights)
    weights = Weights(dice_weight, mutual_factor, mutual_weight)
    total, terms, record = passes.weighting(batch, known, decoded(rules, numbers), weights, with_record=with_record)
    return total, terms, *record


@weighting.register_fake
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    mutual_weight: Tensor | None,
    features_a: Tensor | None,
    features_b: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    sample_weights: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    sums: Tensor,
    rules: str,
    numbers: Sequence[float],
    mutual_factor: float,
    dice_weight: float,
    with_record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labelled = 0 if target is None else target.shape[0]
    values, code = passes.record_shapes(logits_a, decoded(rules), with_record, labelled)
    new = logits_a.new_empty
    return (
        new((), dtype=torch.float32),
        new(passes.terms_shape(logits_a.shape[1], decoded(rules)), dtype=torch.float32),
        new(values, dtype=torch.float32),
        new(code, dtype=torch.uint8),
    )


@torch.library.custom_op("rplib::mutual_gradient", mutates_args=())
def gradient(
    upstream: Tensor,
    sums: Tensor,
    record: Tensor,
    code: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    rules: str,
    numbers: Sequence[float],
    dice_weight: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of both networks' logits, empty for a network that does not learn."""
    batch = _batch(logits_a, logits_b, None, None, target, mask, order)
    return passes.gradient(upstream, sums, Record(record, code), batch, decoded(rules, numbers), dice_weight)


@gradient.register_fake
def _(
    upstream: Tensor,
    sums: Tensor,
    record: Tensor,
    code: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    rules: str,
    numbers: Sequence[float],
    dice_weight: float,
) -> tuple[Tensor, Tensor]:
    of = decoded(rules)
    return passes.new_gradient(logits_a, of.learns_a), passes.new_gradient(logits_b, of.learns_b)


@torch.library.custom_op("rplib::mutual_maps", mutates_args=())
def weighting_maps(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    mask: Tensor | None,
    sample_weights: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    sums: Tensor,
    rules: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Weights (2, B, V) float32 and masks (2, B, V) int8, student a first."""
    known = Statistics(prototypes_a, prototypes_b, counts, sums)
    return passes.maps(
        _batch(logits_a, logits_b, features_a, features_b, None, mask, None, sample_weights), known, decoded(rules, numbers)
    )


@weighting_maps.register_fake
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    mask: Tensor | None,
    sample_weights: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    sums: Tensor,
    rules: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    shape = (2, logits_a.shape[0], logits_a[0, 0].numel())
    return logits_a.new_empty(shape, dtype=torch.float32), logits_a.new_empty(shape, dtype=torch.int8)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    (
        logits_a, logits_b, _, _, _, target, mask, order, _, _, _, _, sums,
        ctx.rules, ctx.numbers, ctx.factor, ctx.dice_weight, ctx.with_record,
    ) = inputs  # fmt: skip
    _, terms, record, code = output
    ctx.set_materialize_grads(False)  # no zeros, as large as the record, for outputs that nobody differentiates
    ctx.mark_non_differentiable(terms, record, code)
    ctx.save_for_backward(terms, sums, record, code, logits_a, logits_b, target, mask, order)


def _weighting_backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = [None] * 15
    if upstream is None or not ctx.with_record:
        return (None, None, None, *nothing)
    terms, *saved = ctx.saved_tensors
    for_a, for_b, for_weight = ctx.needs_input_grad[:3]
    grads: tuple[Tensor | None, Tensor | None] = (None, None)
    if for_a or for_b:
        u = upstream
        if not torch.is_grad_enabled():  # with create_graph=True the operator must see what it refuses to differentiate
            u, saved = u.detach(), [None if t is None else t.detach() for t in saved]
        grads = gradient(u, *saved, ctx.rules, ctx.numbers, ctx.dice_weight)
    weight: Tensor | None = None
    if for_weight:
        weight = upstream * ctx.factor * terms[1]
        if torch.is_grad_enabled():  # the mutual term depends on the logits, which a second derivative would not see
            weight = _DifferentiableOnce.apply(weight, *ctx.saved_tensors[4:6])
    return (grads[0] if for_a else None, grads[1] if for_b else None, weight, *nothing)


class _DifferentiableOnce(torch.autograd.Function):
    """The first argument, as a function of all arguments that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *_: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        _refuse_double_backward(ctx)


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """PyTorch would silently drop the tangents of an operator's arguments."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "the Triton form of the reliable mutual loss has no forward-mode derivative (torch.func.jvp, "
            'torch.autograd.forward_ad); use impl="naive".'
        )


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the Triton form of the reliable mutual loss can be differentiated once; for second derivatives "
        '(create_graph=True) use impl="naive".'
    )


weighting.register_autograd(_weighting_backward, setup_context=_save_for_backward)
gradient.register_autograd(_refuse_double_backward)


def _two(features: list[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if features is None else (features[0].detach(), features[1].detach())


def _labelled_first(rows: Sequence[int], z: Tensor) -> Tensor | None:
    """Indices of all samples, (B,) int32, the labelled ones first; None if they already are."""
    if list(rows) == list(range(len(rows))):
        return None
    others = [k for k in range(z.shape[0]) if k not in rows]
    return torch.tensor([*rows, *others], dtype=torch.int32, device=z.device)


def _float32(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.to(torch.float32).contiguous()


def _batch(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    sample_weights: Tensor | None = None,
) -> Batch:
    features = None if features_a is None or features_b is None else (features_a, features_b)
    return Batch((logits_a, logits_b), features, target, mask, sample_weights, order)
