"""`mask=`: the problem without the masked voxels, whatever lies there, in loss, objective, maps and gradients."""

import pytest
import torch
from loss_cases import DEVICE, FAST_IMPLS, IMPLS, TRITON, networks
from test_loss_objective import expected
from truth import evaluate, leaves, own_masks, truth

import rplib
from rplib import lean_voxels

BOX = (slice(None), slice(None), slice(1, 4), slice(0, 5), slice(2, 6))  # of (B, C, 5, 6, 7)
OPTIONS = [
    {},
    {"confidence": "max_probability", "cross_entropy_on": "probabilities"},
    {"confidence": None},
    {"weighting": None},
    {"confidence": None, "weighting": None},
]
EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)
INSIDE = BOX[:1] + BOX[2:]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")


def box_mask(batch: int) -> torch.Tensor:
    mask = torch.zeros(batch, 5, 6, 7, dtype=torch.bool, device=DEVICE)
    mask[BOX[:1] + BOX[2:]] = True
    return mask


def spoiled(tensors, mask):
    """The same values inside the mask, and NaN at every masked voxel."""
    return [torch.where(mask[:, None], t, torch.full_like(t, float("nan"))) for t in tensors]


def cropped(tensors):
    return [t[BOX].contiguous() for t in tensors]


def precision(impl):
    """Of the inputs, and of the results."""
    return (torch.float32, 2e-6) if impl == "triton" else (torch.float64, 1e-12)


