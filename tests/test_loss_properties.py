"""Properties that hold for any input (hypothesis). HYPOTHESIS_PROFILE=thorough looks at many more examples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import ANY_K_IMPLS, DEVICE, FAST_IMPLS, IMPLS, LAYOUTS, networks
from truth import compare, evaluate, leaves, truth

import rplib

EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)


@st.composite
def problems(draw, *, min_batch=1, min_voxels=1):
    """Logits and features of two networks of any small shape; smooth enough that argmax ties do not occur by chance."""
    axes = draw(st.integers(1, 3))
    spatial = [draw(st.integers(1, (150, 13, 6)[axes - 1])) for _ in range(axes)]
    spatial[0] = max(spatial[0], min_voxels)
    return networks(
        spatial,
        draw(st.integers(2, 5)),
        [draw(st.integers(1, 9)), draw(st.integers(1, 9))],
        batch=draw(st.integers(min_batch, min_batch + 1)),
        scale=draw(st.sampled_from([0.3, 2.0, 6.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def options():
    return st.fixed_dictionaries(
        {
            "confidence": st.sampled_from(["entropy", "max_probability", None]),
            "weighting": st.sampled_from(["similarity", None]),
            "cross_entropy_on": st.sampled_from(["logits", "probabilities"]),
        }
    )


def factors(largest):
    """Of either sign, zero included, but none so small that products with it leave float32's range."""
    size = st.floats(1e-4, largest)
    return st.one_of(st.just(0.0), size, size.map(lambda x: -x))


def seeds():
    return st.integers(0, 2**31)


