"""Count the bytes and operations of eager PyTorch code, where every operation reads and writes memory.

    with eager_traffic() as traffic:
        loss = f(x)
        loss.backward()
    traffic.bytes, traffic.operations
    traffic.by_operation["aten.mul.Tensor"]        # Operation(calls, bytes)

Rule: an operation counts the bytes of all operand and result tensors, elements x element size; an expanded tensor counts
its full shape, and a tensor written in place counts once as operand and once as result. So ``a + b`` of n float32 is 12 n
bytes, and so is ``a += b``. Not counted, neither as operations nor in bytes: views (results that share an operand's storage
and change nothing: select, expand, view, detach, ...) and pure allocations (``torch.empty`` and the like). Writes by
``zeros`` or ``full`` count.

This equals memory traffic if operands do not stay in a cache, as with tensors of tens of megabytes. Limits:

- An operator is one call, regardless of its internals: a custom operator (``torch.library``) counts its operands and results
  once. ``custom_operators`` lists those that ran; for Triton kernels, ``traffic.py`` counts the actual accesses.
- A dispatch mode cannot see into code from ``torch.compile`` (and a compiled function called under one falls back to eager
  permanently): calling such a function inside, or the backward pass of one called outside, raises UserError. Count the function
  before compilation; that is the traffic of the eager form, not of the compiled one. ``inductor_traffic.py`` has the compiler's
  own estimate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rplib.bench.traffic import replaced
from rplib.errors import UserError

_COMPILED = (
    "a function compiled by torch.compile was run inside eager_traffic, which cannot see into compiled code; count the function "
    "before compilation."
)
_BACKWARD = ("apply", "apply_boxed")  # how autograd calls a node written in Python


class Operation(NamedTuple):
    """All calls of one operation."""

    calls: int
    bytes: int


class EagerTraffic:
    """Operations inside ``eager_traffic`` in order of first call; the module docstring defines the counts."""

    def __init__(self) -> None:
        self.by_operation: dict[str, Operation] = {}
        self.custom_operators: list[str] = []

    @property
    def operations(self) -> int:
        return sum(operation.calls for operation in self.by_operation.values())

    @property
    def bytes(self) -> int:
        return sum(operation.bytes for operation in self.by_operation.values())

    def _add(self, function: Any, moved: int) -> None:
        name = str(function)
        if function.namespace not in ("aten", "prims") and name not in self.custom_operators:
            self.custom_operators.append(name)
        before = self.by_operation.get(name, Operation(0, 0))
        self.by_operation[name] = Operation(before.calls + 1, before.bytes + moved)


class _Counting(TorchDispatchMode):
    def __init__(self, traffic: EagerTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Under inference_mode, operations like linear or cross_entropy are not decomposed.
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        operands = _tensors((args, kwargs))
        results = _tensors(result)
        if (operands or results) and not _is_view(func, operands, results) and not _only_allocates(func):
            self.traffic._add(func, sum(_size(tensor) for tensor in (*operands, *results)))
        return result


@contextmanager
def eager_traffic() -> Iterator[EagerTraffic]:
    """Count every PyTorch operation inside the context, forward and backward.

    >>> a, b = torch.ones(1000), torch.ones(1000)
    >>> with eager_traffic() as traffic:
    ...     c = (a + b).view(10, 100)
    >>> traffic.operations, traffic.bytes
    (1, 12000)

    Raises:
        UserError: a function compiled by torch.compile is called inside.
    """
    traffic = EagerTraffic()
    with _compiled_functions_refused(), _Counting(traffic):
        yield traffic


@contextmanager
def _compiled_functions_refused() -> Iterator[None]:
    """Reject compiled functions: they would run uncounted, or uncompiled."""
    import torch._dynamo.eval_frame as eval_frame
    from torch.autograd.function import BackwardCFunction

    try:
        callback_of = eval_frame._callback_from_stance
        applies = {name: getattr(BackwardCFunction, name) for name in _BACKWARD if name in vars(BackwardCFunction)}
    except AttributeError as error:
        raise UserError(
            f"eager_traffic cannot recognise compiled functions in torch {torch.__version__} ({error}); it supports torch 2.13."
        ) from None

    def refused_call(callback: Any) -> Any:
        if callback is not None and callback is not False:  # None: dynamo switched off for this call, as in operators
            raise UserError(_COMPILED)
        return callback_of(callback)

    def refusing(apply: Callable[..., Any]) -> Callable[..., Any]:
        def refused_backward(self: Any, *gradients: Any) -> Any:
            if type(self).__name__ == "CompiledFunctionBackward":
                raise UserError(_COMPILED)
            return apply(self, *gradients)

        return refused_backward

    with ExitStack() as stack:
        stack.enter_context(replaced(eval_frame, "_callback_from_stance", refused_call))
        for name, apply in applies.items():
            stack.enter_context(replaced(BackwardCFunction, name, refusing(apply)))
        yield


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _is_view(function: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Detected by the result, since some views are not marked as such (``aten._unsafe_view``)."""
    if function._schema.is_mutable or not results:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in operands}
    return all(tensor.untyped_storage()._cdata in storages for tensor in results)


def _only_allocates(function: Any) -> bool:
    return "empty" in function._opname
