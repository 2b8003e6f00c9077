"""The lean PyTorch form: any device and dtype, K >= 2 networks, little memory, traceable by torch.compile.

Two passes over the inputs, as the kernels make them:

1. statistics: per pair the number of reliable voxels, per network the class prototypes;
2. weighting: the loss, and in the same breath the gradient with respect to the logits (features get none):

    dL/dz_i(c,v) = sum_j w_ij(v) / n_ij * (p_i(c,v) - [c = y_j(v)])

Eager PyTorch keeps every intermediate tensor of an operation chain alive, so both passes walk over the voxels in pieces that
fit into a CPU's cache. Under torch.compile there is one piece and the compiler fuses.

Rounding. With l the class of the largest logit, e_c = exp(z_c - z_l) and rest = sum_{c != l} e_c, the probabilities are
p_c = e_c / (1 + rest), the complement 1 - p_l = rest / (1 + rest) and the cross-entropy log1p(rest) + z_l - z_y: none of them
subtracts nearly equal numbers, so confident voxels keep their gradient. For C = 2 the entropy falls strictly as |z_1 - z_0|
grows, whatever eps is, so that margins are compared (exactly, with the rounding error of the subtraction) and no entropy
is computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rplib import ranks
from rplib.maps import Reliability, ordered_pairs
from rplib.options import Options
from rplib.similarity import by_matrix_product, similarity

# Voxels per piece: on a CPU 16 feature channels of float32 are 4 MB; elsewhere the piece bounds memory, not cache misses.
_PIECE_CPU = 1 << 16
_PIECE_ELSEWHERE = 1 << 22


def loss(logits: list[Tensor], features: list[Tensor] | None, options: Options) -> Tensor:
    """The mutual loss, a 0-dim tensor, differentiable once with respect to the logits."""
    features = features if options.weighting else None
    group = options.process_group
    known = statistics(logits, features, options)
    poison = ranks.total(known.poison, group)
    normaliser = ranks.total(known.counts, group).to(poison.dtype) + options.eps + poison  # n_ij: (pairs,)
    value: Tensor = _LeanLoss.apply(  # type: ignore[no-untyped-call]
        options, len(logits), poison, normaliser, *(known.prototypes or []), *logits, *(features or [])
    )
    return ranks.as_one_process(value, ranks.total(value, group), group)


def maps(logits: list[Tensor], features: list[Tensor] | None, options: Options) -> list[Reliability]:
    """Masks, weights and what they are made of, pair by pair."""
    dtype = _compute_dtype(logits, features)
    spatial = logits[0].shape[2:]
    z = [t.detach().flatten(2).to(dtype) for t in logits]  # (B, C, V)
    networks = [_network(t) for t in z]
    doubts = [_doubt(t, n, options) for t, n in zip(z, networks, strict=True)]
    known: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(z)
    if options.weighting is not None and features is not None:
        prototypes = statistics(logits, features, options).prototypes
        assert prototypes is not None
        for k, (n, mu, f) in enumerate(zip(networks, prototypes, features, strict=True)):
            s, _ = similarity(f.detach().flatten(2).to(dtype), mu)
            r = 1 - (s - n.p).square().mean(dim=1, keepdim=True)
            known[k] = (mu, s.unflatten(2, spatial), r)
    result = []
    for i, j in ordered_pairs(len(z)):
        mask = _mask(doubts[i], doubts[j], options)
        label = networks[j].label.squeeze(1).unflatten(1, spatial)
        teacher = known[j]
        weight = mask.to(dtype) if teacher is None else torch.where(mask, teacher[2], torch.zeros_like(teacher[2]))
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
    """What must be known of all voxels before one can be weighted.

    counts: (pairs,) int64, reliable voxels per ordered pair; prototypes: per network (B, C, F) of unit length or zero;
    poison: 0-dim, 0 where every value read was finite, NaN otherwise.
    """

    counts: Tensor
    prototypes: list[Tensor] | None
    poison: Tensor


def statistics(logits: list[Tensor], features: list[Tensor] | None, options: Options) -> Statistics:
    """The first pass."""
    dtype = _compute_dtype(logits, features)
    logits = [z.detach().flatten(2) for z in logits]
    features = [] if features is None else [f.detach().flatten(2) for f in features]
    batch, classes, voxels = logits[0].shape
    pairs = ordered_pairs(len(logits))
    counts = torch.zeros(len(pairs), dtype=torch.int64, device=logits[0].device)
    poison = torch.zeros((), dtype=dtype, device=logits[0].device)
    sums: list[list[Tensor]] = [[] for _ in features]  # per network and sample (group): (b, C, F)
    members: list[list[Tensor]] = [[] for _ in features]  # likewise (b, C)
    for b, pieces in _pieces(batch, voxels, logits[0].device):
        for first, v in enumerate(pieces):
            z = [t[b, :, v].to(dtype) for t in logits]
            networks = [_network(t) for t in z]
            doubts = [_doubt(t, n, options) for t, n in zip(z, networks, strict=True)]
            counts = counts + torch.stack([_mask(doubts[i], doubts[j], options).sum() for i, j in pairs])
            poison = poison + sum(n.top.sum() for n in networks) * 0
            for k, f in enumerate(features):
                values = f[b, :, v].to(dtype)
                of_class = networks[k].label == torch.arange(classes, device=f.device)[:, None]  # (b, C, v)
                if by_matrix_product(classes, f.device):
                    piece_sums = torch.bmm(of_class.to(dtype), values.transpose(1, 2))  # (b, C, F)
                else:
                    piece_sums = torch.stack([(values * m).sum(dim=2) for m in of_class.split(1, dim=1)], dim=1)
                piece_members = of_class.sum(dim=2)  # (b, C)
                if first == 0:
                    sums[k].append(piece_sums)
                    members[k].append(piece_members)
                else:
                    sums[k][-1] = sums[k][-1] + piece_sums
                    members[k][-1] = members[k][-1] + piece_members
    if not features:
        return Statistics(counts, None, poison)
    prototypes = []
    for network_sums, network_members in zip(sums, members, strict=True):
        total = torch.cat(network_sums)  # (B, C, F)
        poison = poison + total.sum() * 0
        mean = total / (torch.cat(network_members).to(dtype).unsqueeze(2) + options.eps)
        length = mean.square().sum(dim=2, keepdim=True).sqrt()
        prototypes.append(mean / length.clamp_min(1e-12))
    return Statistics(counts, prototypes, poison)


class _Network(NamedTuple):
    """One network's softmax at some voxels, in the form that keeps small numbers (see the head of this file)."""

    top: Tensor  # (b, 1, v) largest logit
    label: Tensor  # (b, 1, v) int64, its class: the first maximum
    rest: Tensor  # (b, 1, v) sum of exp(z_c - top) over the other classes
    p: Tensor  # (b, C, v) probabilities


