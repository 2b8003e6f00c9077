"""Mistakes of the caller: one clear sentence that names the argument, what was given and what was expected."""

import pytest
import torch
from loss_cases import DEVICE, HAS_TRITON, IMPLS, networks

import rplib

CALLS = {
    "loss": lambda z, f, **keywords: rplib.functional.reliable_mutual_loss(z, f, **keywords),
    "module": lambda z, f, **keywords: rplib.ReliableMutualLoss(**keywords)(z, f),
    "maps": lambda z, f, **keywords: rplib.reliability(z, f, **keywords),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
EVERY_IMPL = pytest.mark.parametrize("impl", [*IMPLS, "auto"])


@EVERY_CALL
@EVERY_IMPL
def test_logits_of_different_shape(call, impl):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(
        ValueError, match=r"logits\[1\].*\(2, 3, 5, 3\).*\(2, 3, 5, 4\)|\(2, 3, 5, 4\).*logits\[1\].*\(2, 3, 5, 3\)"
    ):
        call([logits[0], logits[1][..., :3]], features, impl=impl)


@EVERY_CALL
@EVERY_IMPL
@pytest.mark.parametrize(
    ("spatial", "batch", "text"),
    [
        ((5, 3), 2, r"\(2, 6, 5, 3\)"),
        ((5, 4), 1, r"\(1, 6, 5, 4\)"),
        ((20,), 2, r"\(2, 6, 20\)"),
        ((5, 4, 1), 2, r"\(2, 6, 5, 4, 1\)"),
    ],
)
def test_features_that_do_not_fit_the_logits(call, impl, spatial, batch, text):
    logits, features = networks((5, 4), 3, 6)
    _, others = networks(spatial, 3, 6, batch=batch)
    with pytest.raises(ValueError, match=rf"features\[1\].*{text}"):
        call(logits, [features[0], others[1]], impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_number_of_networks(call, impl):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(ValueError, match=r"logits.*1"):
        call(logits[:1], features[:1], impl=impl)
    with pytest.raises(ValueError, match=r"logits"):
        call([], [], impl=impl)
    with pytest.raises(ValueError, match=r"features.*(1.*2|2.*1)"):
        call(logits, features[:1], impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_one_tensor_in_place_of_a_list(call, impl):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(TypeError, match=r"logits.*[Tt]ensor"):
        call(logits[0], features, impl=impl)
    with pytest.raises(TypeError, match=r"features.*[Tt]ensor"):
        call(logits, features[0], impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_something_that_is_no_tensor(call, impl):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(TypeError, match=r"logits\[1\].*ndarray"):
        call([logits[0], logits[1].cpu().numpy()], features, impl=impl)
    with pytest.raises(TypeError, match=r"features\[0\].*NoneType"):
        call(logits, [None, features[1]], impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_features_may_be_absent_only_without_weighting(call, impl):
    logits, _ = networks((5, 4), 3, 6)
    with pytest.raises((TypeError, ValueError), match=r"features.*weighting"):
        call(logits, None, impl=impl)


@EVERY_CALL
@EVERY_IMPL
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_logits_and_features_must_be_floating_point(call, impl, dtype):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(TypeError, match=rf"logits\[0\].*{str(dtype).removeprefix('torch.')}"):
        call([logits[0].to(dtype), logits[1]], features, impl=impl)
    with pytest.raises(TypeError, match=rf"features\[1\].*{str(dtype).removeprefix('torch.')}"):
        call(logits, [features[0], features[1].to(dtype)], impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_one_class_is_too_few(call, impl):
    logits, features = networks((5, 4), 1, 6)
    with pytest.raises(ValueError, match=r"logits.*class"):
        call(logits, features, impl=impl)


@EVERY_CALL
@EVERY_IMPL
@pytest.mark.parametrize("spatial", [(), (2, 2, 2, 2)], ids=str)
def test_one_to_three_spatial_axes(call, impl, spatial):
    logits, features = networks(spatial, 3, 6)
    with pytest.raises(ValueError, match=r"logits.*spatial"):
        call(logits, features, impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_no_feature_channel(call, impl):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(ValueError, match=r"features\[0\].*\(2, 0, 5, 4\)"):
        call(logits, [features[0][:, :0], features[1]], impl=impl)


@EVERY_CALL
@EVERY_IMPL
def test_tensors_on_two_devices(call, impl):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(ValueError, match=rf"logits\[1\].*meta.*{DEVICE.type}|{DEVICE.type}.*logits\[1\].*meta"):
        call([logits[0], logits[1].to("meta")], features, impl=impl)
    with pytest.raises(ValueError, match=r"features\[0\].*meta"):
        call(logits, [features[0].to("meta"), features[1]], impl=impl)


@EVERY_CALL
@pytest.mark.parametrize(
    ("keyword", "value", "listed"),
    [
        ("confidence", "margin", ["entropy", "max_probability", "None"]),
        ("weighting", "cosine", ["similarity", "None"]),
        ("cross_entropy_on", "scores", ["logits", "probabilities"]),
        ("impl", "cuda", ["auto", "triton", "torch", "naive"]),
    ],
)
def test_unknown_keyword_values_are_answered_with_the_known_ones(call, keyword, value, listed):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(ValueError, match=rf"{keyword}.*{value}") as error:
        call(logits, features, **{keyword: value})
    for word in listed:
        assert word in str(error.value)


@EVERY_CALL
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_eps_must_be_a_number_above_zero(call, eps):
    logits, features = networks((5, 4), 3, 6)
    with pytest.raises(ValueError, match="eps"):
        call(logits, features, eps=eps)
    with pytest.raises((TypeError, ValueError), match=r"eps.*small"):
        call(logits, features, eps="small")


def test_the_module_refuses_a_bad_keyword_when_it_is_made():
    with pytest.raises(ValueError, match="confidence"):
        rplib.ReliableMutualLoss(confidence="margin")
    with pytest.raises(ValueError, match="weighting"):
        rplib.MutualObjective(weighting="cosine")
    with pytest.raises(TypeError):
        rplib.ReliableMutualLoss(sharpness=2.0)


# ------------------------------------------------------------------------------------------------ impossible impl


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
class TestImpossibleTriton:
    """Why it cannot be, and what to use instead."""

    @EVERY_CALL
    def test_three_networks(self, call):
        logits, features = networks((5, 4), 3, 6, count=3)
        with pytest.raises(ValueError, match=r"(?s)triton.*3.*torch"):
            call(logits, features, impl="triton")

    @EVERY_CALL
    def test_float64(self, call):
        logits, features = networks((5, 4), 3, 6, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"(?s)triton.*float64.*torch"):
            call(logits, features, impl="triton")

    @EVERY_CALL
    def test_float64_features(self, call):
        logits, features = networks((5, 4), 3, 6, feature_dtype=torch.float64)
        with pytest.raises(ValueError, match=r"(?s)triton.*float64.*torch"):
            call(logits, features, impl="triton")


def test_auto_takes_the_lean_form_where_triton_cannot_serve():
    for kwargs in ({"count": 3}, {"dtype": torch.float64}):
        logits, features = networks((5, 4), 3, 6, **kwargs)
        auto = rplib.functional.reliable_mutual_loss(logits, features)
        assert torch.equal(auto, rplib.functional.reliable_mutual_loss(logits, features, impl="torch"))


def test_triton_on_a_cpu_without_the_interpreter(tmp_path):
    """In a process of its own, because Triton reads TRITON_INTERPRET once."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import torch, rplib\n"
        "z = [torch.randn(1, 2, 5), torch.randn(1, 2, 5)]\n"
        "f = [torch.randn(1, 3, 5), torch.randn(1, 3, 5)]\n"
        "loss = rplib.functional.reliable_mutual_loss\n"
        "assert torch.equal(loss(z, f), loss(z, f, impl='torch'))\n"
        "try:\n"
        "    loss(z, f, impl='triton')\n"
        "except ValueError as error:\n"
        "    print('refused:', error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") and "triton" in done.stdout and "cpu" in done.stdout.lower(), done.stdout
    assert "torch" in done.stdout


# --------------------------------------------------------------------------------------------------- MutualObjective


def objective_inputs():
    logits, features = networks((5, 4), 3, 6, batch=4)
    target = torch.randint(0, 3, (2, 5, 4), device=DEVICE)
    return logits, features, target


@pytest.mark.parametrize(
    ("target_of", "text"),
    [
        (lambda t: t[:, :3], r"target.*\(2, 3, 4\)"),
        (lambda t: t.repeat(3, 1, 1), r"target.*6"),
        (lambda t: t[:, None].repeat(1, 3, 1, 1), r"target.*\(2, 3, 5, 4\)"),
        (lambda t: t[0, 0], r"target.*\(4,\)"),
    ],
)
def test_target_of_the_wrong_shape(target_of, text):
    logits, features, target = objective_inputs()
    with pytest.raises(ValueError, match=text):
        rplib.MutualObjective()(logits, features, target_of(target), 0.1)


@pytest.mark.parametrize("classes", [(3,), (-1,), (), (1, 7)])
def test_dice_classes_outside_the_logits(classes):
    logits, features, target = objective_inputs()
    with pytest.raises(ValueError, match="dice_classes"):
        rplib.MutualObjective(dice_classes=classes)(logits, features, target, 0.1)


def test_target_on_another_device():
    logits, features, target = objective_inputs()
    with pytest.raises(ValueError, match=r"target.*meta"):
        rplib.MutualObjective()(logits, features, target.to("meta"), 0.1)
