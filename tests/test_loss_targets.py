"""The options of the objective: valid and invalid labels, ignore_index, labelled=, supervised=, students=, the weight."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loss_cases import ANY_K_IMPLS, DEVICE, FAST_IMPLS, IMPLS, LAYOUTS, TRITON, networks
from test_loss_objective import assert_right, expected, run, true_dice
from truth import leaves, truth

import rplib
from rplib import dispatch, targets

EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)
PLAIN_IMPL = pytest.mark.parametrize("impl", ANY_K_IMPLS)


def problem(classes=3, batch=4, labelled=2, dtype=torch.float64, count=2):
    logits, features = networks((7, 5, 3), classes, 6, batch=batch, count=count, dtype=dtype)
    return logits, features, torch.randint(0, classes, (labelled, 7, 5, 3), device=DEVICE)


def true_cross_entropy(z, target, ignore_index=-100):
    z = z[: len(target)].double()
    value = F.cross_entropy(z, target.long(), ignore_index=ignore_index, reduction="sum")
    return value / (target != ignore_index).sum()


# ------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda t: t.masked_fill(t == 2, 255), r"target.*255.*0\.\.2.*ignore_index"),
        (lambda t: t.masked_fill(t == 2, 3), r"target.*\(3\)"),
        (lambda t: t.to(torch.int8).masked_fill(t == 2, -1), r"target.*-1"),
        (lambda t: t.float() * 0.5, r"target.*0\.5.*soft"),
        (lambda t: t.float().masked_fill(t == 2, float("nan")), r"target.*nan"),
        (lambda t: t.half().masked_fill(t == 2, float("inf")), r"target.*inf"),
    ],
    ids=["255", "C", "-1", "soft", "nan", "inf"],
)
@EVERY_IMPL
def test_a_label_that_is_no_class(impl, spoil, text):
    logits, features, target = problem(dtype=torch.float32)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=text):
            rplib.MutualObjective(impl=impl)(logits, features, spoil(target), 0.1)
    else:
        assert rplib.MutualObjective(impl=impl)(logits, features, spoil(target), 0.1).total.isnan()
    with pytest.raises(ValueError, match=text):
        rplib.MutualObjective(impl=impl, check_finite=True)(logits, features, spoil(target), 0.1)


@EVERY_IMPL
def test_where_nobody_may_look_a_bad_label_makes_the_loss_nan(impl, monkeypatch):
    """As on a GPU: no synchronisation, and never a plausible number."""
    monkeypatch.setattr(targets, "looks_allowed", lambda _: False)
    logits, features, target = problem(dtype=torch.float32)
    good = rplib.MutualObjective(impl=impl)(logits, features, target, 0.1)
    assert good.total.isfinite() and good.dice.isfinite()
    for value, dtype in (
        (3, torch.int64),
        (255, torch.uint8),
        (-1, torch.int32),
        (0.5, torch.float32),
        (float("nan"), torch.float16),
    ):
        bad = target.to(dtype)
        bad[1, 6, 4, 2] = value
        terms = rplib.MutualObjective(impl=impl)(logits, features, bad, 0.1)
        assert terms.total.isnan() and terms.dice.isnan() and terms.mutual.isfinite(), value


@pytest.mark.parametrize("impl", [pytest.param("naive", marks=pytest.mark.slow), *FAST_IMPLS])
def test_bad_labels_in_a_compiled_objective(impl):
    logits, features, target = problem(batch=2, labelled=1, dtype=torch.float32)
    torch._dynamo.reset()
    step = torch.compile(rplib.MutualObjective(impl=impl, ignore_index=9), fullgraph=True, backend="eager")
    assert step(logits, features, target.masked_fill(target == 1, 9), torch.tensor(0.1, device=DEVICE)).total.isfinite()
    assert step(logits, features, target.masked_fill(target == 1, 8), torch.tensor(0.1, device=DEVICE)).total.isnan()


@EVERY_IMPL
def test_whole_numbers_of_any_type_and_bool_are_classes(impl):
    logits, features, target = problem(classes=2, dtype=torch.float32)
    values = {
        rplib.MutualObjective(impl=impl)(logits, features, target.to(dtype), 0.1).total.item()
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16)
    }
    assert len(values) == 1


@pytest.mark.slow_cases(
    "triton-dice-dtype1",
    "triton-dice-dtype2",
    "triton-cross_entropy-dtype0",
    "triton-cross_entropy-dtype2",
    "triton-dice+cross_entropy-dtype0",
    "triton-dice+cross_entropy-dtype1",
    "triton-cross_entropy-dtype1",
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("supervised", ["dice", "cross_entropy", "dice+cross_entropy"])
@EVERY_IMPL
def test_ignore_index(impl, supervised, dtype):
    """Scribbles: most voxels are 255. The supervised term ignores them, the mutual term does not."""
    logits, features, target = problem(dtype=torch.float32 if impl == "triton" else torch.float64)
    scribbles = torch.where(torch.rand_like(target, dtype=torch.float32) < 0.2, target, 255)
    result, gradients = run(
        rplib.MutualObjective(impl=impl, ignore_index=255, supervised=supervised),
        logits, features, scribbles.to(dtype), 0.3,
    )  # fmt: skip
    z = leaves([t.double() for t in logits])
    terms = []
    for t in z:
        known = scribbles != 255
        p = t[:2].softmax(1)
        dice = [
            1
            - (2 * (p[:, c] * known * (scribbles == c)).sum() + 1e-8) / ((p[:, c] * known).sum() + (scribbles == c).sum() + 1e-8)
            for c in (1, 2)
        ]
        parts = {"dice": torch.stack(dice).mean(), "cross_entropy": true_cross_entropy(t, scribbles, 255)}
        terms.append(sum(parts[name] for name in supervised.split("+")) / len(supervised.split("+")))
    mutual = truth(logits, features)
    dice_gradients = torch.autograd.grad(0.5 * sum(terms), z)
    reference = (
        0.5 * sum(terms).detach() + 0.3 * mutual.loss,
        sum(terms).detach(),
        mutual.loss,
        [g + 0.3 * m for g, m in zip(dice_gradients, mutual.gradients, strict=True)],
    )
    assert_right(result, gradients, reference, 2e-6 if impl == "triton" else 1e-12)


def test_an_ignore_index_that_the_target_cannot_hold_is_no_wrap_around():
    """-1 is 255 in uint8 arithmetic; 255 there stays a mistake."""
    logits, features, target = problem()
    target = target.to(torch.uint8).masked_fill(target == 2, 255)
    with pytest.raises(ValueError, match=r"255.*ignore_index=-1"):
        rplib.MutualObjective(ignore_index=-1, check_finite=True)(logits, features, target, 0.1)


@EVERY_IMPL
def test_all_voxels_ignored_is_zero(impl):
    logits, features, target = problem(dtype=torch.float32)
    for supervised in ("dice", "cross_entropy"):
        terms = rplib.MutualObjective(impl=impl, ignore_index=255, supervised=supervised)(
            leaves(logits), features, torch.full_like(target, 255), 0.0
        )
        assert terms.dice.item() == 0
        terms.total.backward()


@pytest.mark.slow_cases(
    "triton-*-7",
    "triton-None-dice-*",
    "triton-None-dice+cross_entropy-3",
    "triton-spatial_slice-dice-*",
    "triton-spatial_slice-dice+cross_entropy-2",
    "triton-channels_last-dice-3",
    "triton-channels_last-dice+cross_entropy-*",
)
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("supervised", ["dice", "dice+cross_entropy"])
@pytest.mark.parametrize("layout", [None, LAYOUTS["channels_last"], LAYOUTS["spatial_slice"]])
@pytest.mark.parametrize("impl", [TRITON])
def test_scribbles_under_a_mask_inside_the_kernels(impl, layout, supervised, classes):
    """Both at once, NaN under the mask, half precision; beside the naive form in float64."""
    for dtype, spatial in ((torch.float32, (7, 5, 3)), (torch.float16, (67,)), (torch.bfloat16, (1, 4, 16))):
        logits, features = networks(spatial, classes, 6, batch=3, dtype=dtype)
        target = torch.randint(0, classes, (2, *spatial), dtype=torch.uint8, device=DEVICE)
        target[torch.rand(target.shape, device=DEVICE) < 0.4] = 255
        mask = torch.rand(3, *spatial, device=DEVICE) < 0.7
        for ts in (logits, features):
            for t in ts:
                t.masked_fill_(~mask[:, None], float("nan"))
        laid = [[t if layout is None else layout(t) for t in ts] for ts in (logits, features)]
        keywords = {"supervised": supervised, "ignore_index": 255, "statistics": True}
        found = []
        for form, z, f, m in (
            (impl, *laid, mask if layout is None else layout(mask[:, None].half())[:, 0] > 0),
            ("naive", [t.double() for t in logits], [t.double() for t in features], mask),
        ):
            z = leaves(z)
            terms = rplib.MutualObjective(0.7, impl=form, **keywords)(z, f, target, 0.3, mask=m)
            terms.total.backward()
            found.append(([*terms[:3], *terms.statistics], [t.grad.double() for t in z]))
        (ours, gradients), (exact, expected_gradients) = found
        tolerance = {torch.float32: 5e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=5e-6, atol=1e-7)
        for g, h in zip(gradients, expected_gradients, strict=True):
            assert (g - h).norm() <= tolerance * h.norm()
            assert (g.movedim(1, -1)[~mask] == 0).all()


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 3, 7, 5, 3), r"target.*argmax.*rplib\.regions"),
        ((2, 5, 3), r"target.*deep supervision.*rplib\.unstack"),
        ((2, 1, 5, 3), r"target.*rplib\.unstack"),
    ],
)
def test_other_peoples_conventions_are_answered_with_the_helper(shape, text):
    logits, _, _ = problem()
    with pytest.raises(ValueError, match=text):
        rplib.MutualObjective(weighting=None)(logits, None, torch.zeros(shape, device=DEVICE), 0.1)


def test_a_stack_of_2d_outputs_is_no_volume():
    """(B, levels, C, X, Y) has the shape of 3-D logits: whatever else is passed shows the mistake; logits alone cannot."""
    stacks = [torch.randn(2, 3, 4, 8, 8, device=DEVICE) for _ in range(2)]
    features = [torch.randn(2, 5, 8, 8, device=DEVICE) for _ in range(2)]
    mask = torch.ones(2, 8, 8, dtype=torch.bool, device=DEVICE)
    for weighting in ("similarity", None):
        loss_fn = rplib.ReliableMutualLoss(weighting=weighting)
        with pytest.raises(ValueError, match=r"features\[0\].*rplib\.unstack"):
            loss_fn(stacks, features)
        for one in (mask, mask[:, None]):
            with pytest.raises(ValueError, match=r"mask.*rplib\.unstack"):
                loss_fn(stacks, None if weighting is None else [torch.randn(2, 5, 4, 8, 8, device=DEVICE)] * 2, one)
        assert loss_fn(rplib.unstack(stacks)[0], features).ndim == 0
    assert rplib.ReliableMutualLoss(weighting=None)(stacks).ndim == 0
    documented = (Path(rplib.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert "unpack stacks before that call" in documented


def test_keywords_that_do_not_fit():
    for keyword, value, error in (
        ("dice_classes", (1, 1, 2), ValueError),
        ("supervised", "focal", ValueError),
        ("ignore_index", 255.0, TypeError),
        ("ignore_index", True, TypeError),
        ("statistics", 1, TypeError),
        ("students", (), ValueError),
        ("students", (0, 0), ValueError),
        ("students", (-1,), ValueError),
        ("students", 0, ValueError),
    ):
        with pytest.raises(error, match=keyword):
            rplib.MutualObjective(**{keyword: value})
    logits, features, target = problem()
    with pytest.raises(ValueError, match=r"students.*\(0, 2\).*2 networks"):
        rplib.MutualObjective(students=(0, 2))(logits, features, target, 0.1)


# ------------------------------------------------------------------------------------------------- which samples


@pytest.mark.slow_cases("triton-*-list")
@pytest.mark.parametrize(
    "labelled",
    [[3, 0], (3, 0), torch.tensor([3, 0])],
    ids=["list", "tuple", "tensor"],
)
@pytest.mark.parametrize("whole", [False, True])
@EVERY_IMPL
def test_labelled_by_index(impl, labelled, whole):
    dtype, tolerance = (torch.float32, 2e-6) if impl == "triton" else (torch.float64, 1e-12)
    logits, features, target = problem(batch=5, dtype=dtype)
    order = [3, 0, 1, 2, 4]
    reference = expected([z[order] for z in logits], [f[order] for f in features], target, 0.3, (1, 2))
    given = target
    if whole:  # one target per sample; those of unlabelled samples are not read, not even their mistakes
        given = torch.full((5, 7, 5, 3), 99, device=DEVICE)
        given[order[:2]] = target
    z = leaves(logits)
    result = rplib.MutualObjective(impl=impl)(z, features, given, 0.3, labelled=labelled)
    result.total.backward()
    assert_right(result, [t.grad[order] for t in z], reference, tolerance)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("impl", [TRITON])
def test_labelled_samples_anywhere_with_everything_else_inside_the_kernels(impl, classes):
    """Masks, weights and memory follow the samples; beside the naive form in float64."""
    logits, features = networks((7, 3), classes, 6, batch=4)
    target = torch.randint(0, classes, (2, 7, 3), device=DEVICE)
    mask = torch.rand(4, 7, 3, device=DEVICE) < 0.7
    keywords = {"supervised": "dice+cross_entropy", "ignore_index": 1, "mutual_on": "unlabelled", "statistics": True}
    found = []
    for form, dtype in ((impl, torch.float32), ("naive", torch.float64)):
        z = leaves([LAYOUTS["batch_slice"](t.to(dtype)) for t in logits])
        call = {"labelled": [3, 1], "mask": mask, "sample_weights": [0.5, 1.0, 2.0, 3.0]}
        terms = rplib.MutualObjective(impl=form, **keywords)(z, [f.to(dtype) for f in features], target, 0.3, **call)
        terms.total.backward()
        found.append(([*terms[:3], *terms.statistics], [t.grad.double() for t in z]))
    (ours, gradients), (exact, expected_gradients) = found
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-6, atol=1e-7)
    for g, h in zip(gradients, expected_gradients, strict=True):
        assert (g - h).norm() <= 5e-6 * h.norm()


@pytest.mark.slow_cases("triton-range")
@pytest.mark.parametrize(
    ("labelled", "rows"),
    [
        (2, [0, 1]),
        ([False, True, False, True], [1, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (range(1, 3), [1, 2]),
    ],
    ids=["count", "list of bool", "mask", "range"],
)
@EVERY_IMPL
def test_labelled_by_count_and_mask(impl, labelled, rows):
    logits, features, target = problem(dtype=torch.float32)
    whole = torch.full((4, 7, 5, 3), 99, device=DEVICE)
    whole[rows] = target
    order = rows + [k for k in range(4) if k not in rows]
    reference = expected([z[order] for z in logits], [f[order] for f in features], target, 0.3, (1, 2))
    for given in (target, whole):
        result = rplib.MutualObjective(impl=impl)(logits, features, given, 0.3, labelled=labelled)
        for ours, exact in zip(result, reference[:3], strict=True):
            assert abs(ours.item() - exact.item()) <= 2e-6 * max(abs(exact.item()), 0.1)


@pytest.mark.parametrize(
    ("labelled", "error", "text"),
    [
        (5, ValueError, "labelled is 5.*4 samples"),
        (-1, ValueError, "labelled is -1"),
        ([0, 0], ValueError, r"labelled is \[0, 0\].*different"),
        ([0, 4], ValueError, "from 0 to 3"),
        ([True, False], ValueError, "mask of 2 samples"),
        ([True, False, 2, 3], TypeError, "labelled"),
        (1.0, TypeError, "labelled is 1.0"),
        (torch.tensor([0.0]), TypeError, "labelled.*float32"),
        (1, ValueError, "so 2 samples.*4 of which labelled names 1"),
        ([0, 1, 2], ValueError, "labelled names 3"),
    ],
)
def test_labelled_that_does_not_fit(labelled, error, text):
    logits, features, target = problem()
    with pytest.raises(error, match=text):
        rplib.MutualObjective()(logits, features, target, 0.1, labelled=labelled)


# ------------------------------------------------------------------------------------------------- supervised, students


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@PLAIN_IMPL
def test_cross_entropy_and_the_mean_of_both(impl, dtype, classes):
    logits, features, target = problem(classes, dtype=dtype)
    values = {}
    for supervised in ("dice", "cross_entropy", "dice+cross_entropy"):
        z = leaves(logits)
        terms = rplib.MutualObjective(1.0, impl=impl, supervised=supervised)(z, features, target, 0.0)
        terms.total.backward()
        values[supervised] = terms.dice, [t.grad.double() for t in z]
    exact = leaves([z.double() for z in logits])
    entropy, dice = sum(true_cross_entropy(t, target) for t in exact), sum(true_dice(t, target, range(1, classes)) for t in exact)
    tolerance, rounding = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-6, 2.0**-8)}[dtype]
    for name, value in (("dice", dice), ("cross_entropy", entropy), ("dice+cross_entropy", (dice + entropy) / 2)):
        ours, gradients = values[name]
        assert abs(ours.item() - value.item()) <= tolerance * value.item()
        for g, e in zip(gradients, torch.autograd.grad(value, exact, retain_graph=True), strict=True):
            assert (g - e).norm() <= rounding * e.norm()


@pytest.mark.slow_cases(
    "triton-dice+cross_entropy-18-dtype2-spatial2-keywords2-spatial_slice",
    "triton-cross_entropy-18-*",
    "triton-dice+cross_entropy-18-dtype2-spatial2-keywords2-None",
)
@pytest.mark.parametrize("layout", [None, *(LAYOUTS[name] for name in ("channels_last", "spatial_slice"))])
@pytest.mark.parametrize(
    ("classes", "dtype", "spatial", "keywords"),
    [
        (2, torch.float32, (7, 5, 3), {}),
        (4, torch.bfloat16, (67,), {"dice_classes": (0, 3)}),
        (18, torch.float16, (3, 5), {}),
        (3, torch.float32, (1,), {"confidence": None}),
    ],
)
@pytest.mark.parametrize("supervised", ["cross_entropy", "dice+cross_entropy"])
@pytest.mark.parametrize("impl", [TRITON])
def test_cross_entropy_inside_the_kernels(impl, supervised, classes, dtype, spatial, keywords, layout):
    """Together with the mutual term, against the naive form in float64, on random inputs without near-ties."""
    logits, features = networks(spatial, classes, 6, batch=3, dtype=dtype)
    target = torch.randint(0, classes, (2, *spatial), device=DEVICE)
    laid = [[t if layout is None else layout(t) for t in ts] for ts in (logits, features)]
    objective = rplib.MutualObjective(0.7, impl=impl, supervised=supervised, **keywords)
    result, gradients = run(objective, *laid, target, 0.3)
    exact = [z.double() for z in logits], [f.double() for f in features]
    naive = rplib.MutualObjective(0.7, impl="naive", supervised=supervised, **keywords)
    expected_result, expected_gradients = run(naive, *exact, target, 0.3)
    tolerance = {torch.float32: 5e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for ours, value in zip(result, expected_result, strict=True):
        assert abs(ours.item() - value.item()) <= 5e-6 * max(abs(value.item()), 0.1)
    for g, h in zip(gradients, expected_gradients, strict=True):
        assert (g.double() - h).norm() <= tolerance * h.norm()


@pytest.mark.slow_cases("triton-2-students1-3", "triton-2-students3-3")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("count", "students"), [(2, (0,)), (2, (1,)), (3, (2, 0)), (2, (0, 1))])
@EVERY_IMPL
def test_students_learn_and_the_others_only_teach(impl, count, students, classes):
    if impl == "triton" and count != 2:
        pytest.skip("the kernels take two networks")
    dtype, tolerance = (torch.float32, 3e-6) if impl == "triton" else (torch.float64, 1e-12)
    logits, features, target = problem(classes, count=count, dtype=dtype)
    z = leaves(logits)
    result = rplib.MutualObjective(impl=impl, students=students)(z, features, target, 0.3)
    result.total.backward()
    exact = truth(logits, features)
    pairs = [pair for pair in exact.pairs if pair.student in students]
    mutual = sum(pair.loss for pair in pairs)
    torch.testing.assert_close(result.mutual.double(), mutual, rtol=tolerance, atol=0)
    twins = leaves([t.double() for t in logits])
    dice = sum(true_dice(twins[k], target, range(1, classes)) for k in students)
    torch.testing.assert_close(result.dice.double(), dice.detach(), rtol=tolerance, atol=0)
    gradients = torch.autograd.grad(0.5 * dice, twins, allow_unused=True)
    for k, t in enumerate(z):
        if k not in students:
            assert t.grad is None
            continue
        expected_gradient = gradients[k] + 0.3 * exact.gradients[k]
        assert (t.grad - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    maps = rplib.reliability(logits, features, impl=impl, students=students)
    assert [(m.student, m.teacher) for m in maps] == [(p.student, p.teacher) for p in pairs]
    loss = rplib.ReliableMutualLoss(impl=impl, students=students)(logits, features)
    torch.testing.assert_close(loss.double(), mutual, rtol=tolerance, atol=0)


@pytest.mark.slow_cases("triton-no_grad")
@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
@EVERY_IMPL
def test_a_teacher_without_a_graph(impl, how):
    """A mean teacher's logits and features come from no_grad or inference_mode, in every form."""
    logits, features, target = problem(dtype=torch.float32)
    reference = expected(logits, features, target, 0.3, (1, 2))
    with how():
        teacher, teacher_features = logits[1] * 1, features[1] * 1
    for students in (None, (0,)):
        (student,) = leaves(logits[:1])
        objective = rplib.MutualObjective(impl=impl, students=students)
        terms = objective([student, teacher], [features[0], teacher_features], target, 0.3)
        terms.total.backward()
        assert (student.grad.double() - reference[3][0]).norm() <= 5e-6 * reference[3][0].norm()
    with how():
        assert rplib.MutualObjective(impl=impl)([student, teacher], features, target, 0.3).total.isfinite()
        assert len(rplib.reliability([student, teacher], features, impl=impl)) == 2


