"""Training objectives by the setting `method`: the paper's, its ablations, and two published alternatives.

| `method` | the two decoders learn from each other |
|---|---|
| `both` | the paper: where the other is more confident (which), weighted by the similarity to its class prototype (how) |
| `which-only` | where the other is more confident, with weight 1 |
| `how-only` | everywhere, weighted by the similarity of the other's feature to its class prototype |
| `cross-pseudo-supervision` | everywhere, with weight 1: Chen et al., CVPR 2021, with two decoders instead of two networks |
| `mutual-consistency` | squared difference to the other's sharpened probabilities: Wu et al., MICCAI 2021 (MC-Net) |

All except the last are options of `rplib.MutualObjective`. Data, network, supervised term and ramp-up do not change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rplib
from rplib.reference.config import CONSISTENCY, Config
from rplib.reference.training.distributed import sum_over_ranks


def build_objective(config: Config, group: Any = None) -> nn.Module:
    """The objective, called with (logits, features, target, consistency weight).

    Args:
        group: the process group of a distributed training.

    Returns:
        A module that returns `total`, `dice` and `mutual`, like `rplib.MutualObjective`.
    """
    objective = rplib.MutualObjective(**config.loss_keywords, process_group=group)
    return ConsistencyObjective(objective, config.temperature, group) if config.method == CONSISTENCY else objective


class ConsistencyObjective(nn.Module):
    """L = supervised term + consistency_weight * sum over ordered pairs of mean (p_i - sharpened p_j)^2.

    The sharpened probability is p_j^(1/T) / sum_c p_j(c)^(1/T), which is softmax(z_j / T). The mean is over all samples,
    classes and voxels; gradients flow through both sides, as in the published code of the MC-Net line.

    Args:
        supervised: computes the supervised term; called with weight 0 for its mutual term.
        temperature: T; 0.1 in the paper.

    Source: Wu et al., "Semi-supervised left atrium segmentation with mutual consistency training", MICCAI 2021.

    Example:
        >>> z = [torch.tensor([[[0.0], [0.0]]]), torch.tensor([[[0.0], [0.2]]])]
        >>> terms = ConsistencyObjective(rplib.MutualObjective(confidence=None, weighting=None), 0.1)(
        ...     z, None, torch.zeros(0, 1), 1.0)
        >>> a, b, sharp = 0.5, torch.tensor(0.2).sigmoid(), torch.tensor(2.0).sigmoid()
        >>> torch.allclose(terms.mutual, (a - sharp) ** 2 + (b - 0.5) ** 2)
        True
    """

    def __init__(self, supervised: rplib.MutualObjective, temperature: float, group: Any = None) -> None:
        super().__init__()
        self.supervised, self.temperature, self.group = supervised, temperature, group

    def forward(
        self, logits: Sequence[Tensor], features: Sequence[Tensor] | None, target: Tensor, consistency_weight: float | Tensor
    ) -> Any:
        terms = self.supervised(logits, None, target, 0.0)
        with torch.autocast(logits[0].device.type, enabled=False):
            scores = [z if z.dtype == torch.float64 else z.float() for z in logits]
            p = [z.softmax(1) for z in scores]
            sharp = [(z / self.temperature).softmax(1) for z in scores]
            pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if i != j]
            squares = torch.stack([(p[i] - sharp[j]).square().sum() for i, j in pairs]).sum()
        # Ranks may have different numbers of samples: the mean is taken over the samples of all ranks.
        mutual = sum_over_ranks(squares, self.group) / sum_over_ranks(squares.new_tensor(p[0].numel()), self.group)
        return terms._replace(total=terms.total + consistency_weight * mutual, mutual=mutual.detach())
