"""The quick form of Triton's interpreter gives the bits of the released one, and leaves triton.language as it was."""

import inspect

import pytest
import quick_interpreter
import torch
from loss_cases import HAS_TRITON, networks

import rplib.functional

if not HAS_TRITON or torch.cuda.is_available():
    pytest.skip("for Triton's interpreter", allow_module_level=True)


def loss_and_gradients(classes, features):
    logits, feats = networks((5, 6, 7), classes, features)
    for z in logits:
        z.requires_grad_()
    loss = rplib.functional.reliable_mutual_loss(logits, feats, impl="triton")
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


@pytest.mark.parametrize(("classes", "features"), [(2, 5), (5, 6)])
def test_same_bits(classes, features):
    quick = loss_and_gradients(classes, features)
    with quick_interpreter.as_released():
        released = loss_and_gradients(classes, features)
    for ours, theirs in zip(quick, released, strict=True):
        assert torch.equal(ours, theirs)
    assert quick[0] > 0


def test_it_is_in_use(monkeypatch):
    searched = []
    search = inspect.getmembers
    monkeypatch.setattr(inspect, "getmembers", lambda *arguments: searched.append(arguments[0]) or search(*arguments))
    loss_and_gradients(2, 5)
    assert not searched
    with quick_interpreter.as_released():
        loss_and_gradients(2, 5)
    assert len(searched) > 100


def test_the_language_is_restored_after_a_launch():
    import triton.language as tl

    loss_and_gradients(2, 5)
    before = {name: vars(tl)[name] for name in quick_interpreter.builtin_names(tl)}
    assert {"load", "store", "program_id"} <= set(before)
    loss_and_gradients(3, 5)
    assert {name: vars(tl)[name] for name in quick_interpreter.builtin_names(tl)} == before