def permutation(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def masks(impl, logits, features, **keywords):
    return [m.mask for m in rplib.reliability(logits, features, impl=impl, **keywords)]


def assert_close(a, b, tolerance=5e-6):
    """Relative to the larger norm."""
    a, b = a.double(), b.double()
    assert (a - b).norm() <= tolerance * max(a.norm(), b.norm()), f"{a.norm():.9g} against {b.norm():.9g}"


def scale_of(logits, features, **keywords):
    """Sum of the absolute terms of the loss: what rounding is relative to, since weights may have both signs."""
    return truth(logits, features, **keywords).magnitude.item()


@EVERY_IMPL
@given(problem=problems(), keywords=options(), upstream=factors(1e3))
def test_agrees_with_the_formula_for_any_shape_option_and_upstream_factor(impl, problem, keywords, upstream):
    rule = "everywhere" if impl == "naive" else "near_ties"
    tolerance = 5e-6 if impl == "naive" else 1e-6
    result = compare(impl, *problem, upstream=upstream, masks_rule=rule, **keywords)
    result.check(tolerance)
    result.check_maps(2 * tolerance)


@EVERY_IMPL
@given(problem=problems(), keywords=options(), seed=seeds())
def test_class_permutation(impl, problem, keywords, seed):
    """Renaming the classes renames the gradient's channels and changes nothing else (near-ties of the masks aside)."""
    logits, features = problem
    order = permutation(logits[0].shape[1], seed)
    renamed = [z[:, order] for z in logits]
    a, b = (
        compare(impl, logits, features, masks_rule="everywhere", **keywords),
        compare(impl, renamed, features, masks_rule="everywhere", **keywords),
    )
    ties = [pair.near_tie for pair in a.truth.pairs]
    assert all(not ((m.mask != n.mask) & ~tie).any() for m, n, tie in zip(a.maps, b.maps, ties, strict=True)) or impl == "naive"
    if any(not torch.equal(m.mask, n.mask) for m, n in zip(a.maps, b.maps, strict=True)):
        return
    assert abs(a.loss.item() - b.loss.item()) <= 5e-6 * a.truth.magnitude.item()
    for g, h in zip(a.gradients, b.gradients, strict=True):
        assert_close(g[:, order], h)


@EVERY_IMPL
@given(problem=problems(), keywords=options(), seed=seeds())
def test_voxel_permutation(impl, problem, keywords, seed):
    logits, features = problem
    order = permutation(logits[0][0, 0].numel(), seed)

    def shuffled(x):
        return x.flatten(2)[:, :, order].view(x.shape)

    moved = [shuffled(z) for z in logits], [shuffled(f) for f in features]
    loss, gradients = evaluate(impl, logits, features, **keywords)
    moved_loss, moved_gradients = evaluate(impl, *moved, **keywords)
    assert abs(loss.item() - moved_loss.item()) <= 5e-6 * scale_of(logits, features, **keywords)
    for g, h in zip(gradients, moved_gradients, strict=True):
        assert_close(shuffled(g), h)
    before = masks(impl, logits, features, **keywords)
    after = masks(impl, *moved, **keywords)
    assert all(torch.equal(a.flatten(1)[:, order], b.flatten(1)) for a, b in zip(before, after, strict=True))


@EVERY_IMPL
@given(problem=problems(min_batch=2, min_voxels=5), keywords=options())
def test_a_batch_is_its_samples(impl, problem, keywords):
    """Maps of a batch = maps of its samples; each pair's loss = sum(n_s L_s) / sum(n_s) up to eps."""
    logits, features = problem
    samples = [([z[s : s + 1] for z in logits], [f[s : s + 1] for f in features]) for s in range(len(logits[0]))]
    whole = rplib.reliability(logits, features, impl=impl, **keywords)
    for s, sample in enumerate(samples):
        for ours, alone in zip(whole, rplib.reliability(*sample, impl=impl, **keywords), strict=True):
            assert torch.equal(ours.mask[s], alone.mask[0])
            assert torch.equal(ours.pseudo_label[s], alone.pseudo_label[0])
            for name in ("weight", "prototypes", "similarity"):
                if getattr(ours, name) is not None:
                    torch.testing.assert_close(getattr(ours, name)[s], getattr(alone, name)[0], rtol=0, atol=5e-6)

    # The public loss sums both pairs. Without a comparison their counts are equal; else one network teaches everywhere.
    if keywords["confidence"] is not None:
        logits = [logits[0] * 0.01, logits[1].sign() * (logits[1].abs() + 1)]
        samples = [([z[s : s + 1] for z in logits], f) for s, (_, f) in enumerate(samples)]
    pair_counts = [[int(pair.mask.sum()) for pair in truth(*sample, **keywords).pairs] for sample in samples]
    if any(count[0] != count[-1] and 0 not in count for count in pair_counts):
        return  # a voxel whose larger logits still lie closer together: the sum is not one pair's
    counts = [max(count) for count in pair_counts]
    losses = [evaluate(impl, *sample, **keywords)[0].item() for sample in samples]
    expected = sum(n * value for n, value in zip(counts, losses, strict=True)) / max(sum(counts), 1)
    loss, _ = evaluate(impl, logits, features, **keywords)
    assert abs(expected - loss.item()) <= 1e-5 * scale_of(logits, features, **keywords)


@EVERY_IMPL
@given(problem=problems(), factor=st.floats(1e-3, 1e3))
def test_feature_scaling_by_a_positive_number(impl, problem, factor):
    """Cosines do not see the length (the prototype's eps does: up to eps / count, which is below the tolerance)."""
    logits, features = problem
    loss, gradients = evaluate(impl, logits, features)
    scaled_loss, scaled_gradients = evaluate(impl, logits, [f * factor for f in features])
    assert abs(loss.item() - scaled_loss.item()) <= 5e-6 * scale_of(logits, features)
    for g, h in zip(gradients, scaled_gradients, strict=True):
        assert_close(g, h)


@EVERY_IMPL
@given(problem=problems(), keywords=options())
def test_swapping_the_networks(impl, problem, keywords):
    logits, features = problem
    loss, gradients = evaluate(impl, logits, features, **keywords)
    swapped_loss, swapped_gradients = evaluate(impl, logits[::-1], features[::-1], **keywords)
    assert abs(loss.item() - swapped_loss.item()) <= 2e-6 * scale_of(logits, features, **keywords)
    for g, h in zip(gradients, reversed(swapped_gradients), strict=True):
        assert_close(g, h, 2e-6)
    first, second = rplib.reliability(logits, features, impl=impl, **keywords)
    other_first, other_second = rplib.reliability(logits[::-1], features[::-1], impl=impl, **keywords)
    assert torch.equal(first.mask, other_second.mask) and torch.equal(second.mask, other_first.mask)


@pytest.mark.parametrize("impl", ANY_K_IMPLS)
@given(seed=seeds(), keywords=options())
def test_permuting_three_networks(impl, seed, keywords):
    logits, features = networks((4, 5), 3, [2, 4, 6], count=3, seed=seed)
    order = permutation(3, seed).tolist()
    loss, gradients = evaluate(impl, logits, features, **keywords)
    other_loss, other_gradients = evaluate(impl, [logits[k] for k in order], [features[k] for k in order], **keywords)
    assert abs(loss.item() - other_loss.item()) <= 2e-6 * scale_of(logits, features, **keywords)
    for k, g in zip(order, other_gradients, strict=True):
        assert_close(gradients[k], g, 2e-6)


@EVERY_IMPL
@given(problem=problems(), confidence=st.sampled_from(["entropy", "max_probability"]))
def test_identical_networks(impl, problem, confidence):
    logits, features = problem
    loss, gradients = evaluate(impl, [logits[0], logits[0].clone()], [features[0], features[0].clone()], confidence=confidence)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients)
    assert not any(m.any() for m in masks(impl, [logits[0]] * 2, [features[0]] * 2, confidence=confidence))


