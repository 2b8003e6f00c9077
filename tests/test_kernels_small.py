"""The kernels in blocks of a few voxels: whole blocks, tails, several programs and blocks of features in a fraction of a second.

Blocks are sized for a GPU, so that few voxels lie in one block, which is all tail. Here blocks are made small instead. Loss,
maps, Dice and gradients against the formula in float64; the most telling cases first.
"""

import pytest
import torch
from loss_cases import DEVICE, HAS_TRITON, channels_last, networks, spatial_slice, transposed
from test_loss_objective import expected, run
from truth import compare, evaluate, own_masks, truth

import rplib

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from rplib.kernels import launch, tiling

pytestmark = pytest.mark.slow  # made for mutants of the kernels; the default suite has larger cases of each

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """16 voxels a block (32 where a sector holds more), two blocks of features, two programs a sample."""
    statistics, weighting, gradient = tiling.statistics_tiles, tiling.weighting_tiles, tiling.gradient_tiles

    def small_statistics(*sizes, **traits):
        tiles = statistics(*sizes, **traits)
        if tiles.dot:  # the product of matrices has a least size
            return tiles._replace(block=16 * tiles.vector, feature_block=16)
        return tiles._replace(block=16 * tiles.vector if tiles.vector == 1 else 4 * tiles.vector, feature_block=4)

    def small_weighting(*sizes, **traits):
        tiles = weighting(*sizes, **traits)
        return tiles._replace(groups=2, feature_block=2)

    monkeypatch.setattr(tiling, "statistics_tiles", small_statistics)
    monkeypatch.setattr(tiling, "weighting_tiles", small_weighting)
    monkeypatch.setattr(tiling, "gradient_tiles", lambda *sizes, **traits: gradient(*sizes, **traits)._replace(groups=2))
    monkeypatch.setattr(launch, "_PROGRAMS_WITHOUT_GPU", 2)


def check_loss(logits, features, tolerance=1e-6, **keywords):
    result = compare("triton", logits, features, **keywords)
    result.check(tolerance, 1e-6 if logits[0].dtype == F32 else 4e-3)
    result.check_maps(2e-6)
    assert result.truth.loss > 0.05 and all(pair.mask.any() for pair in result.truth.pairs)


def check_objective(logits, features, target, dice_classes, weight=0.3, dice_weight=0.7, **keywords):
    """Values and gradients of the whole objective, with the masks that the maps show."""
    objective = rplib.MutualObjective(dice_weight=dice_weight, dice_classes=dice_classes, impl="triton", **keywords)
    result, gradients = run(objective, logits, features, target, weight)
    masks = own_masks(rplib.reliability(logits, features, impl="triton", **keywords))
    chosen = dice_classes or range(1, logits[0].shape[1])
    number = weight.item() if isinstance(weight, torch.Tensor) else weight
    *values, exact = expected(logits, features, target, number, chosen, dice_weight, masks=masks, **keywords)
    for ours, value in zip(result, values, strict=True):
        assert abs(ours.item() - value.item()) <= 1e-6 * max(abs(value.item()), 0.1)
    for g, h in zip(gradients, exact, strict=True):
        assert (g.double() - h).norm() <= (1e-6 if g.dtype == F32 else 3e-3) * h.norm()


def labels(classes, *shape):
    return torch.randint(0, classes, shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(9))


def test_two_classes():
    check_loss(*networks((21,), 2, 6, seed=1))


def test_three_classes_channels_last():
    logits, features = networks((21,), 3, [6, 5], seed=2)
    check_loss([channels_last(z) for z in logits], [channels_last(f) for f in features])


def test_objective_of_two_classes_with_some_labels():
    logits, features = networks((3, 7), 2, [5, 6], batch=2, seed=3)
    check_objective(logits, features, labels(2, 1, 3, 7), None, torch.tensor(0.3, device=DEVICE))


def test_objective_of_four_classes_with_some_labels():
    logits, features = networks((3, 7), 4, 3, batch=2, seed=4)
    check_objective([transposed(z) for z in logits], features, labels(4, 1, 1, 3, 7), (0, 3))


def test_many_classes_by_products_of_matrices():
    logits, features = networks((21,), 5, [18, 3], seed=5)
    check_loss(logits, features, confidence="max_probability", cross_entropy_on="probabilities")


def test_objective_of_many_classes():
    logits, features = networks((21,), 5, 3, batch=2, seed=15)
    target = labels(5, 1, 21).to(torch.uint8)
    check_objective([channels_last(z) for z in logits], [channels_last(f) for f in features], target, (2, 4))


