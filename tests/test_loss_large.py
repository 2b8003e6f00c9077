"""The loss beyond the usual sizes: samples of several pieces, many classes, values at the edge of float32."""

import pytest
import torch
from loss_cases import DEVICE, FAST_IMPLS, IMPLS, TORCH, TRITON, networks
from test_loss_objective import assert_right, expected, run
from test_loss_values import OPTIONS, check, option_name

import rplib
from rplib import lean_voxels


@pytest.mark.parametrize("piece", [1, 7, 8, 55, 56, 57, 112, 1000])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=option_name)
def test_pieces_of_the_lean_form_change_nothing(monkeypatch, options, piece):
    """56 voxels a sample, 3 samples: pieces within samples, samples together, and one piece for all."""
    monkeypatch.setattr(lean_voxels, "_PIECE_CPU", piece)
    monkeypatch.setattr(lean_voxels, "_PIECE_ELSEWHERE", piece)
    check(TORCH, *networks((8, 7), 3, 5, batch=3, seed=3), **options)
    check(TORCH, *networks((8, 7), 2, 5, batch=3, seed=3), **options)


@pytest.mark.parametrize("voxels", [lean_voxels._PIECE_CPU, lean_voxels._PIECE_CPU + 1])
def test_more_voxels_than_a_piece(voxels):
    check(TORCH, *networks((voxels,), 2, 1, batch=1, seed=4))


def test_pieces_cover_every_voxel_of_every_sample_once():
    for batch, voxels in ((1, 1), (3, 5), (2, lean_voxels._PIECE_CPU + 1), (5, lean_voxels._PIECE_CPU // 2)):
        seen = torch.zeros(batch, voxels, dtype=torch.int8)
        for b, pieces in lean_voxels.pieces(batch, voxels, torch.device("cpu")):
            for v in pieces:
                assert seen[b, v].numel() <= max(lean_voxels._PIECE_CPU, 1)
                seen[b, v] += 1
        assert (seen == 1).all()


@pytest.mark.slow_cases("triton-33")
@pytest.mark.parametrize(
    ("impl", "classes"),
    [
        *((TORCH, c) for c in (31, 32, 33, 40, 65)),
        pytest.param("triton", 33, marks=TRITON.marks),
        pytest.param("triton", 64, marks=[*TRITON.marks, pytest.mark.slow]),
    ],
)
def test_many_classes(impl, classes):
    """Loss, maps and the gradient, element by element where an error of one class would drown in the norm."""
    result = check(impl, *networks((7,), classes, 3, batch=2, seed=classes))
    for ours, exact in zip(result.gradients, result.truth_gradients, strict=True):
        for c in range(classes):
            scale = exact[:, c].norm() + 1e-3 * exact.norm()
            assert (ours[:, c].double() - exact[:, c]).norm() <= 1e-5 * scale, c


@pytest.mark.parametrize("classes", [40])
@pytest.mark.parametrize("impl", IMPLS)
def test_dice_of_many_classes(impl, classes):
    logits, features = networks((7,), classes, 3, batch=3)
    target = torch.randint(0, classes, (2, 7), device=DEVICE)
    target[0] = torch.arange(7, device=DEVICE) + classes - 7  # the last classes are there
    objective = rplib.MutualObjective(dice_weight=0.7, impl=impl)
    result, gradients = run(objective, logits, features, target, 0.3)
    assert_right(result, gradients, expected(logits, features, target, 0.3, range(1, classes), 0.7))


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_feature_whose_square_overflows_is_not_taken_for_a_dissimilar_one(impl):
    """In the second pass, where it belongs to a voxel that a prototype of finite numbers is compared with."""
    logits, features = networks((9, 8), 3, 6)
    features[0][0, :, 0] = 1e30  # eight voxels, some of which teach; the square is infinite in float32, the sum is not
    loss = rplib.functional.reliable_mutual_loss(logits, features, impl=impl)
    assert not loss.isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["logits", "features"])
def test_a_value_that_is_not_finite_reaches_the_gradient_too(where, bad):
    """Of all voxels, so that no optimiser step is taken on half of a batch."""
    logits, features = networks((5, 4), 3, 6)
    (logits if where == "logits" else features)[1][1, 1, 2, 2] = bad
    z = [t.requires_grad_() for t in logits]
    loss = rplib.functional.reliable_mutual_loss(z, features, impl=TORCH)
    loss.backward()
    assert loss.isnan()
    assert all(t.grad.isnan().all() for t in z)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("sign", [1, -1])
def test_margins_that_round_to_the_same_number_are_distinguished(impl, sign):
    """Two classes: 1 - (-2**-30) rounds to 1 in float32; the second network is the more confident one all the same."""
    z = [torch.tensor([[[0.0], [1.0]]], device=DEVICE), torch.tensor([[[-(2.0**-30)], [1.0]]], device=DEVICE)]
    z = [t if sign == 1 else t.flip(1) for t in z]
    features = [torch.ones(1, 2, 1, device=DEVICE)] * 2
    first, second = rplib.reliability(z, features, impl=impl)
    assert (first.student, first.teacher, first.mask.item()) == (0, 1, True)
    assert (second.student, second.teacher, second.mask.item()) == (1, 0, False)
    tie = rplib.reliability([z[0], z[0].clone()], features, impl=impl)
    assert not any(pair.mask.item() for pair in tie)
