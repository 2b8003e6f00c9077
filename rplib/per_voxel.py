"""The loss before the sum: the loss of each voxel for each student, for ``reduction="none"``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rplib.inputs import valid_only
from rplib.maps import Reliability
from rplib.options import Options


def loss(logits: list[Tensor], maps: list[Reliability], options: Options, valid: Tensor | None) -> Tensor:
    """w_ij CE_ij of the pairs in ``maps``: (pairs, B, *spatial), differentiable with respect to the logits by autograd."""
    dtype = torch.promote_types(maps[0].weight.dtype, torch.float32)
    keep = None if valid is None else valid.unsqueeze(1)
    scores = [valid_only(z.to(dtype), keep) for z in logits]
    if options.cross_entropy_on == "probabilities":
        scores = [F.softmax(z, dim=1) for z in scores]
    costs = []
    for pair in maps:
        cross_entropy = F.cross_entropy(scores[pair.student], pair.pseudo_label, reduction="none")  # (B, *spatial)
        cost = pair.weight.to(dtype) * cross_entropy
        # Keep NaN, although no comparison with it is true. Where no network teaches, a class that is ruled out contributes 0.
        costs.append(torch.where(pair.mask | cost.isnan() & ~cross_entropy.isposinf(), cost, torch.zeros_like(cost)))
    return torch.stack(costs)