@EVERY_IMPL
def test_a_loss_of_logits_without_gradient_has_none(impl):
    """Whatever the features ask for: they get no gradient."""
    logits, features, target = problem(dtype=torch.float32)
    f = leaves(features)
    assert not rplib.functional.reliable_mutual_loss(logits, f, impl=impl).requires_grad
    assert not rplib.MutualObjective(impl=impl)(logits, f, target, 0.1).total.requires_grad


@pytest.mark.parametrize(
    "keywords",
    [{"prototypes": "batch"}, {"prototypes": "average"}],
    ids=lambda k: next(iter(k.values())),
)
@pytest.mark.parametrize("impl", [TRITON])
def test_what_triton_cannot_do_is_refused_by_name_and_left_to_torch_by_auto(impl, keywords, monkeypatch):
    (name,) = keywords
    assert name in dispatch.BEYOND_KERNELS
    logits, features, target = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"(?s)triton.*{name}.*torch"):
        rplib.MutualObjective(impl=impl, **keywords)(logits, features, target, 0.1)
    monkeypatch.setattr(dispatch, "device_obstacle", lambda *_, **__: None)  # a GPU that the kernels support
    by_auto = rplib.MutualObjective(**keywords)(logits, features, target, 0.1)
    by_torch = rplib.MutualObjective(impl="torch", **keywords)(logits, features, target, 0.1)
    assert torch.equal(by_auto.total, by_torch.total)


