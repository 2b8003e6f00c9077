"""The Triton form as torch operators: statistics, weighting and gradient are separate, and so opaque to torch.compile.

A reduction over ranks fits between statistics (counts) and weighting. Only the loss of ``mutual_weighting`` carries a
gradient, to the logits; its backward pass is ``mutual_gradient``, which refuses to be differentiated again.
"""

from typing import Any

import torch
from torch import Tensor

from rplib.kernels import launch
from rplib.lean import similarity
from rplib.maps import Reliability, ordered_pairs
from rplib.options import Options


def loss(logits: list[Tensor], features: list[Tensor] | None, options: Options) -> Tensor:
    """The mutual loss of two networks, a 0-dim float32 tensor, differentiable once with respect to the logits."""
    fa, fb = _two(features)
    known = statistics(logits[0].detach(), logits[1].detach(), fa, fb, options.confidence, options.eps)
    wanted = torch.is_grad_enabled() and any(z.requires_grad for z in logits)
    value: Tensor
    value, _ = weighting(
        logits[0], logits[1], fa, fb, *known,
        options.confidence, options.cross_entropy_on == "logits", options.eps, wanted,
    )  # fmt: skip
    return value


def maps(logits: list[Tensor], features: list[Tensor] | None, options: Options) -> list[Reliability]:
    """Masks and weights from the loss's own kernels, with what explains them."""
    fa, fb = _two(features)
    spatial = logits[0].shape[2:]
    known = statistics(logits[0], logits[1], fa, fb, options.confidence, options.eps)
    weights, masks = weighting_maps(logits[0], logits[1], fa, fb, *known, options.confidence, options.eps)
    result = []
    for i, j in ordered_pairs(2):
        similar = None
        if features is not None:
            similar = similarity(features[j].flatten(2).float(), known[j])[0].unflatten(2, spatial)
        result.append(
            Reliability(
                student=i,
                teacher=j,
                mask=masks[i].bool().unflatten(1, spatial),
                weight=weights[i].unflatten(1, spatial),
                pseudo_label=logits[j].argmax(dim=1),
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
    confidence: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prototypes (B, C, F) of both networks, reliable voxels per student (2,) int64, and 0 or NaN (0-dim float32)."""
    return tuple(launch.statistics((logits_a, logits_b), _features(features_a, features_b), confidence, eps))  # type: ignore[return-value]


@statistics.register_fake
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    confidence: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def prototypes(features: Tensor | None) -> Tensor:
        channels = 0 if features is None else features.shape[1]
        return logits_a.new_empty((logits_a.shape[0], logits_a.shape[1], channels), dtype=torch.float32)

    counts = logits_a.new_empty((2,), dtype=torch.int64)
    return prototypes(features_a), prototypes(features_b), counts, logits_a.new_empty((), dtype=torch.float32)


@torch.library.custom_op("rplib::mutual_weighting", mutates_args=())
def weighting(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    poison: Tensor,
    confidence: str | None,
    on_logits: bool,
    eps: float,
    with_record: bool,
) -> tuple[Tensor, Tensor]:
    """The loss (0-dim float32), and the record for the backward pass (planes, B, padded V), empty unless wanted."""
    known = launch.Statistics(prototypes_a, prototypes_b, counts, poison)
    features = _features(features_a, features_b)
    return launch.weighting(
        (logits_a, logits_b), features, known, confidence, on_logits, eps, with_record=with_record
    )


@weighting.register_fake
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    poison: Tensor,
    confidence: str | None,
    on_logits: bool,
    eps: float,
    with_record: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits_a.new_empty((), dtype=torch.float32)
    return loss, logits_a.new_empty(launch.record_shape(logits_a, confidence, with_record), dtype=torch.float32)


@torch.library.custom_op("rplib::mutual_gradient", mutates_args=())
def gradient(
    upstream: Tensor,
    counts: Tensor,
    poison: Tensor,
    record: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    on_logits: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of both networks' logits."""
    return launch.gradient(upstream, counts, poison, record, (logits_a, logits_b), on_logits, eps)


@gradient.register_fake
def _(
    upstream: Tensor,
    counts: Tensor,
    poison: Tensor,
    record: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    on_logits: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits_a), torch.empty_like(logits_b)


@torch.library.custom_op("rplib::mutual_maps", mutates_args=())
def weighting_maps(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    poison: Tensor,
    confidence: str | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weights (2, B, V) float32 and masks (2, B, V) int8, student a first."""
    known = launch.Statistics(prototypes_a, prototypes_b, counts, poison)
    return launch.maps((logits_a, logits_b), _features(features_a, features_b), known, confidence, eps)


@weighting_maps.register_fake
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor | None,
    features_b: Tensor | None,
    prototypes_a: Tensor,
    prototypes_b: Tensor,
    counts: Tensor,
    poison: Tensor,
    confidence: str | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = (2, logits_a.shape[0], logits_a[0, 0].numel())
    return logits_a.new_empty(shape, dtype=torch.float32), logits_a.new_empty(shape, dtype=torch.int8)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_a, logits_b, _, _, _, _, counts, poison, _, on_logits, eps, with_record = inputs
    ctx.with_record = with_record
    ctx.on_logits = on_logits
    ctx.eps = eps
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(counts, poison, output[1], logits_a, logits_b)


def _weighting_backward(ctx: Any, upstream: Tensor | None, _record: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = [None] * 10
    if upstream is None or not ctx.with_record:
        return (None, None, *nothing)
    saved = ctx.saved_tensors
    if not torch.is_grad_enabled():  # with create_graph=True the operator must see what it refuses to differentiate
        upstream, saved = upstream.detach(), [t.detach() for t in saved]
    grads = gradient(upstream, *saved, ctx.on_logits, ctx.eps)
    needed = ctx.needs_input_grad
    return (grads[0] if needed[0] else None, grads[1] if needed[1] else None, *nothing)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the Triton form of the reliable mutual loss can be differentiated once; for second derivatives "
        '(create_graph=True) use impl="naive".'
    )


weighting.register_autograd(_weighting_backward, setup_context=_save_for_backward)
gradient.register_autograd(_refuse_double_backward)


def _two(features: list[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if features is None else (features[0].detach(), features[1].detach())


def _features(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if a is None or b is None else (a, b)
