"""One step of training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

PARTS = ("forward", "loss", "loss backward", "backward", "optimiser")


def training_step(
    network: nn.Module,
    objective: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    consistency_weight: float | Tensor,
    autocast_dtype: torch.dtype | None = None,
    mark: Callable[[str], None] | None = None,
) -> tuple[Tensor, ...]:
    """Forward, backward and update; does not synchronise the device.

    Args:
        network: in training mode; returns (logits, features), a list each.
        objective: `rplib.MutualObjective` or the like; total = dice_weight * dice + consistency_weight * mutual.
        images: (B, channels, X, Y, Z), labelled samples first.
        labels: (B_l, X, Y, Z) of the labelled samples.
        autocast_dtype: autocast precision of the network's forward pass; None: that of the weights.
        mark: called with the name of each of `PARTS` when it is finished, for timing.

    Returns:
        (total, dice, mutual), detached 0-dim tensors on the device; then, if the objective reports them, the fields of its
        `statistics` (`rplib.ObjectiveStatistics`).
    """
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits, features = network(images)
    _mark(mark, "forward")
    loss = objective(logits, features, labels, consistency_weight)
    _mark(mark, "loss")
    if mark is not None:
        # The backward pass reaches the logits after the whole loss and before the rest of the network.
        logits[-1].register_hook(lambda _: mark("loss backward"))
    loss.total.backward()
    _mark(mark, "backward")
    optimiser.step()
    _mark(mark, "optimiser")
    return loss.total.detach(), loss.dice, loss.mutual, *(getattr(loss, "statistics", None) or ())


def _mark(mark: Callable[[str], None] | None, part: str) -> None:
    if mark is not None:
        mark(part)