@pytest.mark.parametrize("impl", [TRITON])
def test_every_option_of_the_kernels_in_a_compiled_objective(impl):
    torch._dynamo.reset()
    logits, features, target = problem(batch=3, labelled=1, dtype=torch.float32)
    scribbles, mask = target.masked_fill(target == 1, 9), torch.rand(3, 7, 5, 3, device=DEVICE) < 0.8
    objective = rplib.MutualObjective(
        impl=impl, students=(0,), ignore_index=9, mutual_on="unlabelled", minimum_confidence=0.4, temperature=2.0,
        class_weights=(0.5, 1.0, 2.0), reduction="sum", statistics=True,
    )  # fmt: skip
    weights, weight = torch.tensor([0.5, 1.0, 2.0], device=DEVICE), torch.tensor(0.3, device=DEVICE)
    found = []
    for step in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        (z,) = leaves(logits[:1])
        terms = step([z, logits[1]], features, scribbles, weight, mask=mask, labelled=[1], sample_weights=weights)
        terms.total.backward()
        found.append([*terms[:3], *terms.statistics, z.grad])
    assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------- weight, subclasses


@pytest.mark.slow_cases("triton-(1, 1)", "triton-number")
@pytest.mark.parametrize(
    "weight",
    [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64), torch.tensor([[0.25]])],
    ids=["number", "0-dim", "(1,)", "float64", "(1, 1)"],
)
@EVERY_IMPL
def test_a_weight_of_one_element(impl, weight):
    logits, features, target = problem(dtype=torch.float32)
    result = rplib.MutualObjective(impl=impl)(logits, features, target, weight)
    exact = rplib.MutualObjective(impl=impl)(logits, features, target, 0.25)
    assert result.total.dtype == torch.float32 and result.total.shape == ()
    torch.testing.assert_close(result.total, exact.total, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("weight", "error"),
    [(torch.ones(2), ValueError), (torch.ones(0), ValueError), ("0.1", TypeError), (None, TypeError), (True, TypeError),
     (torch.tensor(True), TypeError), (torch.tensor(1j), TypeError), ([0.1], TypeError)],
    ids=str,
)  # fmt: skip
@EVERY_IMPL
def test_a_weight_that_is_none(impl, weight, error):
    logits, features, target = problem(dtype=torch.float32)
    with pytest.raises(error, match="consistency_weight"):
        rplib.MutualObjective(impl=impl)(logits, features, target, weight)


