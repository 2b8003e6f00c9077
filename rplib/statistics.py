"""Statistics of the objective, for logging and for early warnings."""

from typing import NamedTuple

import torch
from torch import Tensor

from rplib import ranks


class ObjectiveStatistics(NamedTuple):
    """Detached tensors on the device, from the passes that compute the loss. Only reading one waits for the device.

    Pairs are (student, teacher) = (0, 1), (0, 2) .. (1, 0) .., as in `rplib.reliability`, for the students that learn.

    Attributes:
        taught: (pairs,) share of the valid voxels at which the pair's teacher teaches.
        weight: (pairs,) mean weight w_ij of those voxels; 0 where there is none.
        mutual: (pairs,) L_ij; their sum is the mutual loss.
        pseudo_labels: (K, C) share of the valid voxels that each network gives to each class.
        disagreement: 0-dim, share of the valid voxels where two networks give different classes (mean over unordered pairs).
    """

    taught: Tensor
    weight: Tensor
    mutual: Tensor
    pseudo_labels: Tensor
    disagreement: Tensor


class Sums(NamedTuple):
    """The sums over voxels from which `ObjectiveStatistics` is computed; all but ``counts`` are of this rank only.

    counts: (pairs,) int64, of the whole batch; members: (K, C) int64; differing, voxels: 0-dim int64;
    numerators: (pairs,) of w CE / n; weights: (pairs,) of w.
    """

    counts: Tensor
    members: Tensor
    differing: Tensor
    voxels: Tensor
    numerators: Tensor
    weights: Tensor

    def over_ranks(self, group: ranks.Group) -> ObjectiveStatistics:
        """The shares and means of the whole batch."""
        integers = ranks.detached_sum(torch.cat([self.members.flatten(), torch.stack([self.differing, self.voxels])]), group)
        values = ranks.detached_sum(torch.stack([self.numerators, self.weights]), group)
        dtype = values.dtype
        shares = integers.to(dtype) / integers[-1].clamp_min(1)
        networks = self.members.shape[0]
        return ObjectiveStatistics(
            taught=self.counts.to(dtype) / integers[-1].clamp_min(1),
            weight=values[1] / self.counts.clamp_min(1),
            mutual=values[0],
            pseudo_labels=shares[:-2].view(self.members.shape),
            disagreement=shares[-2] / (networks * (networks - 1) // 2),
        )
