"""Each implementation against the float64 formula: dtypes, shapes, options, memory layouts, degenerate and bad inputs."""

from itertools import product

import pytest
import torch
from loss_cases import (
    ANY_K_IMPLS,
    DEVICE,
    FAST_IMPLS,
    IMPLS,
    LAYOUTS,
    TRITON,
    around,
    blocks,
    channels_last,
    expanded_channels,
    networks,
    transposed,
)
from truth import autograd_gradients, compare, evaluate, leaves, own_masks, truth, ulp

import rplib

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALF = [F16, BF16]
OPTIONS = [
    dict(zip(("confidence", "weighting", "cross_entropy_on"), values, strict=True))
    for values in product(("entropy", "max_probability", None), ("similarity", None), ("logits", "probabilities"))
]


def option_name(options):
    return "-".join(str(v) for v in options.values())


def check(impl, logits, features, **keywords):
    """Compare at the accuracy that the implementation owes in this dtype."""
    dtype = logits[0].dtype
    if impl == "naive" and dtype != F64:
        # Line by line in float32, it may err in the order of two almost certain networks: take its own mask everywhere.
        result = compare(impl, logits, features, masks_rule="everywhere", **keywords)
        tolerance = 5e-6
    else:
        result = compare(impl, logits, features, **keywords)
        tolerance = 1e-12 if dtype == F64 else 1e-6
    if dtype in HALF:
        assert result.loss_error <= tolerance
        for ours, exact in zip(result.gradients, result.truth_gradients, strict=True):
            assert ((ours.double() - exact).abs() <= 1.5 * ulp(exact, dtype)).all()
    else:
        result.check(tolerance)
    result.check_maps(max(10 * tolerance, 1e-12) if impl == "naive" else max(2 * tolerance, 1e-12))
    return result


# ------------------------------------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("count", [2, 3])
def test_closed_gradient_of_the_truth_is_its_autograd_gradient(count, options):
    logits, features = networks((5, 4), 4, 6, count=count, dtype=F64)
    ours = truth(logits, features, **options)
    for a, b in zip(ours.gradients, autograd_gradients(logits, ours.pairs, options["cross_entropy_on"]), strict=True):
        assert (a - b).norm() <= 1e-14 * a.norm()


# -------------------------------------------------------------------------------------------------- dtypes and shapes


@pytest.mark.slow_cases("triton-14-1", "triton-14-16", "triton-14-32", "triton-3-1", "triton-3-16", "triton-3-32", "triton-4-16")
@pytest.mark.parametrize("features", [1, 5, 16, 32])
@pytest.mark.parametrize("classes", [2, 3, 4, 14])
@pytest.mark.parametrize("impl", IMPLS)
def test_classes_and_features_in_float32(impl, classes, features):
    check(impl, *networks((5, 7, 3), classes, features))


@pytest.mark.parametrize(("classes", "features"), [(2, 16), (3, 5), (14, 32)])
@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_classes_and_features_in_float64(impl, classes, features):
    check(impl, *networks((5, 7, 3), classes, features, dtype=F64))


