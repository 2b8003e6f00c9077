"""Moving averages of the classes' mean features: the state behind ``prototypes="average"``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class PrototypeAverages(nn.Module):
    """For each network and class, the mean feature of the voxels with that pseudo-label, averaged over the calls.

    The first batch that contains a class sets its mean, and every further one moves it by ``1 - decay``. A batch without a voxel
    of the class does not change the mean. A class that no batch contained has a zero mean, and so a zero prototype. In
    evaluation mode nothing is updated. Means with NaN or infinity are ignored.

    Buffers, empty until the first call: ``means`` (K, C, F), padded with zeros for networks with fewer channels;
    ``known`` (K, C) bool.
    """

    means: Tensor
    known: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.empty(0))
        self.register_buffer("known", torch.empty(0, dtype=torch.bool))

    def reset(self) -> None:
        """Discard the averages; the next call starts again like the first."""
        self.means, self.known = self.means.new_empty(0), self.known.new_empty(0)

    @torch.no_grad()
    def updated(self, sums: Sequence[Tensor], numbers: Sequence[Tensor], eps: float) -> list[Tensor]:
        """Update with one batch, over all ranks, and return the means.

        Args:
            sums: per network (C, F), sum of the features of every class.
            numbers: per network (C,), number of voxels of every class.
            eps: added to the number of voxels in the mean of the batch.

        Returns:
            Per network (C, F), in the dtype of the sums.

        Raises:
            ValueError: the number of networks, classes or features differs from earlier calls.
        """
        self._make_room(sums)
        result = []
        for k, (total, number) in enumerate(zip(sums, numbers, strict=True)):
            width = total.shape[1]
            old = self.means[k, :, :width]
            if self.training:
                mean = (total / (number.to(total.dtype).unsqueeze(1) + eps)).to(old.dtype)
                there = (number > 0) & mean.isfinite().all(dim=1)
                moved = torch.where(self.known[k].unsqueeze(1), self.decay * old + (1 - self.decay) * mean, mean)
                old.copy_(torch.where(there.unsqueeze(1), moved, old))
                self.known[k].logical_or_(there)
            result.append(old.to(total.dtype, copy=True))
        return result

    def extra_repr(self) -> str:
        """The decay, for print(module)."""
        return f"decay={self.decay}"

    def _make_room(self, sums: Sequence[Tensor]) -> None:
        first, widths = sums[0], [total.shape[1] for total in sums]
        shape = (len(sums), first.shape[0], max(widths))
        if self.means.numel() == 0:
            self.means = first.new_zeros(shape)
            self.known = torch.zeros(shape[:2], dtype=torch.bool, device=first.device)
        if tuple(self.means.shape) != shape:
            networks, classes, width = self.means.shape
            raise ValueError(
                f"the prototypes are averages over {networks} networks, {classes} classes and F = {width} features; this call "
                f"has {shape[0]}, {shape[1]} and {shape[2]}. Call reset_prototypes() to start again, or build another module."
            )
        if self.means.device != first.device:  # loaded on a CPU, or the networks moved
            self.means, self.known = self.means.to(first.device), self.known.to(first.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("means", "known"):  # take the sizes from the checkpoint
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Extras(NamedTuple):
    """Arguments of a call other than tensors and options.

    sample_weights: (B,) factor of the weights of a sample's voxels, None for 1; averages: only with ``prototypes="average"``.
    """

    sample_weights: Tensor | None = None
    averages: PrototypeAverages | None = None


NOTHING = Extras()
