"""The lean PyTorch form: any device and dtype, K >= 2 networks, little memory, traceable by torch.compile.

Two passes over the inputs, as in the kernels:

1. statistics: per pair the number of reliable voxels, per network the class prototypes;
2. weighting: the loss, and at the same time the gradient with respect to the logits (features get none):

    dL/dz_i(c,v) = sum_j w_ij(v) / n_ij * (p_i(c,v) - [c = y_j(v)])

Eager PyTorch keeps every intermediate tensor of an operation chain alive, so both passes process the voxels in pieces that
fit into a CPU's cache. Under torch.compile there is one piece, and the compiler fuses the operations.

``valid``, (B, *spatial) bool, marks the voxels that count. Logits and features elsewhere are replaced by zeros piece by piece,
before anything is computed from them, so that not even a NaN there has an effect.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rplib import ranks
from rplib.averages import NOTHING, Extras
from rplib.inputs import valid_only
from rplib.lean_voxels import (
    class_factor,
    compute_dtype,
    cross_entropy,
    network_at,
    pieces,
    reliability,
    slope,
    teaches,
    uncertainty,
)
from rplib.maps import Reliability, ordered_pairs
from rplib.options import Options
from rplib.similarity import by_matrix_product, similarity
from rplib.statistics import ObjectiveStatistics, Sums


def loss(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    valid: Tensor | None = None,
    extras: Extras = NOTHING,
) -> Tensor:
    """The mutual loss, a 0-dim tensor, differentiable once with respect to the logits."""
    return loss_and_statistics(logits, features, options, valid, extras, detailed=False)[0]


def loss_and_statistics(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    valid: Tensor | None,
    extras: Extras = NOTHING,
    *,
    detailed: bool,
) -> tuple[Tensor, ObjectiveStatistics | None]:
    """The mutual loss and, if ``detailed``, the statistics from the same two passes."""
    features = features if options.weighting else None
    group = options.process_group
    known = statistics(logits, features, options, valid, extras, detailed=detailed)
    nonfinite = ranks.detached_sum(known.nonfinite, group)
    counts = ranks.detached_sum(known.counts, group)
    normaliser = counts.to(nonfinite.dtype) + options.eps + nonfinite  # n_ij: (pairs,)
    if options.reduction == "sum":
        normaliser = torch.ones_like(normaliser) + nonfinite
    value, numerators, weights = _LeanLoss.apply(  # type: ignore[no-untyped-call]
        options, len(logits), detailed, valid, extras.sample_weights, nonfinite, normaliser, *(known.prototypes or []), *logits,
        *(features or []),
    )  # fmt: skip
    result = ranks.as_one_process(value, ranks.detached_sum(value, group), group)
    if not detailed:
        return result, None
    assert known.members is not None and known.differing is not None and known.voxels is not None
    sums = Sums(counts, known.members, known.differing, known.voxels, numerators.detach(), weights.detach())
    return result, sums.over_ranks(group)


def maps(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    valid: Tensor | None = None,
    extras: Extras = NOTHING,
) -> list[Reliability]:
    """Masks, weights and their intermediate values, pair by pair."""
    dtype = compute_dtype(logits, features)
    spatial = logits[0].shape[2:]
    keep = None if valid is None else valid.flatten(1).unsqueeze(1)  # (B, 1, V)
    z = [valid_only(t.detach().flatten(2).to(dtype), keep) for t in logits]  # (B, C, V)
    networks = [network_at(t) for t in z]
    uncertainties = [uncertainty(t, n, options) for t, n in zip(z, networks, strict=True)]
    known: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(z)
    if options.weighting is not None and features is not None:
        prototypes = statistics(logits, features, options, valid, extras).prototypes
        assert prototypes is not None
        for k, (n, mu, f) in enumerate(zip(networks, prototypes, features, strict=True)):
            s, _ = similarity(valid_only(f.detach().flatten(2).to(dtype), keep), mu)
            known[k] = (mu, s.unflatten(2, spatial), reliability(s, z[k], n, options))
    result = []
    for i, j in ordered_pairs(len(z), options.students):
        mask = teaches(uncertainties[i], uncertainties[j], networks[j], options, keep)
        label = networks[j].label.squeeze(1).unflatten(1, spatial)
        teacher = known[j]
        weight = mask.to(dtype) if teacher is None else torch.where(mask, teacher[2], torch.zeros_like(teacher[2]))
        factor = class_factor(networks[j].label, options, dtype)
        weight = weight if factor is None else weight * factor
        weight = weight if extras.sample_weights is None else weight * extras.sample_weights.to(dtype)[:, None, None]
        result.append(
            Reliability(
                student=i,
                teacher=j,
                mask=mask.squeeze(1).unflatten(1, spatial),
                weight=weight.squeeze(1).unflatten(1, spatial),
                pseudo_label=label,
                prototypes=None if teacher is None else teacher[0],
                similarity=None if teacher is None else teacher[1],
            )
        )
    return result


class Statistics(NamedTuple):
    """Sums over all voxels that are needed before any voxel can be weighted.

    counts: (pairs,) int64, reliable voxels per ordered pair; prototypes: per network (B, C, F) of unit length or zero;
    nonfinite: 0-dim, 0 if every value read was finite, else NaN. For logging, None unless requested: members (K, C)
    int64, voxels per pseudo-label; differing: 0-dim int64, voxels whose labels differ, over unordered pairs; voxels: 0-dim int64.
    """

    counts: Tensor
    prototypes: list[Tensor] | None
    nonfinite: Tensor
    members: Tensor | None = None
    differing: Tensor | None = None
    voxels: Tensor | None = None


def statistics(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    valid: Tensor | None = None,
    extras: Extras = NOTHING,
    *,
    detailed: bool = False,
) -> Statistics:
    """The first pass."""
    dtype = compute_dtype(logits, features)
    logits = [z.detach().flatten(2) for z in logits]
    features = [] if features is None else [f.detach().flatten(2) for f in features]
    keep = None if valid is None else valid.flatten(1).unsqueeze(1)  # (B, 1, V)
    device = logits[0].device
    batch, classes, voxels = logits[0].shape
    pairs = ordered_pairs(len(logits), options.students)
    counts = torch.zeros(len(pairs), dtype=torch.int64, device=device)
    nonfinite = torch.zeros((), dtype=dtype, device=device)
    sums: list[list[Tensor]] = [[] for _ in features]  # per network and sample (group): (b, C, F)
    members: list[list[Tensor]] = [[] for _ in features]  # likewise (b, C)
    labelled = torch.zeros(len(logits), classes, dtype=torch.int64, device=device) if detailed else None
    differing = torch.zeros((), dtype=torch.int64, device=device) if detailed else None
    for b, parts in pieces(batch, voxels, device):
        for first, v in enumerate(parts):
            inside = None if keep is None else keep[b, :, v]  # (b, 1, v)
            z = [valid_only(t[b, :, v].to(dtype), inside) for t in logits]
            networks = [network_at(t) for t in z]
            uncertainties = [uncertainty(t, n, options) for t, n in zip(z, networks, strict=True)]
            counts = counts + torch.stack(
                [teaches(uncertainties[i], uncertainties[j], networks[j], options, inside).sum() for i, j in pairs]
            )
            nonfinite = nonfinite + sum(n.top.sum() for n in networks) * 0
            of_class = [_members(n.label, classes, inside) for n in networks] if features or detailed else []
            for k, f in enumerate(features):
                values = valid_only(f[b, :, v].to(dtype), inside)
                if by_matrix_product(classes, f.device):
                    piece_sums = torch.bmm(of_class[k].to(dtype), values.transpose(1, 2))  # (b, C, F)
                else:
                    piece_sums = torch.stack([(values * m).sum(dim=2) for m in of_class[k].split(1, dim=1)], dim=1)
                piece_members = of_class[k].sum(dim=2)  # (b, C)
                if first == 0:
                    sums[k].append(piece_sums)
                    members[k].append(piece_members)
                else:
                    sums[k][-1] = sums[k][-1] + piece_sums
                    members[k][-1] = members[k][-1] + piece_members
            if labelled is not None and differing is not None:
                labelled = labelled + torch.stack([m.sum(dim=(0, 2)) for m in of_class])
                for i, j in ordered_pairs(len(networks)):
                    if i < j:  # outside ``valid`` all logits are zero, so the labels are equal
                        differing = differing + (networks[i].label != networks[j].label).sum()
    counted = None
    if detailed:
        counted = valid.sum() if valid is not None else torch.full((), batch * voxels, dtype=torch.int64, device=device)
    if not features:
        return Statistics(counts, None, nonfinite, labelled, differing, counted)
    totals, numbers = [torch.cat(s) for s in sums], [torch.cat(m) for m in members]  # (B, C, F), (B, C)
    nonfinite = nonfinite + sum(total.sum() for total in totals) * 0
    if options.prototypes != "sample":
        totals = [ranks.detached_sum(total.sum(dim=0, keepdim=True), options.process_group) for total in totals]
        numbers = [ranks.detached_sum(number.sum(dim=0, keepdim=True), options.process_group) for number in numbers]
    if extras.averages is not None:
        flat = [total[0] for total in totals], [number[0] for number in numbers]
        means = [mean.unsqueeze(0) for mean in extras.averages.updated(*flat, options.eps)]
    else:
        means = [t / (n.to(dtype).unsqueeze(2) + options.eps) for t, n in zip(totals, numbers, strict=True)]
    prototypes = []
    for mean in means:  # (B, C, F), or (1, C, F) for all samples
        length = mean.square().sum(dim=2, keepdim=True).sqrt()
        prototypes.append((mean / length.clamp_min(1e-12)).expand(batch, -1, -1))
    return Statistics(counts, prototypes, nonfinite, labelled, differing, counted)


def _members(label: Tensor, classes: int, inside: Tensor | None) -> Tensor:
    """(b, 1, v) labels to (b, C, v) bool."""
    of_class = label == torch.arange(classes, device=label.device)[:, None]
    return of_class if inside is None else of_class & inside


class _LeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        networks: int,
        detailed: bool,
        valid: Tensor | None,
        sample_weights: Tensor | None,
        nonfinite: Tensor,
        normaliser: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tensors: prototypes, logits and features of every network, or only logits. Only the first output carries a gradient."""
        groups = [list(tensors[k : k + networks]) for k in range(0, len(tensors), networks)]
        prototypes, logits, features = groups if len(groups) == 3 else (None, groups[0], None)
        first = 7 + (networks if prototypes else 0)  # position of the first logits among the arguments
        wanted = [k for k in range(networks) if ctx.needs_input_grad[first + k]]
        second = _weighting(logits, features, prototypes, normaliser, options, valid, sample_weights, wanted, detailed)
        ctx.save_for_backward(nonfinite, *second.gradients, *(logits[k] for k in wanted))
        ctx.wanted = [first + k for k in wanted]
        ctx.arguments = 7 + len(tensors)
        return second.value + nonfinite, second.numerators, second.weights

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        nonfinite, *saved = ctx.saved_tensors
        result: list[Tensor | None] = [None] * ctx.arguments
        n = len(ctx.wanted)
        for at, g, z in zip(ctx.wanted, saved[:n], saved[n:], strict=True):
            result[at] = _LeanGradient.apply(upstream, nonfinite, g, z)  # type: ignore[no-untyped-call]
        return tuple(result)