@pytest.mark.slow_cases("triton-2-4-*", "triton-2-5-max_probability-probabilities")
@EVERY_OPTION
@pytest.mark.parametrize(("count", "classes"), [(2, 2), (2, 4), (3, 3), (2, 5)])
@EVERY_IMPL
def test_loss_gradient_and_maps_are_those_of_the_cropped_problem(impl, count, classes, options):
    if impl == "triton" and count != 2:
        pytest.skip("the kernels take two networks")
    dtype, tolerance = precision(impl)
    logits, features = networks((5, 6, 7), classes, [6, 3, 5][:count], count=count, batch=3, dtype=dtype)
    mask = box_mask(3)
    z, f = spoiled(logits, mask), spoiled(features, mask)
    maps = rplib.reliability(z, f, mask=mask, impl=impl, **options)
    near_ties = {pair: m[INSIDE] for pair, m in own_masks(maps).items()} if impl == "triton" else None
    exact = truth(cropped(logits), cropped(features), masks=near_ties, **options)
    ours = leaves(z)
    loss = rplib.functional.reliable_mutual_loss(ours, f, mask=mask, impl=impl, **options)
    loss.backward()
    assert abs(loss.item() - exact.loss.item()) <= tolerance * exact.magnitude.item()
    for t, expected_gradient in zip(ours, exact.gradients, strict=True):
        assert (t.grad[BOX].double() - expected_gradient).norm() <= tolerance * expected_gradient.norm()
        assert (t.grad[~mask[:, None].expand_as(t)] == 0).all()
    for m, pair in zip(maps, exact.pairs, strict=True):
        assert torch.equal(m.mask[INSIDE], pair.mask) and torch.equal(m.pseudo_label[INSIDE], pair.pseudo_label)
        torch.testing.assert_close(m.weight[INSIDE].double(), pair.weight, rtol=0, atol=tolerance)
        assert not m.mask[~mask].any() and not m.weight[~mask].any()
        if pair.prototypes is not None:
            torch.testing.assert_close(m.prototypes.double(), pair.prototypes, rtol=0, atol=tolerance)
            torch.testing.assert_close(m.similarity[BOX].double(), pair.similarity, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("impl", "piece", "classes"),
    [
        ("torch", 7, 3),
        ("torch", 1 << 16, 3),
        pytest.param("triton", None, 3, marks=TRITON.marks),
        pytest.param("triton", None, 18, marks=TRITON.marks),
    ],
)
def test_scattered_voxels_in_low_precision_and_in_pieces(dtype, impl, piece, classes, monkeypatch):
    """One sample, so that the voxels left over are again a problem; pieces of a few voxels, as of a large volume."""
    if piece:
        monkeypatch.setattr(lean_voxels, "_PIECE_CPU", piece)
    logits, features = networks((101,), classes, 5, batch=1, dtype=dtype)
    mask = torch.rand(1, 101, device=DEVICE) < 0.6
    keep = mask[0]
    z = leaves(spoiled(logits, mask))
    loss = rplib.functional.reliable_mutual_loss(z, spoiled(features, mask), mask, impl=impl)
    loss.backward()
    left = [t[..., keep] for t in logits], [f[..., keep] for f in features]
    maps = rplib.reliability(*left, impl=impl)
    exact = truth(*left, masks=own_masks(maps))
    assert abs(loss.item() - exact.loss.item()) <= 2e-6 * exact.magnitude.item()
    for t, g in zip(z, exact.gradients, strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 2.0**-8
        assert (t.grad[..., keep].double() - g).norm() <= tolerance * g.norm()
        assert (t.grad[..., ~keep] == 0).all()


@EVERY_IMPL
def test_a_mask_of_everything_is_no_mask(impl):
    logits, features = networks((5, 6, 7), 3, 6)
    mask = torch.ones(2, 5, 6, 7, dtype=torch.bool, device=DEVICE)
    loss, gradients = evaluate(impl, logits, features)
    z = leaves(logits)
    masked = rplib.ReliableMutualLoss(impl=impl)(z, features, mask[:, None])
    masked.backward()
    assert torch.equal(loss, masked.detach()) and all(torch.equal(t.grad, g) for t, g in zip(z, gradients, strict=True))


@EVERY_IMPL
def test_a_mask_of_nothing_is_zero_and_connected(impl):
    logits, features = networks((5, 4), 3, 6)
    target = torch.randint(0, 3, (1, 5, 4), device=DEVICE)
    z = leaves(logits)
    mask = torch.zeros(2, 5, 4, dtype=torch.bool, device=DEVICE)
    for supervised in ("dice", "cross_entropy"):
        objective = rplib.MutualObjective(impl=impl, supervised=supervised)
        total, dice, mutual = objective(z, spoiled(features, mask), target, 1.0, mask=mask)
        assert total.item() == dice.item() == mutual.item() == 0
        total.backward()
    assert all((t.grad == 0).all() for t in z)


@pytest.mark.parametrize(("classes", "supervised"), [(2, "dice"), (4, "dice"), (4, "cross_entropy"), (3, "dice+cross_entropy")])
@EVERY_IMPL
def test_objective_is_that_of_the_cropped_problem(impl, classes, supervised):
    """Labels at masked voxels are ignored: 255 is allowed there."""
    dtype, tolerance = precision(impl)
    logits, features = networks((5, 6, 7), classes, 6, batch=3, dtype=dtype)
    target = torch.randint(0, classes, (2, 5, 6, 7), device=DEVICE)
    mask = box_mask(3)
    objective = rplib.MutualObjective(impl=impl, supervised=supervised, statistics=True)
    z, small = leaves(spoiled(logits, mask)), leaves(cropped(logits))
    terms = objective(z, spoiled(features, mask), torch.where(mask[:2], target, 255), 0.3, mask=mask)
    same = objective(small, cropped(features), target[INSIDE], 0.3)
    for ours, theirs in zip(terms[:3], same[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    for ours, theirs in zip(terms.statistics, same.statistics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    terms.total.backward()
    same.total.backward()
    for t, u in zip(z, small, strict=True):
        assert (t.grad[BOX] - u.grad).norm() <= tolerance * u.grad.norm()
        assert (t.grad[~mask[:, None].expand_as(t)] == 0).all()
    if supervised == "dice":
        total = expected(cropped(logits), cropped(features), target[INSIDE], 0.3, range(1, classes))[0]
        torch.testing.assert_close(terms.total.detach().double(), total, rtol=tolerance, atol=0)


@pytest.mark.parametrize("impl", [pytest.param("naive", marks=pytest.mark.slow), *FAST_IMPLS])
def test_compiled_together(impl):
    torch._dynamo.reset()
    logits, features = networks((5, 6, 7), 3, 6)
    mask = box_mask(2)
    exact = truth(cropped(logits), cropped(features))
    z = leaves(spoiled(logits, mask))
    loss = torch.compile(rplib.ReliableMutualLoss(impl=impl), fullgraph=True, backend="aot_eager")(
        z, spoiled(features, mask), mask
    )
    loss.backward()
    assert abs(loss.item() - exact.loss.item()) <= 5e-6 * exact.magnitude.item()
    for t, g in zip(z, exact.gradients, strict=True):
        assert (t.grad[BOX].double() - g).norm() <= 5e-6 * g.norm()


def test_check_finite_looks_at_valid_voxels_alone():
    logits, features = networks((5, 6, 7), 3, 6)
    mask = box_mask(2)
    loss_fn = rplib.ReliableMutualLoss(check_finite=True)
    assert loss_fn(spoiled(logits, mask), spoiled(features, mask), mask).isfinite()
    logits[1][0, 1, 2, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"logits\[1\].*\b1\b"):
        loss_fn(spoiled(logits, mask), features, mask)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(2, 5, 4), TypeError, r"mask.*float32.*bool"),
        (torch.ones(2, 5, 4, dtype=torch.uint8), TypeError, r"mask.*uint8.*mask > 0"),
        (torch.ones(2, 5, 3, dtype=torch.bool), ValueError, r"mask.*\(2, 5, 3\).*\(2, 3, 5, 4\).*\(2, 5, 4\)"),
        (torch.ones(1, 5, 4, dtype=torch.bool), ValueError, r"mask.*\(1, 5, 4\)"),
        (torch.ones(2, 5, 4, dtype=torch.bool, device="meta"), ValueError, r"mask.*meta"),
        ([[True]], TypeError, r"mask.*list"),
    ],
)
def test_mistakes(mask, error, text):
    logits, features = networks((5, 4), 3, 6)
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) and mask.device.type != "meta" else mask
    target = torch.zeros(1, 5, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(error, match=text):
        rplib.functional.reliable_mutual_loss(logits, features, mask=mask)
    with pytest.raises(error, match=text):
        rplib.reliability(logits, features, mask=mask)
    with pytest.raises(error, match=text):
        rplib.MutualObjective()(logits, features, target, 0.1, mask=mask)
