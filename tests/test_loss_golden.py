"""Each implementation against vectors made by running the authors' published training step in float64."""

import numpy as np
import pytest
import torch
from data_paths import golden_dir
from loss_cases import ANY_K_IMPLS, DEVICE, FAST_IMPLS, IMPLS
from truth import autograd_gradients, compare, evaluate, own_masks, truth

import rplib

NAMES = [
    "binary_f16",
    "odd_shape",
    "four_classes",
    "features_not_power_of_two",
    "confident_logits",
    "saturated_logits",
    "class_never_predicted",
    "identical_networks",
    "zero_features",
    "half_representable",
]
# All but the one whose stored numbers hang on the order of entropies that differ by less than 1e-13.
COMPARABLE = [name for name in NAMES if name != "saturated_logits"]


class Golden:
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        with np.load(golden_dir() / f"{name}.npz") as file:
            self.stored = {key: torch.from_numpy(np.asarray(file[key])).to(DEVICE) for key in file.files}
        self.logits = [self.stored[f"logits_{k}"].to(dtype) for k in range(2)]
        self.features = [self.stored[f"features_{k}"].to(dtype) for k in range(2)]
        self.loss = self.stored["consistency_loss"]
        self.gradients = [self.stored[f"grad_consistency_{k}"] for k in range(2)]

    def pair(self, student: int, teacher: int, name: str) -> torch.Tensor:
        return self.stored[f"student{student}_teacher{teacher}_{name}"]


def record_near_ties(record_property, pairs) -> None:
    """Shown at the end of the run."""
    near, voxels = sum(int(pair.near_tie.sum()) for pair in pairs), sum(pair.near_tie.numel() for pair in pairs)
    record_property("near_ties", f"{near} of {voxels}")


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    error, scale = (ours.double() - exact).norm().item(), exact.norm().item()
    return error / scale if scale else error


@pytest.mark.parametrize("name", COMPARABLE)
def test_our_truth_equals_the_golden_vectors(name):
    """The float64 truth of these tests is itself checked: loss, gradient by formula and by autograd, every map."""
    golden = Golden(name, torch.float64)
    ours = truth(golden.logits, golden.features)
    assert relative(ours.loss, golden.loss) <= 1e-8
    for k, by_autograd in enumerate(autograd_gradients(golden.logits, ours.pairs)):
        assert relative(ours.gradients[k], golden.gradients[k]) <= 1e-8
        assert relative(by_autograd, ours.gradients[k]) <= 1e-13
    for pair in ours.pairs:
        assert torch.equal(pair.mask, golden.pair(pair.student, pair.teacher, "mask").bool())
        for map_name in ("weight", "prototypes", "similarity", "cross_entropy"):
            expected = golden.pair(pair.student, pair.teacher, map_name)
            torch.testing.assert_close(getattr(pair, map_name), expected, rtol=1e-12, atol=1e-12, msg=map_name)


@pytest.mark.parametrize("name", COMPARABLE)
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_loss_and_gradient_in_float32(impl, name):
    """Straight against the stored numbers: these vectors hold no near-tie, or both networks are equal."""
    golden = Golden(name, torch.float32)
    loss, gradients = evaluate(impl, golden.logits, golden.features)
    assert relative(loss, golden.loss) <= 1e-6
    for ours, expected in zip(gradients, golden.gradients, strict=True):
        assert relative(ours, expected) <= 1e-6


@pytest.mark.parametrize("name", COMPARABLE)
@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_loss_and_gradient_in_float64(impl, name):
    golden = Golden(name, torch.float64)
    loss, gradients = evaluate(impl, golden.logits, golden.features)
    assert relative(loss, golden.loss) <= 1e-8
    for ours, expected in zip(gradients, golden.gradients, strict=True):
        assert relative(ours, expected) <= 1e-8