@EVERY_IMPL
@given(problem=problems(), upstream=factors(1e5), keywords=options())
def test_upstream_factor_is_linear(impl, problem, upstream, keywords):
    """d(u L) = u dL for any u of either sign, in place of the factor 1 that training scripts have."""
    if impl == "naive":  # autograd of the softmax cancels where a network is certain: in float32 more than 1e-6 is rounding
        problem = tuple([t.double() for t in tensors] for tensors in problem)
    _, gradients = evaluate(impl, *problem, **keywords)
    _, scaled = evaluate(impl, *problem, upstream=upstream, **keywords)
    for g, h in zip(gradients, scaled, strict=True):
        assert_close(g * upstream, h, 1e-6)


@EVERY_IMPL
@given(problem=problems(), a=factors(3), b=factors(3))
def test_two_losses_on_shared_logits_add_their_gradients(impl, problem, a, b):
    """Loss times factor plus another loss of the same logits, and the loss inside a non-linear function."""
    logits, features = problem
    plain, gradients = evaluate(impl, logits, features)
    _, uniform = evaluate(impl, logits, features, confidence=None, weighting=None)
    z = leaves(logits)
    first = rplib.functional.reliable_mutual_loss(z, features, impl=impl)
    second = rplib.functional.reliable_mutual_loss(z, features, impl=impl, confidence=None, weighting=None)
    (a * first + b * second + first * second + z[0].square().sum()).backward()
    for k in range(2):
        expected = (a + second.item()) * gradients[k].double() + (b + plain.item()) * uniform[k].double()
        if k == 0:
            expected = expected + 2 * logits[0].double()
        error = (z[k].grad.double() - expected).norm()
        parts = (abs(a) + second.item()) * gradients[k].norm() + (abs(b) + abs(plain.item())) * uniform[k].norm()
        assert error <= 5e-6 * (parts + 2 * logits[0].norm())


@EVERY_IMPL
@given(problem=problems(), data=st.data())
def test_random_strides(impl, problem, data):
    """Any memory layout of each of the four tensors gives the result of the contiguous ones."""
    names = st.sampled_from(sorted(LAYOUTS.keys() - {"expanded_voxels", "expanded_batch"}))
    logits, features = problem
    laid = [LAYOUTS[data.draw(names)](t) for t in (*logits, *features)]
    loss, gradients = evaluate(impl, logits, features)
    laid_loss, laid_gradients = evaluate(impl, laid[:2], laid[2:])
    assert abs(loss.item() - laid_loss.item()) <= 2e-6 * scale_of(logits, features)
    for g, h in zip(gradients, laid_gradients, strict=True):
        assert_close(g, h, 2e-6)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@given(problem=problems(), axes=seeds())
def test_random_axis_orders_in_memory(impl, problem, axes):
    """Every order of the axes in memory, with gaps between elements: strides that no memory format has."""
    logits, features = problem

    def laid(x, seed):
        order = permutation(x.dim(), seed).tolist()
        inverse = [order.index(k) for k in range(x.dim())]
        gap = torch.empty([*(x.shape[k] for k in order), 2], dtype=x.dtype, device=x.device)[..., 1]
        gap.copy_(x.permute(order))
        return gap.permute(inverse)

    # A few voxels of one feature: over 2,500 problems rounding reached 1.3e-6 in the loss and 5e-6 in a gradient; in the naive
    # form, of the worst of them, 1.4e-5. A wrong stride gives other voxels altogether.
    result = compare(impl, [laid(z, axes + k) for k, z in enumerate(logits)], [laid(f, axes - k) for k, f in enumerate(features)])
    result.check(1e-5)
