"""Options beyond the paper's: minimum confidence, temperature, class weights, prototypes of the batch, reductions, mutual_on."""

import pytest
import torch
from loss_cases import ANY_K_IMPLS, DEVICE, IMPLS, LAYOUTS, TRITON, networks
from truth import confidence_score, cross_entropy, leaves, truth

import rplib
from rplib import dispatch

PLAIN_IMPL = pytest.mark.parametrize("impl", ANY_K_IMPLS)
EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)
KEYWORDS = {
    "minimum_confidence": {"minimum_confidence": 0.7},
    "temperature": {"temperature": 0.4},
    "class_weights": {"class_weights": (0.0, 1.0, 2.5)},
    "prototypes": {"prototypes": "batch"},
    "sum": {"reduction": "sum"},
    "all": {
        "minimum_confidence": 0.5, "temperature": 3.0, "class_weights": (0.3, 1.0, 0.7), "prototypes": "batch",
        "reduction": "sum", "students": (1, 2), "cross_entropy_on": "probabilities",
    },
}  # fmt: skip


def by_hand(
    logits, features, confidence="entropy", minimum_confidence=0.0, temperature=1.0, class_weights=(1.0, 1.0, 1.0),
    prototypes="sample", reduction="mean", students=None, cross_entropy_on="logits", weighting="similarity",
):  # fmt: skip
    """(pairs, B, V) of m, w and CE, and the loss, from the formulas in float64, differentiable in CE alone."""
    z, f = [t.flatten(2) for t in logits], [t.flatten(2) for t in features]
    plain = [t.detach() for t in z]
    masks, weights, costs, total = [], [], [], 0
    for i in range(len(z)):
        for j in range(len(z)):
            if i == j or (students is not None and i not in students):
                continue
            m = torch.ones_like(plain[i][:, 0], dtype=torch.bool)
            if confidence:
                m = confidence_score(plain[i], confidence, 1e-6) > confidence_score(plain[j], confidence, 1e-6)
            m = m & (plain[j].softmax(1).amax(1) >= minimum_confidence)
            y = plain[j].argmax(1)
            r = torch.ones_like(plain[j][:, 0])
            if weighting:
                hot = torch.nn.functional.one_hot(y, 3).movedim(-1, 1).double()
                sums, number = torch.einsum("bcv,bfv->bcf", hot, f[j]), hot.sum(2)[..., None]
                if prototypes == "batch":
                    sums, number = sums.sum(0, keepdim=True).expand_as(sums), number.sum(0, keepdim=True)
                mu = torch.nn.functional.normalize(sums / (number + 1e-6), dim=2)
                s = torch.nn.functional.cosine_similarity(mu[..., None], f[j][:, None], dim=2)
                r = 1 - (s - (plain[j] / temperature).softmax(1)).square().mean(1)
            w = m * r * torch.tensor(class_weights, dtype=torch.float64, device=y.device)[y]
            ce = cross_entropy(z[i], y, cross_entropy_on)
            total = total + (w * ce).sum() / (m.sum().double() + 1e-6 if reduction == "mean" else 1)
            masks.append(m), weights.append(w), costs.append(w * ce)
    return torch.stack(masks), torch.stack(weights), torch.stack(costs), total


def problem(count=2):
    return networks((7, 5), 3, 6, batch=3, count=count, dtype=torch.float64, seed=1)


# What the kernels take of them; the others are for the lean form.
IN_KERNELS = {
    **{name: KEYWORDS[name] for name in ("minimum_confidence", "temperature", "class_weights", "sum")},
    "student a": {"students": (0,)},
    "all": {
        "minimum_confidence": 0.5, "temperature": 3.0, "class_weights": (0.3, 1.0, 0.7), "reduction": "sum", "students": (1,),
        "cross_entropy_on": "probabilities",
    },
}  # fmt: skip


