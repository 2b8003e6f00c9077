"""The method line by line: slow, with high memory use, and the reference for the other forms.

Su et al., "Mutual learning with reliable pseudo label for semi-supervised medical image segmentation", Medical Image
Analysis 94 (2024) 103111. For every ordered pair, student i learns from teacher j:

    H_k(v)    = - sum_c p_k(c,v) log(p_k(c,v) + eps)                           entropy: low is confident
    m_ij(v)   = 1 if H_i(v) > H_j(v) else 0                                    WHICH voxels: teacher more confident
    y_j(v)    = argmax_c p_j(c,v)                                              pseudo-label
    mu_j(b,c) = sum_v f_j(v) [y_j(v)=c] / (sum_v [y_j(v)=c] + eps), then / max(||mu_j||, 1e-12)
    s_j(c,v)  = <f_j(v), mu_j(b,c)> / (max(||f_j(v)||, 1e-8) max(||mu_j(b,c)||, 1e-8))
    r_j(v)    = 1 - (1/C) sum_c (s_j(c,v) - p_j(c,v))^2                        HOW reliable
    CE_ij(v)  = - log softmax(z_i)(y_j(v), v)
    L_ij      = sum_{b,v} m_ij r_j CE_ij / (sum_{b,v} m_ij + eps)

and the loss is the sum over pairs. No gradient flows through m, r and y. Nothing is shared between pairs and nothing is
fused, as a reader of the paper would write it. Keep it that way: benchmarks use this form as their baseline.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rplib import ranks
from rplib.averages import NOTHING, Extras
from rplib.inputs import valid_only
from rplib.maps import Reliability, ordered_pairs
from rplib.options import Options
from rplib.statistics import ObjectiveStatistics, Sums


def loss(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    masks: list[Tensor] | None = None,
    valid: Tensor | None = None,
    extras: Extras = NOTHING,
) -> Tensor:
    """The mutual loss, a 0-dim tensor; gradients by autograd.

    ``masks``, one (B, *spatial) per ordered pair, replace the comparison of confidences. Two implementations may differ where
    both networks are equally confident, so the formula is evaluated with the mask of the implementation under test.
    ``valid``, (B, *spatial) bool: the voxels that count.
    """
    return loss_and_statistics(logits, features, options, masks, valid, extras, detailed=False)[0]


def loss_and_statistics(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    masks: list[Tensor] | None,
    valid: Tensor | None,
    extras: Extras = NOTHING,
    *,
    detailed: bool,
) -> tuple[Tensor, ObjectiveStatistics | None]:
    """The mutual loss and, if ``detailed``, the statistics that are logged with it."""
    logits, features = _prepared(logits, features, valid)
    probabilities = [F.softmax(z, dim=1) for z in logits]
    averaged = _averaged(probabilities, features, options, valid, extras)
    group = options.process_group
    total = logits[0].new_zeros(())
    counts, numerators, weights = [], [], []
    for n, (i, j) in enumerate(ordered_pairs(len(logits), options.students)):
        mask = _mask(probabilities[i], probabilities[j], options, valid) if masks is None else masks[n]
        pair = _pair(i, j, mask, probabilities, features, averaged, valid, options, extras)
        scores = logits[i] if options.cross_entropy_on == "logits" else probabilities[i]
        cross_entropy = F.cross_entropy(scores, pair.pseudo_label, reduction="none")  # (B, *spatial)
        # Where no network teaches, a class that the student rules out (a logit of -inf) contributes 0, not 0 * inf.
        cross_entropy = cross_entropy.masked_fill(~mask & cross_entropy.isposinf(), 0)
        counts.append(ranks.detached_sum(pair.mask.sum(), group))
        count = counts[-1].to(scores.dtype) + options.eps if options.reduction == "mean" else 1  # n_ij, counted in integers
        numerators.append((pair.weight.detach() * cross_entropy).sum() / count)
        weights.append(pair.weight.sum())
        total = total + numerators[-1]
    result = ranks.as_one_process(total, ranks.detached_sum(total, group), group)
    if not detailed:
        return result, None
    sums = Sums(torch.stack(counts), *_labels(probabilities, valid), torch.stack(numerators), torch.stack(weights))
    return result, Sums(*(t.detach() for t in sums)).over_ranks(group)


def maps(
    logits: list[Tensor],
    features: list[Tensor] | None,
    options: Options,
    valid: Tensor | None = None,
    extras: Extras = NOTHING,
) -> list[Reliability]:
    """Mask, weight and their intermediate values of the loss above, pair by pair."""
    logits, features = _prepared(logits, features, valid)
    p = [F.softmax(z, dim=1) for z in logits]
    averaged = _averaged(p, features, options, valid, extras)
    return [
        _pair(i, j, _mask(p[i], p[j], options, valid), p, features, averaged, valid, options, extras)
        for i, j in ordered_pairs(len(logits), options.students)
    ]


def _pair(
    i: int,
    j: int,
    mask: Tensor,
    p: list[Tensor],
    f: list[Tensor] | None,
    averaged: list[Tensor] | None,
    valid: Tensor | None,
    options: Options,
    extras: Extras,
) -> Reliability:
    label = p[j].argmax(dim=1)  # (B, *spatial)
    if options.weighting is None or f is None:
        return Reliability(i, j, mask, _factors(mask.to(p[i].dtype), label, options, extras), label, None, None)
    prototypes = averaged[j] if averaged else _prototypes(f[j], label, valid, p[j].shape[1], options)
    similarity = _similarity(f[j], prototypes)
    sharpened = p[j] if options.temperature == 1 else F.softmax(torch.log(p[j]) / options.temperature, dim=1)
    weight = mask.to(p[i].dtype) * (1 - (similarity - sharpened) ** 2).mean(dim=1)
    return Reliability(i, j, mask, _factors(weight, label, options, extras), label, prototypes, similarity)


def _factors(weight: Tensor, label: Tensor, options: Options, extras: Extras) -> Tensor:
    if options.class_weights is not None:
        weight = weight * weight.new_tensor(options.class_weights)[label]
    if extras.sample_weights is not None:
        weight = weight * extras.sample_weights.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
    return weight


def _mask(student: Tensor, teacher: Tensor, options: Options, valid: Tensor | None) -> Tensor:
    mask = _more_confident(student, teacher, options)
    if options.minimum_confidence is not None:
        mask = mask & (teacher.amax(dim=1) >= options.minimum_confidence)
    return mask if valid is None else mask & valid


def _more_confident(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    if options.confidence is None:
        return torch.ones_like(student[:, 0], dtype=torch.bool)
    if options.confidence == "max_probability":
        return student.amax(dim=1) < teacher.amax(dim=1)
    entropy_student = -torch.sum(student * torch.log(student + options.eps), dim=1)
    entropy_teacher = -torch.sum(teacher * torch.log(teacher + options.eps), dim=1)
    return entropy_student > entropy_teacher


def _averaged(
    p: list[Tensor], f: list[Tensor] | None, options: Options, valid: Tensor | None, extras: Extras
) -> list[Tensor] | None:
    """mu of every network, (B, C, F), from the averages over the calls; None unless ``prototypes="average"``."""
    if options.weighting is None or f is None or extras.averages is None:
        return None
    sums = [_sums(f[k], p[k].argmax(dim=1), valid, p[k].shape[1], options) for k in range(len(p))]
    means = extras.averages.updated([total[0] for total, _ in sums], [number[0, :, 0] for _, number in sums], options.eps)
    return [F.normalize(m, dim=-1, eps=1e-12).expand(p[0].shape[0], -1, -1) for m in means]


def _prototypes(f: Tensor, label: Tensor, valid: Tensor | None, classes: int, options: Options) -> Tensor:
    total, number = _sums(f, label, valid, classes, options)
    return F.normalize(total / (number + options.eps), dim=-1, eps=1e-12)


def _sums(f: Tensor, label: Tensor, valid: Tensor | None, classes: int, options: Options) -> tuple[Tensor, Tensor]:
    """Sum of the features of every class (B, C, F), and its number of voxels (B, C, 1)."""
    total = f.new_zeros(f.shape[0], classes, f.shape[1])  # (B, C, F)
    number = f.new_zeros(f.shape[0], classes, 1)
    for b in range(f.shape[0]):
        for c in range(classes):
            of_class = label[b] == c  # (*spatial)
            of_class = (of_class if valid is None else of_class & valid[b]).to(f.dtype)
            total[b, c] = (f[b] * of_class).flatten(1).sum(dim=1)
            number[b, c] = of_class.sum()
    if options.prototypes != "sample":
        total = ranks.detached_sum(total.sum(dim=0, keepdim=True), options.process_group).expand_as(total)
        number = ranks.detached_sum(number.sum(dim=0, keepdim=True), options.process_group).expand_as(number)
    return total, number


def _similarity(f: Tensor, prototypes: Tensor) -> Tensor:
    classes = prototypes.shape[1]
    similarity = f.new_zeros(f.shape[0], classes, *f.shape[2:])
    for b in range(f.shape[0]):
        voxels = f[b].flatten(1)  # (F, V)
        for c in range(classes):
            cosine = F.cosine_similarity(voxels, prototypes[b, c].unsqueeze(1), dim=0, eps=1e-8)  # (V,)
            similarity[b, c] = cosine.view(f.shape[2:])
    return similarity


def _labels(p: list[Tensor], valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Voxels per network and pseudo-label (K, C); voxels whose labels differ, over unordered pairs; voxels: int64."""
    labels = [q.argmax(dim=1) for q in p]
    inside = torch.ones_like(labels[0], dtype=torch.bool) if valid is None else valid
    members = [torch.stack([(y.eq(c) & inside).sum() for c in range(p[0].shape[1])]) for y in labels]
    differing = [(labels[i].ne(labels[j]) & inside).sum() for i, j in ordered_pairs(len(p)) if i < j]
    return torch.stack(members), torch.stack(differing).sum(), inside.sum()


def _prepared(
    logits: list[Tensor], features: list[Tensor] | None, valid: Tensor | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Float32 or better, with zeros outside ``valid``."""
    everything = [*logits, *(features or [])]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in everything) else torch.float32
    keep = None if valid is None else valid.unsqueeze(1)
    z = [valid_only(t.to(dtype), keep) for t in logits]
    return z, None if features is None else [valid_only(t.to(dtype), keep) for t in features]