_Doubt = tuple[Tensor, Tensor | None]  # each (b, 1, v)


class _LeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, networks: int, poison: Tensor, normaliser: Tensor, *tensors: Tensor) -> Tensor:
        """tensors: prototypes, logits, features per network, or logits alone."""
        groups = [list(tensors[k : k + networks]) for k in range(0, len(tensors), networks)]
        prototypes, logits, features = groups if len(groups) == 3 else (None, groups[0], None)
        wanted = any(ctx.needs_input_grad)
        value, gradients = _weighting(logits, features, prototypes, normaliser, options, wanted)
        ctx.save_for_backward(poison, *gradients, *logits)
        ctx.networks = networks
        ctx.first = 4 + (networks if prototypes else 0)  # where the logits begin among the arguments
        ctx.arguments = 4 + len(tensors)
        return value + poison

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        poison, *saved = ctx.saved_tensors
        result: list[Tensor | None] = [None] * ctx.arguments
        for k, (g, z) in enumerate(zip(saved[: ctx.networks], saved[ctx.networks :], strict=True)):
            if ctx.needs_input_grad[ctx.first + k]:
                result[ctx.first + k] = _LeanGradient.apply(upstream, poison, g, z)  # type: ignore[no-untyped-call]
        return tuple(result)


class _LeanGradient(torch.autograd.Function):
    """The gradient for one network's logits z, which it takes only to say that it cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, poison: Tensor, g: Tensor, z: Tensor) -> Tensor:
        scaled = g * (upstream + poison)  # float32 or better, before the cast
        if g.shape[1] != z.shape[1]:  # C = 2: only class 0 was kept, class 1 is its negative
            scaled = torch.cat([scaled, -scaled], dim=1)
        return scaled.to(z.dtype).view(z.shape)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the lean PyTorch form of the reliable mutual loss can be differentiated once; for second derivatives "
            '(create_graph=True) use impl="naive".'
        )


def _weighting(
    logits: list[Tensor],
    features: list[Tensor] | None,
    prototypes: list[Tensor] | None,
    normaliser: Tensor,
    options: Options,
    gradients_wanted: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The second pass: the loss, and the gradients (B, C, V), or (B, 1, V) of class 0 where C = 2."""
    dtype = normaliser.dtype
    logits = [z.detach().flatten(2) for z in logits]
    features = [f.detach().flatten(2) for f in features] if features else None
    batch, classes, voxels = logits[0].shape
    pairs = ordered_pairs(len(logits))
    kept = 1 if classes == 2 else classes
    # Collected per piece and joined: inside a compiled graph there is one piece and nothing to join.
    gradients: list[list[list[Tensor]]] = [[] for _ in logits]
    value = torch.zeros((), dtype=dtype, device=logits[0].device)
    for b, pieces in _pieces(batch, voxels, logits[0].device):
        for network_gradients in gradients:
            network_gradients.append([])
        for v in pieces:
            z = [t[b, :, v].to(dtype) for t in logits]
            networks = [_network(t) for t in z]
            doubts = [_doubt(t, n, options) for t, n in zip(z, networks, strict=True)]
            reliable: list[Tensor] = []  # r_j: (b, 1, v)
            if features is not None and prototypes is not None:
                for n, f, mu in zip(networks, features, prototypes, strict=True):
                    s, length = similarity(f[b, :, v].to(dtype), mu[b])
                    reliable.append(1 - (s - n.p).square().mean(dim=1, keepdim=True))
                    value = value + length.sum() * 0  # a feature whose square overflows must not look dissimilar
            totals: list[Tensor | None] = [None] * len(logits)
            for pair, (i, j) in enumerate(pairs):
                mask = _mask(doubts[i], doubts[j], options)
                share = 1 / normaliser[pair]
                share = reliable[j] * share if reliable else share
                weight = torch.where(mask, share, torch.zeros_like(networks[j].top))  # w_ij / n_ij: (b, 1, v)
                value = value + (weight * _cross_entropy(z[i], networks[i], networks[j].label, options)).sum()
                if gradients_wanted:
                    term = weight * _slope(networks[i], networks[j].label, options)[:, :kept]
                    so_far = totals[i]
                    totals[i] = term if so_far is None else so_far + term
            if gradients_wanted:
                for network_gradients, total in zip(gradients, totals, strict=True):
                    assert total is not None
                    network_gradients[-1].append(total)
    if not gradients_wanted:
        return value, []
    return value, [_join(g) for g in gradients]