@pytest.mark.slow_cases("triton-*-spatial2", "triton-*-spatial3")
@pytest.mark.parametrize(
    ("weighting", "confidence", "layout", "dtype", "spatial"),
    [
        ("similarity", "entropy", None, torch.float32, (7, 5)),
        ("similarity", None, "channels_last", torch.bfloat16, (7, 1, 3)),
        (None, "entropy", "spatial_slice", torch.float16, (67,)),
        ("similarity", "max_probability", None, torch.float32, (1,)),
    ],
)
@pytest.mark.parametrize("keywords", IN_KERNELS.values(), ids=IN_KERNELS.keys())
@pytest.mark.parametrize("impl", [TRITON])
def test_loss_gradient_and_maps_inside_the_kernels(impl, keywords, weighting, confidence, layout, dtype, spatial):
    """With weights of the samples too."""
    logits, features = networks(spatial, 3, 6, batch=3, dtype=dtype, seed=1)
    laid = [[t if layout is None else LAYOUTS[layout](t) for t in ts] for ts in (logits, features)]
    sample_weights = [0.5, 0.0, 2.0]
    options = {**keywords, "confidence": confidence, "weighting": weighting}
    z = leaves(laid[0])
    loss = rplib.functional.reliable_mutual_loss(z, laid[1], sample_weights=sample_weights, impl=impl, **options)
    loss.backward()
    factor = torch.tensor(sample_weights, dtype=torch.float64, device=DEVICE)[None, :, None]
    exact = leaves([t.double() for t in logits])
    masks, weights, costs, _ = by_hand(exact, [f.double() for f in features], **options)
    numbers = masks.sum((1, 2)) + 1e-6 if keywords.get("reduction") != "sum" else torch.ones(len(masks), device=DEVICE)
    total = ((factor * costs).sum((1, 2)) / numbers).sum()
    assert abs(loss.item() - total.item()) <= 3e-6 * max(abs(total.item()), 0.1)
    tolerance = {torch.float32: 3e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for t, g in zip(z, torch.autograd.grad(total, exact, allow_unused=True), strict=True):
        if g is None or not t.requires_grad:
            assert t.grad is None
        else:
            assert (t.grad.double() - g).norm() <= tolerance * max(g.norm().item(), 1e-3)
    maps = rplib.reliability(*laid, sample_weights=sample_weights, impl=impl, **options)
    for m, mask, weight in zip(maps, masks, weights * factor, strict=True):
        assert torch.equal(m.mask.flatten(1), mask)
        torch.testing.assert_close(m.weight.flatten(1).double(), weight, rtol=0, atol=5e-6)


def test_the_formula_by_hand_is_the_truth_by_default():
    logits, features = problem()
    torch.testing.assert_close(by_hand(logits, features)[3], truth(logits, features).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", ["similarity", None])
@pytest.mark.parametrize("confidence", ["entropy", None])
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS.keys())
@PLAIN_IMPL
def test_loss_gradient_and_maps(impl, keywords, confidence, weighting):
    logits, features = problem(3)
    options = {**keywords, "confidence": confidence, "weighting": weighting}
    z, exact = leaves(logits), leaves(logits)
    loss = rplib.functional.reliable_mutual_loss(z, features, impl=impl, **options)
    masks, weights, _, total = by_hand(exact, features, **options)
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=1e-12, atol=1e-14)
    loss.backward()
    for t, g in zip(z, torch.autograd.grad(total, exact, allow_unused=True), strict=True):
        if g is None:
            assert t.grad is None
        else:
            assert (t.grad - g).norm() <= 1e-12 * g.norm()
    for m, mask, weight in zip(rplib.reliability(logits, features, impl=impl, **options), masks, weights, strict=True):
        assert torch.equal(m.mask.flatten(1), mask)
        torch.testing.assert_close(m.weight.flatten(1), weight, rtol=0, atol=1e-12)
    default = by_hand(logits, features, confidence=confidence, weighting=weighting)[3]
    if weighting or not {"temperature", "prototypes"} >= set(keywords):
        assert abs(total.item() - default.item()) > 1e-4, "the option changes nothing here"