class _LeanGradient(torch.autograd.Function):
    """The gradient for one network's logits z, which are passed only so that a second derivative raises an error."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, nonfinite: Tensor, g: Tensor, z: Tensor) -> Tensor:
        scaled = g * (upstream + nonfinite)  # float32 or better, before the cast
        if g.shape[1] != z.shape[1]:  # C = 2: only class 0 was kept, class 1 is its negative
            scaled = torch.cat([scaled, -scaled], dim=1)
        return scaled.to(z.dtype).view(z.shape)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the lean PyTorch form of the reliable mutual loss can be differentiated once; for second derivatives "
            '(create_graph=True) use impl="naive".'
        )


class _Weighted(NamedTuple):
    """value: this rank's loss; gradients: of the networks that need one, (B, C, V), or for C = 2 of class 0 only, (B, 1, V);
    numerators, weights: (pairs,), sum of w CE / n and of w, or (0,) unless requested."""

    value: Tensor
    gradients: list[Tensor]
    numerators: Tensor
    weights: Tensor


def _weighting(
    logits: list[Tensor],
    features: list[Tensor] | None,
    prototypes: list[Tensor] | None,
    normaliser: Tensor,
    options: Options,
    valid: Tensor | None,
    sample_weights: Tensor | None,
    wanted: list[int],
    detailed: bool,
) -> _Weighted:
    """The second pass."""
    dtype = normaliser.dtype
    logits = [z.detach().flatten(2) for z in logits]
    features = [f.detach().flatten(2) for f in features] if features else None
    keep = None if valid is None else valid.flatten(1).unsqueeze(1)  # (B, 1, V)
    batch, classes, voxels = logits[0].shape
    pairs = ordered_pairs(len(logits), options.students)
    kept = 1 if classes == 2 else classes
    # Collected per piece and joined: inside a compiled graph there is one piece and nothing to join.
    gradients: dict[int, list[list[Tensor]]] = {k: [] for k in wanted}
    value = torch.zeros((), dtype=dtype, device=normaliser.device)
    numerators = torch.zeros(len(pairs) if detailed else 0, dtype=dtype, device=normaliser.device)
    weights = torch.zeros_like(numerators)  # not the same tensor: the compiler tells outputs apart by identity
    for b, parts in pieces(batch, voxels, logits[0].device):
        for rows in gradients.values():
            rows.append([])
        for v in parts:
            inside = None if keep is None else keep[b, :, v]
            z = [valid_only(t[b, :, v].to(dtype), inside) for t in logits]
            networks = [network_at(t) for t in z]
            uncertainties = [uncertainty(t, n, options) for t, n in zip(z, networks, strict=True)]
            reliable: list[Tensor] = []  # r_j: (b, 1, v)
            if features is not None and prototypes is not None:
                for own, n, f, mu in zip(z, networks, features, prototypes, strict=True):
                    s, length = similarity(valid_only(f[b, :, v].to(dtype), inside), mu[b])
                    reliable.append(reliability(s, own, n, options))
                    value = value + length.sum() * 0  # a feature whose square overflows must give NaN, not a similarity of 0
            totals: dict[int, Tensor] = {}
            pair_values, pair_weights = [], []
            for pair, (i, j) in enumerate(pairs):
                mask = teaches(uncertainties[i], uncertainties[j], networks[j], options, inside)
                share = 1 / normaliser[pair]
                share = reliable[j] * share if reliable else share
                factor = class_factor(networks[j].label, options, dtype)
                share = share if factor is None else share * factor
                share = share if sample_weights is None else share * sample_weights[b].to(dtype)[:, None, None]
                zeros = torch.zeros_like(networks[j].top)
                weight = torch.where(mask, share, zeros)  # w_ij / n_ij: (b, 1, v)
                ce = cross_entropy(z[i], networks[i], networks[j].label, options)
                term = torch.where(mask, weight * ce, zeros).sum()  # 0, not NaN, where ce is infinite and no network teaches
                value = value + term
                if detailed:
                    pair_values.append(term)
                    pair_weights.append(weight.sum())
                if i in gradients:
                    part = weight * slope(networks[i], networks[j].label, options)[:, :kept]
                    totals[i] = part if i not in totals else totals[i] + part
            if detailed:
                numerators = numerators + torch.stack(pair_values)
                weights = weights + torch.stack(pair_weights)
            for k, rows in gradients.items():
                rows[-1].append(totals[k])
    if detailed:
        weights = weights * normaliser
    return _Weighted(value, [_join(rows) for rows in gradients.values()], numerators, weights)


def _join(rows: list[list[Tensor]]) -> Tensor:
    """Pieces (b, C, v) of a network's gradient, by groups of samples, to (B, C, V)."""
    joined = [row[0] if len(row) == 1 else torch.cat(row, dim=2) for row in rows]
    return joined[0] if len(joined) == 1 else torch.cat(joined)
