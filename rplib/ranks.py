"""Sums over the ranks of a process group, so that N processes compute the same as one process with the whole batch.

Mask counts, loss numerators and Dice sums are summed over the ranks. Every rank then returns the loss of the
whole batch. Its local gradient is multiplied by the number of ranks, because DistributedDataParallel averages gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # a torch.distributed.ProcessGroup, "world", a NamedGroup, or None for a single process


@dataclass(frozen=True)
class NamedGroup:
    """The pickled form of a process group: its name, by which the loading process looks it up."""

    name: str


def check_group(group: Group) -> None:
    """Reject a value that is not a process group, and a group without this process.

    Raises:
        TypeError, ValueError: names ``process_group``.
    """
    if group is None or group == "world" or isinstance(group, NamedGroup):
        return
    if isinstance(group, str) or not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        shown = repr(group) if isinstance(group, str) else f"a {type(group).__name__}"
        raise TypeError(
            f'process_group is {shown}; expected a torch.distributed process group, "world" for the default group, or None.'
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group does not contain this process; expected a group that every calling rank belongs to.")


def picklable(group: Group) -> Group:
    """The default group as "world", any other group by its name."""
    if group is None or isinstance(group, (str, NamedGroup)):
        return group
    return "world" if dist.is_initialized() and group is dist.group.WORLD else NamedGroup(group.group_name)


def resolved(group: Group) -> Group:
    """The process group itself, also if it is given by name; None without a group.

    Raises:
        ValueError: this process has no such group.
    """
    if not isinstance(group, (str, NamedGroup)):
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"process_group is {group!r} but torch.distributed is not initialised; call init_process_group before the loss, "
            "or pass process_group=None in a single process."
        )
    if isinstance(group, str):
        return dist.group.WORLD
    by_name: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009 (not exported)
    try:
        return by_name(group.name)
    except RuntimeError as error:
        raise ValueError(
            f"process_group was saved as the group {group.name!r}, which this process does not have; build the module with "
            "the group of this run."
        ) from error


def detached_sum(local: Tensor, group: Group) -> Tensor:
    """The sum over ranks, without a gradient; the tensor itself without a group.

    Raises:
        RuntimeError: another rank did not take part within the group's timeout, or has exited.
    """
    group = resolved(group)
    if group is None:
        return local
    summed = local.detach().clone()
    if torch.compiler.is_compiling():
        dist.all_reduce(summed, group=group)
        return summed
    try:
        dist.all_reduce(summed, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "the reliable mutual loss sums over the ranks of process_group, and another rank did not take part in time: every "
            "rank must call the loss equally often, also for maps and for a batch without labels; a call on one rank alone "
            f"(validation on rank 0) needs a module with process_group=None. torch.distributed says: {error}"
        ) from error
    return summed


def as_one_process(local: Tensor, value: Tensor, group: Group) -> Tensor:
    """``value`` with the gradient of ``local`` times the number of ranks; ``local`` itself without a group."""
    group = resolved(group)
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