@pytest.mark.parametrize("classes", [2, 3])
def test_both_networks_learn_everywhere(classes):
    logits, features = networks((21,), classes, 5, seed=6)
    check_loss(logits, features, upstream=-2.5, confidence=None)
    check_objective(logits, features, labels(classes, 1, 21), None, confidence=None, cross_entropy_on="probabilities")


def test_voxels_in_multiples_of_sixteen():
    check_loss(*networks((2, 4, 8), 2, 8, feature_dtype=BF16, seed=7))
    logits, features = networks((32,), 3, 4, batch=2, seed=8)
    check_objective(logits, features, labels(3, 1, 32), (1, 2), confidence="max_probability")


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision_with_one_load_for_both_teachers(dtype):
    logits, features = networks((3, 4, 5), 2, 7, dtype=dtype, seed=9)
    last = torch.channels_last_3d
    check_loss([z.contiguous(memory_format=last) for z in logits], [f.contiguous(memory_format=last) for f in features])


def test_axes_that_do_not_collapse():
    logits, features = networks((3, 4, 5), 2, 4, batch=2, seed=10)
    target = labels(2, 2, 5, 4, 3).permute(0, 3, 2, 1)
    check_objective([spatial_slice(z) for z in logits], [spatial_slice(f) for f in features], target, (0, 1))
    logits, features = networks((3, 4, 5), 3, 4, seed=11)
    gapped = [torch.stack([channels_last(z), z], -1)[..., 0] for z in logits]
    check_loss([gapped[0], transposed(gapped[1])], [spatial_slice(channels_last(f)) for f in features], eps=0.1)


def test_no_features():
    for classes, keywords in ((2, {"cross_entropy_on": "probabilities"}), (4, {}), (3, {"confidence": None})):
        check_loss(*networks((21,), classes, 5, seed=12), weighting=None, **keywords)


@pytest.mark.parametrize("where", ["logits of the last voxel", "features of the last channel", "second network's logits"])
def test_a_nan_anywhere_reaches_the_loss_and_both_gradients(where):
    logits, features = networks((21,), 3, 6, seed=13)
    tensor, index = {
        "logits of the last voxel": (logits[0], (1, 2, 20)),
        "features of the last channel": (features[1], (0, 5, 20)),
        "second network's logits": (logits[1], (1, 0, 17)),
    }[where]
    tensor[index] = float("nan")
    z = [t.requires_grad_() for t in logits]
    loss = rplib.functional.reliable_mutual_loss(z, features, impl="triton")
    loss.backward()
    assert loss.isnan() and all(t.grad.isnan().any() for t in z)


def test_confident_voxels_keep_their_order_and_their_gradient():
    """Margins of 20 and more, and margins that differ by less than float32 shows: by sign, by error, by either network."""
    logits, features = networks((21,), 2, 5, scale=15.0, seed=14)
    check_loss(logits, features)
    logits, features = networks((21,), 4, 5, scale=12.0, batch=1, seed=16)
    exact = truth(logits, features)
    check_loss(logits, features)
    assert exact.near_ties < 21


def test_a_weight_that_is_learnt_and_an_upstream_factor():
    logits, features = networks((21,), 3, 4, seed=17)
    target = labels(3, 2, 21)
    weight = torch.tensor(0.4, device=DEVICE, requires_grad=True)
    z = [t.requires_grad_() for t in logits]
    result = rplib.MutualObjective(impl="triton")(z, features, target, weight)
    (-3 * result.total).backward()
    exact = expected(logits, features, target, 0.4, (1, 2))[3]
    for t, g in zip(z, exact, strict=True):
        assert (t.grad.double() + 3 * g).norm() <= 1e-6 * (3 * g).norm()
    torch.testing.assert_close(weight.grad, -3 * result.mutual)


@pytest.mark.parametrize("confidence", ["max_probability", None])
def test_the_gradient_of_certain_voxels_sums_to_zero_over_classes(confidence):
    """To units in the last place, where the exponentials are 1e-22 to 1e-27: an exponential in base 2 would be off by ten."""
    logits, features = networks((21,), 3, 4, seed=18)
    for z in logits:
        z.copy_(-50 - 12 * torch.rand(z.shape, device=DEVICE))
        z[:, 1] = 0.0
    _, gradients = evaluate("triton", logits, features, confidence=confidence)
    size = torch.stack(gradients).double().abs().amax(2)  # (networks, B, V)
    assert (size > 1e-30).sum() >= 21
    assert (torch.stack(gradients).double().sum(2).abs() <= 5e-7 * size).all()
