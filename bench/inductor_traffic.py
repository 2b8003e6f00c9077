"""Inductor's estimate of the bytes that a compiled function moves: all buffers that its kernels read or write.

    with inductor_estimate() as estimate:              # recompiles: caches are off inside
        loss = torch.compile(f)(x)
        loss.backward()
    estimate.bytes, estimate.kernels                   # forward and backward graph together

This is an estimate, not a measurement. A kernel that reads a buffer twice counts it once; an operation that inductor delegates
to a library (a matrix product, a sort) counts operands and result. Every graph counts once, however often it runs, so call the
function once inside, and on a function that torch.compile has not seen before.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rplib.bench.traffic import replaced
from rplib.errors import UserError


class InductorEstimate:
    """bytes and kernels of the graphs compiled inside ``inductor_estimate``.

    graphs: how many were compiled; kernels: scheduled groups of fused operations.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.kernels = 0
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Raises UserError if inductor compiled nothing."""
        if self.graphs == 0:
            raise UserError(
                "inductor compiled nothing inside inductor_estimate: the function is not compiled, or was compiled "
                "before (torch._dynamo.reset() clears its cache)."
            )
        return self._bytes


@contextmanager
def inductor_estimate() -> Iterator[InductorEstimate]:
    """Sum inductor's estimates for the graphs compiled inside the context.

    Raises:
        UserError: this version of torch has no such estimate, or, on reading ``bytes``, nothing was compiled.
    """
    try:
        import torch._functorch.config as autograd_config
        import torch._inductor.config as config
        from torch._inductor.graph import GraphLowering

        compile_graph, count_bytes = GraphLowering.compile_to_module, GraphLowering.count_bytes
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"inductor's estimate was not found; it supports torch 2.13, and this is torch {torch.__version__} ({error})."
        ) from None
    estimate = InductorEstimate()

    def counted(graph: Any, *rest: Any, **keywords: Any) -> Any:
        module = compile_graph(graph, *rest, **keywords)
        moved, nodes, _ = count_bytes(graph)  # of the scheduler's nodes, after fusion
        estimate.graphs += 1
        estimate.kernels += len(nodes)
        estimate._bytes += int(moved)
        return module

    with ExitStack() as stack:
        stack.enter_context(config.patch(fx_graph_cache=False))
        stack.enter_context(autograd_config.patch(enable_autograd_cache=False))
        stack.enter_context(replaced(GraphLowering, "compile_to_module", counted))
        yield estimate
