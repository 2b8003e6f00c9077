"""`MutualObjective`: Dice over the labelled samples plus the weighted mutual loss, against the formula in float64."""

import math

import pytest
import torch
from loss_cases import ANY_K_IMPLS, DEVICE, IMPLS, LAYOUTS, networks
from truth import evaluate, leaves, truth

import rplib

EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)


def true_dice(z: torch.Tensor, target: torch.Tensor, classes) -> torch.Tensor:
    """Mean over ``classes`` of 1 - (2 sum p g + 1e-8) / (sum p + sum g + 1e-8), over all labelled samples together."""
    p = z[: len(target)].double().softmax(1)
    terms = []
    for c in classes:
        g = (target == c).double()
        terms.append(1 - (2 * (p[:, c] * g).sum() + 1e-8) / (p[:, c].sum() + g.sum() + 1e-8))
    return torch.stack(terms).mean()


def expected(logits, features, target, weight, dice_classes, dice_weight=0.5, **keywords):
    z = leaves([t.double() for t in logits])
    dice = sum(true_dice(t, target, dice_classes) for t in z)
    gradients = torch.autograd.grad(dice_weight * dice, z)
    mutual = truth(logits, features, **keywords)
    total = dice_weight * dice.detach() + weight * mutual.loss
    return total, dice.detach(), mutual.loss, [g + weight * m for g, m in zip(gradients, mutual.gradients, strict=True)]


def run(objective, logits, features, target, weight):
    z = leaves(logits)
    result = objective(z, features, target, weight)
    assert not result.dice.requires_grad and not result.mutual.requires_grad
    assert result.total.shape == result.dice.shape == result.mutual.shape == ()
    result.total.backward()
    return result, [t.grad for t in z]


