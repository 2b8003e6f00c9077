"""Sums over the ranks of a process group, so that N processes compute what one would with the whole batch.

What is summed before the loss can be known: mask counts, loss numerators, Dice sums. Every rank then returns the loss of the
whole batch. Its local gradient is multiplied by the number of ranks, because DistributedDataParallel averages gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup where torch was built with it, or None for a single process


def check_group(group: Group) -> None:
    """Refuse what is no process group, and a group that this process is no member of.

    Raises:
        TypeError, ValueError: names ``process_group``.
    """
    if group is None:
        return
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group was given but torch.distributed is not initialised; call init_process_group first.")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(group).__name__}; expected a torch.distributed process group such as "
            "torch.distributed.group.WORLD, or None."
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group does not contain this process; expected a group that every calling rank belongs to.")


def total(local: Tensor, group: Group) -> Tensor:
    """The sum over ranks, without a gradient; the tensor itself without a group."""
    if group is None:
        return local
    summed = local.detach().clone()
    dist.all_reduce(summed, group=group)
    return summed


def as_one_process(local: Tensor, value: Tensor, group: Group) -> Tensor:
    """``value`` with the gradient of ``local`` times the number of ranks; ``local`` itself without a group."""
    if group is None:
        return local
    result: Tensor = _Global.apply(local, value, dist.get_world_size(group))  # type: ignore[no-untyped-call]
    return result


class _Global(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, value: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.ranks, None, None
