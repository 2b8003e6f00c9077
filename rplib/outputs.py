"""Conversion of other network outputs for the loss: deep supervision, and sigmoid outputs of overlapping regions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def unstack(outputs: Sequence[Tensor | Sequence[Tensor]]) -> list[list[Tensor]]:
    """Split deep supervision outputs into levels, each with the list of logits that the loss accepts.

    Args:
        outputs: per network a stack (B, levels, C, *spatial), as MONAI's DynUNet returns in training, or a list of
            (B, C, *spatial) from fine to coarse, as nnU-Net's networks return.

    Returns:
        ``[level][network]``, views of the outputs; level 0 is the one that the features belong to.

    Raises:
        TypeError, ValueError: not a sequence with one entry per network, or networks with different numbers of levels.

    Example:
        >>> import torch
        >>> import rplib
        >>> levels = rplib.unstack([torch.zeros(2, 3, 4, 16, 16), torch.zeros(2, 3, 4, 16, 16)])
        >>> len(levels), [tuple(z.shape) for z in levels[0]]
        (3, [(2, 4, 16, 16), (2, 4, 16, 16)])
    """
    if isinstance(outputs, Tensor) or not isinstance(outputs, (list, tuple)):
        raise TypeError(f"outputs is a {type(outputs).__name__}; expected a list or tuple with one entry per network.")
    per_network = []
    for k, output in enumerate(outputs):
        if isinstance(output, Tensor):
            if not 4 <= output.ndim <= 6:
                raise ValueError(f"outputs[{k}] has shape {tuple(output.shape)}; expected a stack (B, levels, C, *spatial).")
            per_network.append(list(output.unbind(1)))
        else:
            per_network.append(list(output))
    numbers = [len(levels) for levels in per_network]
    if not numbers or min(numbers) < 1 or len(set(numbers)) > 1:
        raise ValueError(f"outputs have {numbers} levels; expected the same number, at least 1, from every network.")
    return [list(level) for level in zip(*per_network, strict=True)]


def regions(logits: Sequence[Tensor]) -> list[list[Tensor]]:
    """Convert sigmoid outputs of overlapping regions to one two-class problem per region: outside and inside.

    softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)), so entropies, pseudo-labels and Dice are those of the sigmoid.

    Args:
        logits: per network (B, R, *spatial), before the sigmoid.

    Returns:
        ``[region][network]``, (B, 2, *spatial) each; class 1 is the region.

    Raises:
        TypeError: not a sequence of tensors.

    Example:
        >>> import torch
        >>> import rplib
        >>> logits = [torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(2)]  # three regions
        >>> features = [torch.randn(4, 16, 8, 8) for _ in range(2)]
        >>> target = torch.randint(0, 2, (2, 3, 8, 8))
        >>> objective = rplib.MutualObjective()
        >>> terms = [objective(z, features, truth, 0.1) for z, truth in zip(rplib.regions(logits), target.unbind(1))]
        >>> torch.stack([term.total for term in terms]).mean().backward()
    """
    if isinstance(logits, Tensor) or not isinstance(logits, (list, tuple)):
        raise TypeError(f"logits is a {type(logits).__name__}; expected a list or tuple with one tensor per network.")
    for k, z in enumerate(logits):
        if not isinstance(z, Tensor) or z.ndim < 3:
            raise TypeError(f"logits[{k}] is {_shown(z)}; expected a tensor (B, R, *spatial).")
        if z.shape[1] != logits[0].shape[1]:
            raise ValueError(
                f"logits[{k}] has {z.shape[1]} regions but logits[0] has {logits[0].shape[1]}; expected the same number."
            )
    return [
        [torch.cat([torch.zeros_like(z[:, r : r + 1]), z[:, r : r + 1]], dim=1) for z in logits]
        for r in range(logits[0].shape[1] if logits else 0)
    ]


def _shown(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
