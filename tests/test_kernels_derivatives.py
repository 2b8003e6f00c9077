"""Derivatives that the kernels do not have raise, and sizes that they cannot take go elsewhere: nothing is silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad

import rplib
from rplib import dispatch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def networks(classes=2):
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(2, classes, 6, generator=generator).to(DEVICE).requires_grad_() for _ in range(2)]
    return logits, [torch.randn(2, 3, 6, generator=generator).to(DEVICE) for _ in range(2)]


def total(logits, features, weight, impl="triton"):
    target = torch.zeros(1, 6, dtype=torch.int64, device=DEVICE)
    return rplib.MutualObjective(impl=impl)(logits, features, target, weight).total


def test_second_derivative_through_the_consistency_weight():
    """d total / d weight is the mutual term, which depends on the logits."""
    logits, features = networks()
    weight = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    (slope,) = torch.autograd.grad(total(logits, features, weight), weight, create_graph=True)
    expected = rplib.functional.reliable_mutual_loss(logits, features, impl="naive")
    assert slope.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(slope, logits)


def test_the_first_derivative_through_the_weight_needs_no_graph():
    logits, features = networks()
    weight = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    total(logits, features, weight).backward()
    expected = rplib.functional.reliable_mutual_loss(logits, features, impl="naive")
    assert weight.grad.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("of", ["logits", "weight"])
def test_forward_mode(of):
    logits, features = networks()
    logits = [z.detach() for z in logits]
    weight = torch.tensor(0.7, device=DEVICE)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode.*impl=\"naive\""):
        if of == "logits":
            logits[0] = forward_ad.make_dual(logits[0], torch.ones_like(logits[0]))
        else:
            weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        total(logits, features, weight)


def test_forward_mode_elsewhere_is_nobodys_business():
    logits, features = networks()
    with forward_ad.dual_level():
        assert torch.isfinite(total([z.detach() for z in logits], features, 0.7))


def test_two_to_the_31_voxels_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "device_obstacle", lambda *_, **__: None)
    logits = [torch.zeros(1, 2, 1).expand(1, 2, 2**31) for _ in range(2)]
    assert dispatch.choose("auto", logits, None) == "torch"
    with pytest.raises(ValueError, match=r"2147483648 voxels.*2\^31"):
        dispatch.choose("triton", logits, None)
    assert dispatch.choose("auto", [z[..., :-1] for z in logits], None) == "triton"


def test_no_c_compiler(monkeypatch):
    """Triton builds a launcher in C for each kernel."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda _: None)
    dispatch._compiler_obstacle.cache_clear()
    try:
        assert "C compiler" in dispatch.device_obstacle(torch.device("xpu"))
    finally:
        dispatch._compiler_obstacle.cache_clear()


def test_a_logit_of_minus_infinity_follows_the_formula():
    """Of a class that nobody picks, in all forms that say so."""
    for classes in (2, 4):
        logits, features = networks(classes)
        with torch.no_grad():
            for z in logits:
                z[:, -1, 2] = float("-inf")
                z[:, 0, 2] = 3.0
        ours = rplib.functional.reliable_mutual_loss(logits, features, impl="triton", check_finite=True)
        far = [z.detach().clone() for z in logits]
        for z in far:
            z[z == float("-inf")] = -1e4  # the same probabilities
        truth = rplib.functional.reliable_mutual_loss([z.double() for z in far], [f.double() for f in features], impl="naive")
        assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
        ours.backward()
        assert all(torch.isfinite(z.grad).all() for z in logits)
