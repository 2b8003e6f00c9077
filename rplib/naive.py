"""The method line by line: slow, hungry, and the truth that the other forms are held against.

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
fused, as a reader of the paper would write it; keep it so, because benchmarks use it as their baseline.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rplib import ranks
from rplib.maps import Reliability, ordered_pairs
from rplib.options import Options


def loss(logits: list[Tensor], features: list[Tensor] | None, options: Options, masks: list[Tensor] | None = None) -> Tensor:
    """The mutual loss, a 0-dim tensor; gradients by autograd.

    ``masks``, one (B, *spatial) per ordered pair, stand in for the comparison of confidences: two implementations may
    differ where both networks are equally confident, and are compared with the formula at one and the same mask.
    """
    logits, features = _compute_in_float32_or_better(logits, features)
    probabilities = [F.softmax(z, dim=1) for z in logits]
    total = logits[0].new_zeros(())
    for n, (i, j) in enumerate(ordered_pairs(len(logits))):
        mask = _mask(probabilities[i], probabilities[j], options) if masks is None else masks[n]
        pair = _pair(i, j, mask, probabilities, features, options)
        scores = logits[i] if options.cross_entropy_on == "logits" else probabilities[i]
        cross_entropy = F.cross_entropy(scores, pair.pseudo_label, reduction="none")  # (B, *spatial)
        count = ranks.total(pair.mask.sum(), options.process_group).to(scores.dtype) + options.eps  # n_ij, counted in integers
        total = total + (pair.weight.detach() * cross_entropy).sum() / count
    return ranks.as_one_process(total, ranks.total(total, options.process_group), options.process_group)


def maps(logits: list[Tensor], features: list[Tensor] | None, options: Options) -> list[Reliability]:
    """What the loss above multiplies the cross-entropy with, pair by pair."""
    logits, features = _compute_in_float32_or_better(logits, features)
    probabilities = [F.softmax(z, dim=1) for z in logits]
    return [
        _pair(i, j, _mask(probabilities[i], probabilities[j], options), probabilities, features, options)
        for i, j in ordered_pairs(len(logits))
    ]


def _pair(i: int, j: int, mask: Tensor, p: list[Tensor], f: list[Tensor] | None, options: Options) -> Reliability:
    label = p[j].argmax(dim=1)  # (B, *spatial)
    if options.weighting is None or f is None:
        return Reliability(i, j, mask, mask.to(p[i].dtype), label, None, None)
    prototypes = _prototypes(f[j], label, classes=p[j].shape[1], eps=options.eps)
    similarity = _similarity(f[j], prototypes)
    weight = mask.to(p[i].dtype) * (1 - (similarity - p[j]) ** 2).mean(dim=1)
    return Reliability(i, j, mask, weight, label, prototypes, similarity)


def _mask(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    if options.confidence is None:
        return torch.ones_like(student[:, 0], dtype=torch.bool)
    if options.confidence == "max_probability":
        return student.amax(dim=1) < teacher.amax(dim=1)
    entropy_student = -torch.sum(student * torch.log(student + options.eps), dim=1)
    entropy_teacher = -torch.sum(teacher * torch.log(teacher + options.eps), dim=1)
    return entropy_student > entropy_teacher


def _prototypes(f: Tensor, label: Tensor, classes: int, eps: float) -> Tensor:
    mean = f.new_zeros(f.shape[0], classes, f.shape[1])  # (B, C, F)
    for b in range(f.shape[0]):
        for c in range(classes):
            of_class = (label[b] == c).to(f.dtype)  # (*spatial)
            mean[b, c] = (f[b] * of_class).flatten(1).sum(dim=1) / (of_class.sum() + eps)
    return F.normalize(mean, dim=-1, eps=1e-12)


def _similarity(f: Tensor, prototypes: Tensor) -> Tensor:
    classes = prototypes.shape[1]
    similarity = f.new_zeros(f.shape[0], classes, *f.shape[2:])
    for b in range(f.shape[0]):
        voxels = f[b].flatten(1)  # (F, V)
        for c in range(classes):
            cosine = F.cosine_similarity(voxels, prototypes[b, c].unsqueeze(1), dim=0, eps=1e-8)  # (V,)
            similarity[b, c] = cosine.view(f.shape[2:])
    return similarity


def _compute_in_float32_or_better(
    logits: list[Tensor], features: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    everything = [*logits, *(features or [])]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in everything) else torch.float32
    return [z.to(dtype) for z in logits], None if features is None else [f.to(dtype) for f in features]
