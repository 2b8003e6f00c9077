"""`pytest bench`: time every implementation that runs on this machine, on small inputs, grouped by input (pytest-benchmark).

For memory, bytes and the floor use `rplib bench`; this is for checking the effect of a change: `--benchmark-autosave`,
then `--benchmark-compare`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rplib.bench.correctness import Truth
from rplib.bench.implementations import IMPLEMENTATIONS
from rplib.bench.shapes import SHAPES, Case, Shape, clear_gradients, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    Case(SHAPES["small"]),
    Case(SHAPES["odd"]),
    Case(Shape("medium", 1, 2, 16, (64, 64, 64))),
    Case(Shape("medium", 1, 2, 16, (64, 64, 64)), layout="channels_last"),
    Case(Shape("medium-2d", 4, 4, 16, (256, 256))),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.shape.name}-{case.layout}")
def prepared(request: Any) -> tuple[Case, list[Tensor], list[Tensor], Truth]:
    logits, features = make_inputs(request.param, DEVICE)
    return request.param, logits, features, Truth(logits, features)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_forward_and_backward(prepared: Any, name: str, benchmark: Any) -> None:
    case, logits, features, truth = prepared
    implementation = IMPLEMENTATIONS[name]
    obstacle = implementation.obstacle(DEVICE)
    if obstacle:
        pytest.skip(obstacle)
    torch.compiler.reset()
    loss_fn = implementation.make()

    def clear() -> None:
        clear_gradients([*logits, *features])

    def call() -> Tensor:
        loss = loss_fn(logits, features)
        loss.backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return loss

    clear()
    verdict = truth.judge(call(), [z.grad for z in logits], exact_order=implementation.exact_order)
    assert verdict.right, f"wrong result, so not timed: {verdict}"
    benchmark.group = str(case)
    benchmark.extra_info["device"] = str(DEVICE)
    benchmark.pedantic(call, setup=clear, rounds=7, warmup_rounds=1)
