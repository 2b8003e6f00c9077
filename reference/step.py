"""One step of training."""

import torch
from torch import Tensor, nn

from rplib import MutualObjective


def training_step(
    network: nn.Module,
    objective: MutualObjective,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    consistency_weight: float | Tensor,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, backward and update; nothing here waits for the device.

    Args:
        network: in training mode; gives (logits, features), a list each.
        objective: total = dice_weight * dice + consistency_weight * mutual.
        images: (B, channels, X, Y, Z), labelled samples first.
        labels: (B_l, X, Y, Z) of those.
        autocast_dtype: precision of the network's forward pass under autocast; None: that of the weights.

    Returns:
        (total, dice, mutual), detached 0-dim tensors on the device.
    """
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits, features = network(images)
    loss = objective(logits, features, labels, consistency_weight)
    loss.total.backward()
    optimiser.step()
    return loss.total.detach(), loss.dice, loss.mutual