@pytest.mark.parametrize("cross_entropy_on", ["logits", "probabilities"])
@PLAIN_IMPL
def test_nothing_summed(impl, cross_entropy_on):
    logits, features = problem()
    z, exact = leaves(logits), leaves(logits)
    mask = torch.rand(3, 7, 5, device=DEVICE) < 2
    costs = rplib.functional.reliable_mutual_loss(
        z, features, mask, impl=impl, reduction="none", cross_entropy_on=cross_entropy_on
    )
    _, _, expected, _ = by_hand(exact, features, cross_entropy_on=cross_entropy_on)
    assert costs.shape == (2, 3, 7, 5)
    torch.testing.assert_close(costs.flatten(2), expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(costs)
    (costs * upstream).sum().backward()
    for t, g in zip(z, torch.autograd.grad((expected * upstream.flatten(2)).sum(), exact), strict=True):
        assert (t.grad - g).norm() <= 1e-12 * g.norm()
    summed = rplib.functional.reliable_mutual_loss(
        logits, features, impl=impl, reduction="sum", cross_entropy_on=cross_entropy_on
    )
    torch.testing.assert_close(costs.sum().detach(), summed, rtol=1e-12, atol=0)
    half = [t.to(torch.bfloat16) for t in logits], [f.to(torch.bfloat16) for f in features]
    assert rplib.functional.reliable_mutual_loss(*half, impl=impl, reduction="none").dtype == torch.float32


@PLAIN_IMPL
def test_nothing_summed_is_zero_under_a_mask_and_shows_a_nan(impl):
    logits, features = problem()
    mask = torch.rand(3, 7, 5, device=DEVICE) < 0.5
    logits[0] = torch.where(mask[:, None], logits[0], float("nan"))
    z = leaves(logits)
    costs = rplib.functional.reliable_mutual_loss(z, features, mask, impl=impl, reduction="none")
    assert costs.isfinite().all() and (costs[:, ~mask] == 0).all()
    costs.sum().backward()
    assert all((t.grad.movedim(1, -1)[~mask] == 0).all() for t in z)
    assert costs.requires_grad
    assert not rplib.functional.reliable_mutual_loss(logits, features, impl=impl, reduction="none").isfinite().all()


@EVERY_IMPL
def test_mutual_term_of_the_unlabelled_samples_alone(impl):
    double = impl != "triton"
    logits, features = problem()
    logits, features = [[t if double else t.float() for t in ts] for ts in (logits, features)]
    tolerance = 1e-12 if double else 3e-6
    target = torch.randint(0, 3, (1, 7, 5), device=DEVICE)
    z = leaves(logits)
    objective = rplib.MutualObjective(impl=impl, mutual_on="unlabelled", statistics=True)
    terms = objective(z, features, target, 0.3, labelled=[1])
    rest = [0, 2]
    exact = truth([t[rest] for t in logits], [f[rest] for f in features])
    torch.testing.assert_close(terms.mutual.double(), exact.loss, rtol=tolerance, atol=0)
    (terms.total - 0.5 * rplib.MutualObjective(impl=impl)(z, features, target, 0.0, labelled=[1]).total / 0.5).backward()
    for t, g in zip(z, exact.gradients, strict=True):
        assert (t.grad[rest] - 0.3 * g).norm() <= tolerance * g.norm()
        assert t.grad[1].abs().max() <= (1e-15 if double else 1e-8)
    everything = objective(logits, features, target.expand(3, 7, 5), 0.3)
    assert everything.mutual == 0 and everything.statistics.taught.sum() == 0


def test_values_that_do_not_fit():
    for keyword, value in (
        ("minimum_confidence", 1.5),
        ("minimum_confidence", "high"),
        ("temperature", 0),
        ("temperature", True),
        ("class_weights", [1.0, 2.0]),
        ("class_weights", (1.0, -1.0)),
        ("class_weights", ()),
        ("prototypes", "epoch"),
        ("reduction", "max"),
    ):
        with pytest.raises(ValueError, match=keyword):
            rplib.ReliableMutualLoss(**{keyword: value})
    for keyword, value in (("mutual_on", "labelled"), ("reduction", "none")):
        with pytest.raises(ValueError, match=keyword):
            rplib.MutualObjective(**{keyword: value})
    logits, features = problem()
    with pytest.raises(ValueError, match=r"class_weights has 2 numbers.*3 classes"):
        rplib.ReliableMutualLoss(class_weights=(1.0, 2.0))(logits, features)


@pytest.mark.parametrize("keywords", [{"prototypes": "batch"}, {"reduction": "none"}], ids=lambda k: next(iter(k)))
@pytest.mark.parametrize("impl", [TRITON])
def test_what_triton_cannot_do_is_refused_by_name(impl, keywords):
    (option,) = keywords
    assert option in dispatch.BEYOND_KERNELS
    logits, features = networks((7, 5), 3, 6)
    with pytest.raises(ValueError, match=rf"(?s)triton.*{option}.*torch"):
        rplib.ReliableMutualLoss(impl=impl, **keywords)(logits, features)