@pytest.mark.slow_cases("triton-dtype1-14-32")
@pytest.mark.parametrize(("classes", "features"), [(2, 16), (4, 5), (14, 32)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("impl", IMPLS)
def test_classes_and_features_in_half_precision(impl, dtype, classes, features):
    check(impl, *networks((5, 7, 3), classes, features, dtype=dtype))


@pytest.mark.parametrize("spatial", [(37,), (6, 7), (4, 3, 5), (1, 1, 1), (1, 9), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_spatial_axes(impl, spatial):
    check(impl, *networks(spatial, 3, 4, seed=3))


@pytest.mark.slow_cases("triton-1009", "triton-1023")
@pytest.mark.parametrize("voxels", sorted({1, 2, 3, 31, 97, 1009, *around(blocks(2, 16))}))
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_voxel_counts_around_a_block(impl, voxels):
    check(impl, *networks((voxels,), 2, 16, batch=1 if voxels > 200 else 2, seed=voxels))


@pytest.mark.slow_cases("triton-511", "triton-512")
@pytest.mark.parametrize("voxels", around(blocks(5, 3)))
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_voxel_counts_around_a_block_with_many_classes(impl, voxels):
    check(impl, *networks((voxels,), 5, 3, batch=1, seed=voxels))


@pytest.mark.slow_cases("triton-511", "triton-1023")
@pytest.mark.parametrize("voxels", [1, 97, *around(blocks(4, 5, itemsize=2))])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_voxel_counts_around_a_block_in_half_precision(impl, voxels):
    dtype = HALF[voxels % 2]
    check(impl, *networks((voxels,), 4, 5, batch=1, seed=voxels, dtype=dtype))


@pytest.mark.parametrize("voxels", around(blocks(3, 7, channels_innermost=True)))
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_voxel_counts_around_a_block_with_channels_innermost(impl, voxels):
    logits, features = networks((voxels,), 3, 7, batch=1, seed=voxels)
    check(impl, [channels_last(t) for t in logits], [channels_last(t) for t in features])


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_several_programs_per_sample_and_several_samples(impl):
    """Large enough that each sample is shared by many blocks, and that a stale sum of the sample before would show."""
    check(impl, *networks((17, 13, 11), 2, 8, batch=3, seed=11))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_batch_sizes(impl, batch):
    check(impl, *networks((41,), 4, 6, batch=batch, seed=batch))


@pytest.mark.parametrize("impl", IMPLS)
def test_networks_may_differ_in_their_feature_count(impl):
    check(impl, *networks((6, 5, 4), 3, [16, 5]))
    check(impl, *networks((6, 5, 4), 3, [3, 32]))


@pytest.mark.parametrize(("dtype", "feature_dtype"), [(F32, F16), (F32, BF16), (F16, F32), (BF16, F32), (F16, BF16)])
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_and_features_may_differ_in_dtype(impl, dtype, feature_dtype):
    check(impl, *networks((6, 5, 4), 3, 8, dtype=dtype, feature_dtype=feature_dtype))


@pytest.mark.slow_cases(
    "triton-4-None-similarity-probabilities",
    "triton-4-entropy-None-probabilities",
    "triton-4-max_probability-*-probabilities",
    "triton-4-None-None-probabilities",
    "triton-2-*-None-probabilities",
    "triton-2-None-similarity-probabilities",
    "triton-2-max_probability-similarity-probabilities",
)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("impl", IMPLS)
def test_options(impl, classes, options):
    check(impl, *networks((9, 7, 5), classes, 6, seed=5), **options)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("confidence", ["entropy", None])
@pytest.mark.parametrize("impl", IMPLS)
def test_eps_reaches_entropy_prototype_and_normaliser(impl, confidence, eps):
    logits, features = networks((9, 8), 4, 6, batch=1, seed=6)
    result = check(impl, logits, features, eps=eps, confidence=confidence)
    if eps == 0.5:
        plain = truth(logits, features, confidence=confidence)
        assert (result.truth.loss - plain.loss).abs() > 1e-3
        if confidence:  # some voxels change their teacher
            assert any(not torch.equal(a.mask, b.mask) for a, b in zip(result.truth.pairs, plain.pairs, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_three_networks(impl, options):
    result = check(impl, *networks((5, 4, 3), 3, [4, 7, 5], count=3, seed=8), **options)
    assert [(m.student, m.teacher) for m in result.maps] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize("scale", [0.01, 10.0, 60.0])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_small_confident_and_saturated_logits(impl, classes, scale):
    logits, features = networks((11, 13), classes, 6, scale=scale, seed=4)
    assert check(impl, logits, features).truth.near_ties < logits[0][:, 0].numel() * 2


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_logits_far_from_zero(impl):
    """Softmax must not overflow, nor the features' norms or dot products."""
    logits, features = networks((9, 8), 3, 6)
    check(impl, [z + 3e4 for z in logits], [f * 1e15 for f in features])
    check(impl, [z - 3e4 for z in logits], [f * 1e-4 for f in features])


def test_the_loss_without_gradient_is_the_same():
    logits, features = networks((6, 5, 4), 3, 8)
    for impl in ("naive", "torch", "triton"):
        with_gradient, _ = evaluate(impl, logits, features)
        with torch.no_grad():
            assert torch.equal(rplib.functional.reliable_mutual_loss(logits, features, impl=impl), with_gradient)
        plain = rplib.functional.reliable_mutual_loss(logits, features, impl=impl)
        assert torch.equal(plain, with_gradient) and not plain.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_only_one_network_may_require_a_gradient(impl):
    logits, features = networks((6, 5, 4), 3, 8)
    exact = truth(logits, features)
    for k in range(2):
        inputs = list(logits)
        (inputs[k],) = leaves([logits[k]])
        loss = rplib.functional.reliable_mutual_loss(inputs, features, impl=impl)
        (gradient,) = torch.autograd.grad(loss, inputs[k])
        assert (gradient.double() - exact.gradients[k]).norm() <= 5e-6 * exact.gradients[k].norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_features_may_be_absent_without_weighting(impl):
    logits, features = networks((6, 5), 3, 8)
    with_features, gradients = evaluate(impl, logits, features, weighting=None)
    without, same_gradients = evaluate(impl, logits, None, weighting=None)
    assert torch.equal(with_features, without)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
    for m in rplib.reliability(logits, None, weighting=None, impl=impl):
        assert m.prototypes is None and m.similarity is None
        assert torch.equal(m.weight, m.mask.float())


# --------------------------------------------------------------------------------------------------- memory layouts


@pytest.mark.slow_cases(
    "triton-expanded_batch", "triton-offset_storage", "triton-batch_slice", "triton-expanded_voxels", "triton-channel_slice"
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("impl", IMPLS)
def test_memory_layouts(impl, layout):
    """The result may not depend on strides: compared with the truth, which reads the values alone."""
    logits, features = networks((5, 6, 7), 3, 6, batch=2, seed=2)
    check(impl, [layout(t) for t in logits], [layout(t) for t in features])
    check(impl, [layout(logits[0]), transposed(logits[1])], [features[0], layout(features[1])])


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_voxels_some_elements_apart(impl, step):
    """All strides but the voxel's are multiples of 16, so that nothing else tells this tensor from a contiguous one."""
    logits, features = networks((48,), 2, 16, batch=2, seed=2)

    def apart(x):
        wide = x.new_full((*x.shape[:2], 48 * step), torch.nan)
        wide[..., ::step] = x
        return wide[..., ::step]

    check(impl, [apart(t) for t in logits], [apart(t) for t in features])


@pytest.mark.slow_cases("triton-dtype0")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_memory_layouts_in_half_precision(impl, dtype):
    logits, features = networks((5, 6, 7), 2, 16, dtype=dtype, seed=2)
    for layout in LAYOUTS.values():
        check(impl, [layout(t) for t in logits], [layout(t) for t in features])


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_memory_formats(impl):
    logits, features = networks((5, 6, 7), 3, 6)
    last = torch.channels_last_3d
    check(impl, [t.contiguous(memory_format=last) for t in logits], [t.contiguous(memory_format=last) for t in features])
    logits, features = networks((11, 6), 3, 6)
    last = torch.channels_last
    check(impl, [t.contiguous(memory_format=last) for t in logits], [t.contiguous(memory_format=last) for t in features])


@pytest.mark.parametrize("impl", IMPLS)
def test_features_expanded_along_channels(impl):
    logits, features = networks((5, 6, 7), 3, 6)
    check(impl, logits, [expanded_channels(f) for f in features])


@pytest.mark.slow_cases("triton-samples")
@pytest.mark.parametrize("axis", ["channels", "voxels", "samples"])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_offsets_beyond_int32(impl, axis):
    """Strides that int32 holds, whose products it does not: 4 GB of address space, of which a few pages are touched."""
    numpy = pytest.importorskip("numpy")
    shape, stride = (3, 3, 5), 2**30 + 7
    strides = {"channels": (70, stride, 9), "voxels": (70, 11, 2**29 + 3), "samples": (stride, 11, 2)}[axis]
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert span > 2**31
    try:
        memory = torch.from_numpy(numpy.zeros(span, dtype=numpy.float16))  # zeros come without touching the pages
    except MemoryError:
        pytest.skip("no address space for a tensor of 4 GB")
    if DEVICE.type != "cpu":
        memory = torch.zeros(span, dtype=F16, device=DEVICE)
    logits, features = networks(shape[2:], shape[1], 3, batch=shape[0], dtype=F16)
    for tensors in (logits, features):
        far = memory.as_strided(shape, strides)
        far.copy_(tensors[1])
        z1, f1 = (far, features[1]) if tensors is logits else (logits[1], far)
        check(impl, [logits[0], z1], [features[0], f1])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_tensor_may_serve_as_both_networks_features(impl):
    logits, features = networks((5, 6, 7), 3, 6)
    check(impl, logits, [features[0], features[0]])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_reaches_a_non_contiguous_producer(impl):
    """Gradient through a view chain: the leaf gets it where its own values lie."""
    logits, features = networks((5, 6, 7), 3, 6, dtype=F32)
    stored = [t.detach().clone().requires_grad_() for t in logits]
    views = [t.flip(2).transpose(2, 4) for t in stored]
    moved = [f.flip(2).transpose(2, 4) for f in features]
    rplib.functional.reliable_mutual_loss(views, moved, impl=impl).backward()
    exact = truth(logits, features)
    for t, expected in zip(stored, exact.gradients, strict=True):
        assert (t.grad.double() - expected).norm() <= 5e-6 * expected.norm()


# ------------------------------------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("impl", IMPLS)
def test_class_nobody_predicts_has_a_zero_prototype(impl):
    logits, features = networks((6, 5, 4), 4, 6)
    for z in logits:
        z[:, 2] = -20.0
    result = check(impl, logits, features)
    for m in result.maps:
        assert (m.prototypes[:, 2] == 0).all() and (m.similarity[:, 2] == 0).all()
        assert not m.prototypes.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_class_for_every_voxel(impl):
    logits, features = networks((6, 5, 4), 2, 6)
    for z in logits:
        z[:, 1] = z[:, 0] - z[:, 1].abs()
    check(impl, logits, features)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_feature_has_similarity_zero(impl):
    logits, features = networks((6, 5, 4), 3, 6)
    features[0][..., ::2] = 0
    features[1][0] = 0
    result = check(impl, logits, features)
    from_network_1 = next(m for m in result.maps if m.teacher == 1)
    assert (from_network_1.similarity[0] == 0).all() and (from_network_1.prototypes[0] == 0).all()


@pytest.mark.parametrize("tiny", [1e-6, 1e-20, 1e-30])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_tiny_features_are_bounded_by_the_floors_of_the_norms(impl, tiny):
    """Squares of these underflow in float32; below 1e-8 the formula's floor counts, not a division by zero."""
    logits, features = networks((6, 5, 4), 3, 6)
    check(impl, logits, [f * tiny for f in features])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("impl", IMPLS)
def test_identical_networks_give_exactly_zero(impl, dtype):
    logits, features = networks((6, 5, 4), 3, 6, dtype=dtype)
    for confidence in ("entropy", "max_probability"):
        loss, gradients = evaluate(impl, [logits[0], logits[0].clone()], [features[0]] * 2, confidence=confidence)
        assert loss.item() == 0.0
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_reliable_voxel_is_zero_and_connected_to_the_graph(impl):
    """Equal confidence everywhere with other labels: the second network is the first with its classes swapped."""
    logits, features = networks((6, 5, 4), 2, 6)
    z = leaves([logits[0], logits[0].flip(1)])
    loss = rplib.functional.reliable_mutual_loss(z, features, impl=impl)
    assert loss.item() == 0.0 and loss.requires_grad and loss.grad_fn is not None
    loss.backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in z)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_network_teaches_everywhere(impl):
    logits, features = networks((6, 5, 4), 3, 6)
    result = check(impl, [logits[0] * 0.05, logits[1] * 20], features)
    assert [m.mask.float().mean().item() for m in result.maps] == [1.0, 0.0]
    assert (result.gradients[1] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_may_be_negative_and_are_not_clamped(impl):
    """A teacher certain of class 0 whose features all point away from that class's prototype but one large one."""
    logits, features = networks((40,), 2, 4, batch=1)
    logits[1].zero_()
    logits[1][:, 0] = 12.0
    features[1] = -torch.ones_like(features[1]) * 0.1
    features[1][..., 0] = 100.0
    result = check(impl, logits, features)
    assert result.maps[0].weight.min() < -0.4


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_logits_take_the_first_maximum(impl):
    logits, features = networks((6, 5, 4), 4, 6)
    for z in logits:
        z[:, 3] = z[:, 1] = z.amax(1)
    for m in check(impl, logits, features).maps:
        assert not (m.pseudo_label == 3).any()


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_the_label_is_the_largest_logit_even_where_probabilities_round_to_equal(impl):
    logits, features = networks((40,), 3, 4, batch=1)
    for z in logits:
        z[:, 0], z[:, 2] = 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        z[:, 1] = torch.linspace(-3, 0.9, 40)
    for m in rplib.reliability(logits, features, impl=impl):
        assert (m.pseudo_label == 2).all()


# ------------------------------------------------------------------------------------------------- non-finite inputs

NAN, INF = float("nan"), float("inf")


@pytest.mark.slow_cases("triton-*-entropy-None-probabilities", "triton-*-max_probability-similarity-logits")
@pytest.mark.parametrize("options", [OPTIONS[k] for k in (0, 3, 4, 8, 10)], ids=option_name)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("network", [0, 1])
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_logits_never_give_a_finite_loss(impl, network, value, options):
    """NaN or +inf anywhere: first voxel, last voxel, any class, in the network that teaches there or not."""
    for channel, voxel, batch, sharp in ((0, 0, 0, 0), (2, 34, 1, 1), (1, 17, 1, 0), (1, 17, 1, 1)):
        logits, features = networks((35,), 3, 4)
        logits[sharp] *= 5
        logits[network][batch, channel, voxel] = value
        loss = rplib.functional.reliable_mutual_loss(logits, features, impl=impl, **options)
        assert not loss.isfinite(), (channel, voxel, sharp)


@pytest.mark.slow_cases("triton-*-max_probability")
@pytest.mark.parametrize("confidence", ["entropy", "max_probability", None])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("network", [0, 1])
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_features_never_give_a_finite_loss(impl, network, value, confidence):
    """Also where the other network teaches everywhere, so that this feature is no part of any weight."""
    for teacher in (0, 1):
        logits, features = networks((35,), 3, 4)
        logits[teacher] *= 50
        logits[1 - teacher] *= 0.01
        features[network][1, 2, 34] = value
        loss = rplib.functional.reliable_mutual_loss(logits, features, impl=impl, confidence=confidence)
        assert not loss.isfinite(), teacher


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_half_precision_inputs_never_give_a_finite_loss(impl, dtype):
    for which in range(4):
        logits, features = networks((35,), 2, 4, dtype=dtype)
        [*logits, *features][which][0, 1, 33] = NAN
        assert not rplib.functional.reliable_mutual_loss(logits, features, impl=impl).isfinite(), which


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_logits_poison_the_gradient_or_the_loss_of_the_backward_pass(impl):
    """Training must notice: the loss itself is not finite, so a scaler or a check on it sees the step."""
    logits, features = networks((35,), 3, 4)
    logits[1][0, 1, 5] = NAN
    z = leaves(logits)
    loss = rplib.functional.reliable_mutual_loss(z, features, impl=impl)
    loss.backward()
    assert not loss.isfinite()


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_of_a_class_that_nobody_picks_follows_the_formula(impl, options):
    logits, features = networks((6, 5, 4), 3, 6)
    for z in logits:
        z[:, 1] = z.amin(1)
        z[1, 1] = -INF
    logits[0][0, 1, 2:4] = -INF
    check(impl, logits, features, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_finite_names_the_tensor_and_the_count(impl):
    logits, features = networks((35,), 3, 4)
    rplib.functional.reliable_mutual_loss(logits, features, impl=impl, check_finite=True)
    features[1][0, :3, 7] = NAN
    with pytest.raises(ValueError, match=r"features\[1\].*\b3\b"):
        rplib.functional.reliable_mutual_loss(logits, features, impl=impl, check_finite=True)
    logits[0][1, 2, :5] = INF
    with pytest.raises(ValueError, match=r"logits\[0\].*\b5\b"):
        rplib.functional.reliable_mutual_loss(logits, features, impl=impl, check_finite=True)


# --------------------------------------------------------------------------------------------------- half precision


def half_precision_excess(impl, logits, features, upstream, **keywords):
    """max over elements of (|ours - truth| - |naive - truth|) / ulp; at most 1 is owed. Each truth has its own mask at ties."""
    ours = compare(impl, logits, features, upstream=upstream, **keywords)
    naive = compare("naive", logits, features, upstream=upstream, masks_rule="everywhere", **keywords)
    worst = 0.0
    for k in range(2):
        error = (ours.gradients[k].double() - ours.truth_gradients[k]).abs()
        naive_error = (naive.gradients[k].double() - naive.truth_gradients[k]).abs()
        assert error.isfinite().all()
        excess = (error - naive_error) / ulp(ours.truth_gradients[k], logits[k].dtype)
        worst = max(worst, excess.max().item())
    return worst


@pytest.mark.slow_cases("triton-dtype0-4-8.0-65536.0", "triton-dtype1-4-8.0-65536.0", "triton-dtype1-2-8.0-65536.0")
@pytest.mark.parametrize(("scale", "upstream"), [pytest.param(2.0, 1.0, marks=pytest.mark.slow), (8.0, 65536.0)])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_half_precision_gradient_elementwise(impl, dtype, classes, scale, upstream):
    """|ours - truth| <= |naive - truth| + 1 ulp, 4,096 voxels and more, confident logits and a loss scaler's factor included."""
    logits, features = networks((17, 17, 15), classes, 8, batch=1, dtype=dtype, scale=scale, seed=1)
    assert logits[0][:, 0].numel() >= 4096
    assert half_precision_excess(impl, logits, features, upstream) <= 1.0


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_float16_gradient_of_confident_voxels_survives_a_loss_scaler(impl):
    """Without scaling these gradients are below float16's smallest number; with the factor applied in float32 none is lost."""
    logits, features = networks((17, 17, 15), 2, 8, batch=1, dtype=F16, scale=6.0, seed=1)
    result = compare(impl, logits, features, upstream=65536.0, masks_rule="everywhere")
    for ours, exact in zip(result.gradients, result.truth_gradients, strict=True):
        tiny = (exact.abs() >= 2.0**-23) & (exact.abs() / 65536.0 < 2.0**-25)
        assert tiny.sum() > 100
        assert (ours[tiny] != 0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("impl", [TRITON])
def test_half_precision_masks_agree_between_implementations(impl, dtype):
    logits, features = networks((17, 9), 4, 8, dtype=dtype)
    exact = truth(logits, features)
    clear = ~exact.pairs[0].near_tie
    ours = own_masks(rplib.reliability(logits, features, impl=impl))
    theirs = own_masks(rplib.reliability(logits, features, impl="torch"))
    for pair in ours:
        assert torch.equal(ours[pair][clear], theirs[pair][clear])