def test_numbers_of_numpy_are_weights():
    numpy = pytest.importorskip("numpy")
    logits, features, target = problem(dtype=torch.float32)
    a, b = (rplib.MutualObjective()(logits, features, target, w).total for w in (numpy.float32(0.25), 0.25))
    assert torch.equal(a, b)


class Annotated(torch.Tensor):
    """A tensor with metadata, like MONAI's MetaTensor: every operation passes it on."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Annotated.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@EVERY_IMPL
def test_tensors_with_notes_are_taken_as_what_they_are(impl):
    logits, features, target = problem(dtype=torch.float32)
    mask = torch.ones(4, 7, 5, 3, dtype=torch.bool, device=DEVICE).as_subclass(Annotated)
    plain, gradients = run(rplib.MutualObjective(impl=impl), logits, features, target, 0.3)
    noted = [z.as_subclass(Annotated) for z in leaves(logits)]
    given = [f.as_subclass(Annotated) for f in features]
    terms = rplib.MutualObjective(impl=impl)(noted, given, target.as_subclass(Annotated), 0.3, mask=mask)
    assert all(type(t) is torch.Tensor for t in terms) and torch.equal(terms.total.detach(), plain.total.detach())
    again = leaves(logits)
    before = Annotated.calls
    rplib.functional.reliable_mutual_loss([z.as_subclass(Annotated) for z in again], given, impl=impl).backward()
    assert Annotated.calls - before < 80, "the loss itself must not run through the subclass"
    assert gradients[0].shape == again[0].grad.shape
    assert all(type(m.weight) is torch.Tensor for m in rplib.reliability(noted, given, impl=impl))


# ------------------------------------------------------------------------------------------------- -inf


@pytest.mark.parametrize("check", [False, True])
@EVERY_IMPL
def test_a_class_that_is_ruled_out_costs_nothing_where_nobody_teaches(impl, check):
    """A student with -inf for the pseudo-label: infinite where it is taught, as the formula says; 0 elsewhere, in every form."""
    logits = [torch.tensor([[[9.0, 1.0], [-9.0, -1.0]]], device=DEVICE), torch.tensor([[[0.2, 3.0], [0.4, -3.0]]], device=DEVICE)]
    logits[0][0, 1, 0] = -torch.inf  # network 0 is certain of class 0 there; the unsure network 1 says class 1
    features = [torch.ones(1, 3, 2, device=DEVICE)] * 2
    loss = rplib.functional.reliable_mutual_loss(logits, features, impl=impl, check_finite=check)
    logits[0][0, 1, 0] = -80.0
    same = rplib.functional.reliable_mutual_loss(logits, features, impl=impl)
    assert loss.isfinite() and abs(loss.item() - same.item()) <= 1e-6 * abs(same.item())
