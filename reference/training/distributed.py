"""Distributed training with torchrun: one process per GPU, on one or more machines, each with its part of every batch.

N ranks are equivalent to one process: the loss is that of the whole batch (`process_group` of `rplib.MutualObjective`),
batch normalisation uses the whole batch, DistributedDataParallel averages the gradients. Only dropout differs: each rank
draws its own masks.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rplib.errors import UserError

T = TypeVar("T")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process in the process group; `Ranks()` is a single process.

    Attributes:
        rank: rank 0 writes the run folder.
        size: number of processes.
        group: the process group, or None for a single process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """Gather one object from each rank, in rank order, on every rank."""
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def from_first(self, mine: T) -> T:
        """Broadcast an object from rank 0."""
        if self.group is None:
            return mine
        box = [mine if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a user error on any rank ends all ranks and is reported once, by rank 0."""
        mistake = None
        try:
            yield
        except UserError as error:
            if self.group is None:
                raise
            mistake = str(error)
        errors = [(rank, text) for rank, text in enumerate(self.gather(mistake)) if text is not None]
        if errors and self.first:
            rank, text = errors[0]
            raise UserError(text if rank == 0 else f"rank {rank}: {text}")
        if errors:
            raise SystemExit(2)


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or another launcher with the same variables, started this process as one of several."""
    return all(name in environment for name in _TORCHRUN) and int(environment["WORLD_SIZE"]) > 1


def own_device(device: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The device of this process: each rank uses its own GPU.

    >>> own_device(None, {}), own_device("cpu", {"LOCAL_RANK": "1"})
    (None, 'cpu')

    Raises:
        UserError: one GPU is named for all ranks.
    """
    if not started_by_torchrun(environment):
        return device
    if device is not None and device.partition(":")[2]:
        raise UserError(f"--device {device} with several processes; omit the number, each process uses its own GPU.")
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return f"cuda:{environment['LOCAL_RANK']}"
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks started by torchrun, with NCCL on GPUs and gloo otherwise; a single process without torchrun."""
    if not started_by_torchrun():
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def distributed(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module that a training step calls: the network, wrapped to average gradients over ranks."""
    if ranks.group is None:
        return network
    # Batch statistics cover the whole batch on every rank, so no buffers need to be broadcast.
    sync = "forward_sync_buffers"  # renamed in torch 2.13
    new = sync in inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {sync if new else "broadcast_buffers": False}
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=ranks.group,
        gradient_as_bucket_view=True,
        **buffers,
    )


def synchronise_batch_norm(network: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Synchronise batch normalisation over ranks; parameters, buffers and their names are kept.

    PyTorch's SyncBatchNorm rejects CPU tensors; on a CPU, `GlobalBatchNorm` is used.
    """
    if ranks.group is None:
        return
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                if device.type == "cuda":
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(layer, ranks.group))
                else:
                    setattr(parent, name, GlobalBatchNorm(layer, ranks.group))


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation (N, C, *spatial) with mean and variance over the samples of all ranks.

    Ranks may have different numbers of samples. Reuses the parameters and buffers of `layer`.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm, group: Any) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.group = group
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        here = x.new_tensor([x.numel() // x.shape[1]])
        sums = sum_over_ranks(torch.cat([x.sum(axes), here]), self.group)  # (C + 1,)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(axes), self.group) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale.view(shape) + self.bias.view(shape)

    def _check_input_dim(self, x: Tensor) -> None:
        pass


def sum_over_ranks(local: Tensor, group: Any) -> Tensor:
    """Differentiable sum over ranks: gradients of all ranks' losses are summed and sent back to every rank."""
    return local if group is None else _Sum.apply(local, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        ctx.group = group
        summed = local.detach().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        summed = upstream.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None