def _join(pieces: list[list[Tensor]]) -> Tensor:
    rows = [row[0] if len(row) == 1 else torch.cat(row, dim=2) for row in pieces]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _network(z: Tensor) -> _Network:
    top, label = z.max(dim=1, keepdim=True)  # (b, 1, v), the first maximum
    e = torch.exp(z - top)
    classes = torch.arange(z.shape[1], device=z.device)[:, None]
    rest = e.masked_fill(classes == label, 0).sum(dim=1, keepdim=True)
    return _Network(top, label, rest, e / (1 + rest))


def _doubt(z: Tensor, network: _Network, options: Options) -> _Doubt:
    """A number that grows as the network's confidence falls, and for C = 2 the rounding error of that number."""
    if z.shape[1] == 2:
        # Knuth's two-sum of z_1 + (-z_0): margin + error is exact.
        a, b = z[:, 1:], -z[:, :1]
        margin = a + b
        b_part = margin - a
        error = (a - (margin - b_part)) + (b - b_part)
        return -margin.abs(), torch.where(margin < 0, error, -error)
    if options.confidence == "max_probability":
        return network.rest, None  # max_c p = 1 / (1 + rest)
    return -(network.p * torch.log(network.p + options.eps)).sum(dim=1, keepdim=True), None


def _mask(student: _Doubt, teacher: _Doubt, options: Options) -> Tensor:
    """m_ij: (b, 1, v) bool."""
    (student_doubt, student_error), (teacher_doubt, teacher_error) = student, teacher
    if options.confidence is None:
        return torch.ones_like(student_doubt, dtype=torch.bool)
    more = student_doubt > teacher_doubt
    if student_error is None or teacher_error is None:
        return more
    return more | ((student_doubt == teacher_doubt) & (student_error > teacher_error))


def _cross_entropy(z: Tensor, network: _Network, label: Tensor, options: Options) -> Tensor:
    """CE_ij: (b, 1, v)."""
    if options.cross_entropy_on == "logits":
        return torch.log1p(network.rest) + (network.top - z.gather(1, label))
    return network.p.exp().sum(dim=1, keepdim=True).log() - network.p.gather(1, label)


def _slope(network: _Network, label: Tensor, options: Options) -> Tensor:
    """dCE_ij / dz_i: (b, C, v)."""
    p = network.p
    classes = torch.arange(p.shape[1], device=p.device)[:, None]
    own = classes == network.label
    if options.cross_entropy_on == "logits":
        # p - [c = l] without cancellation, then move the one from l to y where the two networks disagree.
        return torch.where(own, -network.rest / (1 + network.rest), p) + (own.to(p.dtype) - (classes == label).to(p.dtype))
    # p(c) (D(c) - sum_q p(q) D(q)) with D = d - d(l): a shift cancels in the formula, and D(l) = 0 keeps small numbers.
    d = torch.softmax(p, dim=1) - (classes == label).to(p.dtype)
    shifted = d - d.gather(1, network.label)
    return p * (shifted - (p * shifted).sum(dim=1, keepdim=True))


def _compute_dtype(logits: list[Tensor], features: list[Tensor] | None) -> torch.dtype:
    double = any(t.dtype == torch.float64 for t in [*logits, *(features or [])])
    return torch.float64 if double else torch.float32


def _pieces(batch: int, voxels: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of samples, each with the voxel ranges to walk over."""
    if torch.compiler.is_compiling():
        yield slice(0, batch), [slice(0, voxels)]
        return
    size = _PIECE_CPU if device.type == "cpu" else _PIECE_ELSEWHERE
    together = max(1, size // voxels)
    for b in range(0, batch, together):
        yield slice(b, b + together), [slice(v, v + size) for v in range(0, voxels, size)]