def assert_right(result, gradients, reference, tolerance=2e-6):
    *values, true_gradients = reference
    for ours, exact in zip(result, values, strict=True):
        assert abs(ours.item() - exact.item()) <= tolerance * max(abs(exact.item()), 0.1)
    for g, exact in zip(gradients, true_gradients, strict=True):
        assert (g.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.slow_cases("triton-14-None")
@pytest.mark.parametrize(("classes", "dice_classes"), [(2, None), (4, None), (4, (1,)), (4, (0, 3)), (14, None)])
@EVERY_IMPL
def test_values_and_gradients(impl, classes, dice_classes):
    logits, features = networks((7, 5, 6), classes, 6, batch=3)
    target = torch.randint(0, classes, (2, 7, 5, 6), device=DEVICE)
    objective = rplib.MutualObjective(dice_weight=0.7, dice_classes=dice_classes, impl=impl)
    result, gradients = run(objective, logits, features, target, 0.3)
    looked_at = dice_classes or range(1, classes)
    assert_right(result, gradients, expected(logits, features, target, 0.3, looked_at, 0.7))


@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_three_networks_in_float64(impl):
    logits, features = networks((7, 5), 3, 6, batch=3, count=3, dtype=torch.float64)
    target = torch.randint(0, 3, (1, 7, 5), device=DEVICE)
    result, gradients = run(rplib.MutualObjective(impl=impl), logits, features, target, 1.0)
    assert_right(result, gradients, expected(logits, features, target, 1.0, (1, 2)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("channel", [False, True])
@EVERY_IMPL
def test_target_of_any_kind(impl, channel, dtype):
    logits, features = networks((7, 5, 3), 2, 6, batch=2)
    target = torch.randint(0, 2, (1, 7, 5, 3), device=DEVICE)
    reference = expected(logits, features, target, 0.1, (1,))
    given = target.to(dtype)[:, None] if channel else target.to(dtype)
    assert_right(*run(rplib.MutualObjective(impl=impl), logits, features, given, 0.1), reference)


@pytest.mark.parametrize("layout", [LAYOUTS[name] for name in ("channels_last", "spatial_slice", "transposed", "batch_slice")])
@EVERY_IMPL
def test_memory_layouts(impl, layout):
    logits, features = networks((7, 5, 3), 3, 6, batch=2)
    target = torch.randint(0, 3, (2, 7, 5, 3), device=DEVICE)
    reference = expected(logits, features, target, 0.1, (1, 2))
    laid_target = torch.stack([target, 2 - target], -1)[..., 0].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    ours = run(rplib.MutualObjective(impl=impl), [layout(z) for z in logits], [layout(f) for f in features], laid_target, 0.1)
    assert_right(*ours, reference)


@EVERY_IMPL
def test_no_labelled_sample(impl):
    logits, features = networks((7, 5), 3, 6)
    target = torch.zeros(0, 7, 5, dtype=torch.int64, device=DEVICE)
    result, gradients = run(rplib.MutualObjective(impl=impl), logits, features, target, 0.5)
    loss, plain = evaluate(impl, logits, features)
    assert result.dice.item() == 0 and result.total.item() == pytest.approx(0.5 * loss.item(), rel=1e-6)
    for g, h in zip(gradients, plain, strict=True):
        torch.testing.assert_close(g, 0.5 * h, rtol=1e-6, atol=0)


@EVERY_IMPL
def test_class_absent_from_target_and_empty_target(impl):
    logits, features = networks((7, 5), 3, 6)
    target = torch.zeros(2, 7, 5, dtype=torch.int64, device=DEVICE)
    assert_right(
        *run(rplib.MutualObjective(impl=impl), logits, features, target, 0.1),
        expected(logits, features, target, 0.1, (1, 2)),
    )


@pytest.mark.parametrize("classes", [2, 3])
@EVERY_IMPL
def test_smoothing_where_prediction_and_target_are_empty(impl, classes):
    """The probabilities of each absent class add up to about 1e-8, so that the smoothing term of Dice is half of what counts."""
    logits, features = networks((7, 5), classes, 6)
    for z in logits:
        z[:, 1:] = z[:, 1:].clamp(-1, 1) - math.log(35e8)
        z[:, 0] = 0
    target = torch.zeros(1, 7, 5, dtype=torch.int64, device=DEVICE)
    reference = expected(logits, features, target, 0.1, range(1, classes), confidence=None)
    assert 0.3 < reference[1] / 2 < 0.7, "half of the way between empty and wrong"
    assert_right(*run(rplib.MutualObjective(impl=impl, confidence=None), logits, features, target, 0.1), reference, 1e-5)


@EVERY_IMPL
def test_consistency_weight_as_a_tensor(impl):
    logits, features = networks((7, 5), 3, 6)
    target = torch.randint(0, 3, (1, 7, 5), device=DEVICE)
    objective = rplib.MutualObjective(impl=impl)
    by_float = run(objective, logits, features, target, 0.25)
    by_tensor = run(objective, logits, features, target, torch.tensor(0.25, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(by_float[0], by_tensor[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(by_float[1], by_tensor[1], strict=True))


@EVERY_IMPL
def test_mutual_term_is_the_loss(impl):
    """With every keyword handed on."""
    logits, features = networks((7, 5), 3, 6)
    target = torch.randint(0, 3, (1, 7, 5), device=DEVICE)
    keywords = {"confidence": "max_probability", "cross_entropy_on": "probabilities", "eps": 1e-3}
    result = rplib.MutualObjective(impl=impl, **keywords)(logits, features, target, 0.0)
    assert result.mutual.item() == pytest.approx(evaluate(impl, logits, features, **keywords)[0].item(), rel=1e-6)
    assert rplib.MutualObjective(impl=impl, weighting=None)(logits, None, target, 0.1).total.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY_IMPL
def test_half_precision(impl, dtype):
    logits, features = networks((7, 5, 6), 3, 6, dtype=dtype)
    target = torch.randint(0, 3, (1, 7, 5, 6), device=DEVICE)
    result, gradients = run(rplib.MutualObjective(impl=impl), logits, features, target, 0.3)
    *values, exact = expected(logits, features, target, 0.3, (1, 2))
    for ours, value in zip(result, values, strict=True):
        assert ours.dtype == torch.float32 and abs(ours.item() - value.item()) <= 2e-6 * max(abs(value.item()), 0.1)
    for g, h in zip(gradients, exact, strict=True):
        assert g.dtype == dtype and (g.double() - h).norm() <= 2.0 ** -(10 if dtype == torch.float16 else 7) * h.norm()


@EVERY_IMPL
def test_upstream_factor(impl):
    logits, features = networks((7, 5), 3, 6)
    target = torch.randint(0, 3, (1, 7, 5), device=DEVICE)
    z = leaves(logits)
    (rplib.MutualObjective(impl=impl)(z, features, target, 0.3).total * -20.0).backward()
    for t, exact in zip(z, expected(logits, features, target, 0.3, (1, 2))[3], strict=True):
        assert (t.grad.double() + 20 * exact).norm() <= 2e-6 * (20 * exact).norm()


@EVERY_IMPL
def test_gradient_of_the_consistency_weight(impl):
    logits, features = networks((7, 5), 3, 6)
    target = torch.randint(0, 3, (1, 7, 5), device=DEVICE)
    weight = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    result = rplib.MutualObjective(impl=impl)(logits, features, target, weight)
    (2 * result.total).backward()
    torch.testing.assert_close(weight.grad, 2 * result.mutual)