@pytest.mark.parametrize("name", COMPARABLE)
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [(NAME, torch.float64, 1e-12) for NAME in ANY_K_IMPLS] + [("triton", torch.float32, 2e-6), ("torch", torch.float32, 2e-6)],
)
def test_maps(impl, dtype, tolerance, name):
    golden = Golden(name, dtype)
    for ours in rplib.reliability(golden.logits, golden.features, impl=impl):
        assert torch.equal(ours.mask, golden.pair(ours.student, ours.teacher, "mask").bool())
        for map_name in ("weight", "prototypes", "similarity"):
            expected = golden.pair(ours.student, ours.teacher, map_name)
            torch.testing.assert_close(getattr(ours, map_name).double(), expected, rtol=0, atol=tolerance, msg=map_name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_by_the_near_tie_rule(impl, name, record_property):
    golden = Golden(name, torch.float32)
    result = compare(impl, golden.logits, golden.features)
    record_near_ties(record_property, result.truth.pairs)
    result.check(1e-6)
    result.check_maps(2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_logits_outside_near_ties(impl, record_property):
    """Both networks almost certain: 83 near-ties of 432 voxels; everywhere else the stored mask and weight hold."""
    dtype = torch.float64 if impl == "naive" else torch.float32
    golden = Golden("saturated_logits", dtype)
    maps = rplib.reliability(golden.logits, golden.features, impl=impl)
    pairs = truth(golden.logits, golden.features, masks=own_masks(maps)).pairs
    record_near_ties(record_property, pairs)
    assert [int(pair.near_tie.sum()) for pair in pairs] == [83, 83]
    for ours, exact in zip(maps, pairs, strict=True):
        clear = ~exact.near_tie
        assert torch.equal(ours.mask[clear], golden.pair(ours.student, ours.teacher, "mask").bool()[clear])
        expected = golden.pair(ours.student, ours.teacher, "weight")[clear]
        torch.testing.assert_close(ours.weight.double()[clear], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["binary_f16", "half_representable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_half_precision_input_that_is_exact(impl, dtype, name):
    """half_representable loses nothing in float16: its loss is the stored one. Elsewhere the rounded input has its own truth."""
    golden = Golden(name, dtype)
    result = compare(impl, golden.logits, golden.features)
    assert result.loss_error <= 1e-6
    if name == "half_representable" and dtype == torch.float16:
        assert relative(result.loss, golden.loss) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("naive", torch.float64, 1e-12),
        ("torch", torch.float64, 1e-12),
        ("torch", torch.float32, 1e-6),
        ("triton", torch.float32, 1.1e-6),  # saturated logits: differences of 50 alone carry a rounding error of 1.9e-6
    ],
)
def test_mutual_objective(impl, dtype, tolerance, name):
    """The stored Dice term: class 1 alone, sum over networks, over the labelled samples; and its gradient."""
    golden = Golden(name, dtype)
    labelled = int(golden.stored["labeled_batch"])
    target = golden.stored["labels"][:labelled]
    logits = [z.requires_grad_() for z in golden.logits]
    objective = rplib.MutualObjective(dice_weight=0.5, dice_classes=(1,), impl=impl)

    total, dice, mutual = objective(logits, golden.features, target, 0.0)
    assert not dice.requires_grad and not mutual.requires_grad
    assert relative(dice, golden.stored["dice_loss"]) <= tolerance
    assert relative(total, 0.5 * golden.stored["dice_loss"]) <= tolerance
    gradients = torch.autograd.grad(total, logits)
    for k in range(2):
        assert relative(gradients[k], 0.5 * golden.stored[f"grad_dice_{k}"]) <= tolerance

    if name == "saturated_logits":
        return
    tolerance = max(tolerance, 1e-8)
    result = objective(logits, golden.features, target, 0.3)
    assert relative(result.mutual, golden.loss) <= tolerance
    assert relative(result.total, 0.5 * golden.stored["dice_loss"] + 0.3 * golden.loss) <= tolerance
    gradients = torch.autograd.grad(result.total, logits)
    for k in range(2):
        expected = 0.5 * golden.stored[f"grad_dice_{k}"] + 0.3 * golden.gradients[k]
        assert relative(gradients[k], expected) <= tolerance
