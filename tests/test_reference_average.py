"""Averaged weights, learning-rate schedules, warm-up, and the packed convolutions of a CPU training."""

import csv
import math

import pytest
import torch
from reference_tools import TINY, mistake, write_dataset

from rplib import cli, ramp
from rplib.reference import checkpoint
from rplib.reference.config import load_recipe
from rplib.reference.network import MutualVNet
from rplib.reference.reporting.run_log import read_metrics
from rplib.reference.training import trainer
from rplib.reference.training.packed import pack

AVERAGED = [*TINY, "iterations=23", "checkpoint_every=7", "average=0.9"]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root)
    return root


def train(data, run, *overrides, resume=False):
    trainer.train(load_recipe("la-4", [*AVERAGED, *overrides]), data, run, device="cpu", resume=resume)
    return checkpoint.load(run / "last.pt")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run folder, its last checkpoint, and what the network's weights were after every tenth step."""
    run, seen = tmp_path_factory.mktemp("runs") / "whole", []
    genuine, calls = trainer.training_step, iter(range(1, 100))

    def step(network, *rest):
        terms = genuine(network, *rest)
        if next(calls) % 10 == 0:
            seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", step)
        patch.setattr(trainer, "write_curves", lambda _: None)
        last = train(data, run)
    return run, last, seen


def test_the_average_is_the_exponential_one_of_weights_and_batch_statistics(finished):
    run, last, (first, second) = finished
    assert last["averaged"].keys() == last["network"].keys()
    for key, value in last["averaged"].items():
        if value.is_floating_point():  # every 10 iterations, so with 0.9^10
            wanted = first[key] + (1 - 0.9**10) * (second[key] - first[key])
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-7), key
            if "running_mean" in key:
                assert not torch.equal(value, second[key])
    best = checkpoint.load(run / "best.pt")
    assert best["chosen_by"] == "last iteration, averaged weights"
    assert same(best["network"], last["averaged"])


def test_averaging_changes_nothing_of_the_training(finished, data, tmp_path):
    without = train(data, tmp_path / "run", "average=0")
    assert same(without["network"], finished[1]["network"])
    assert "averaged" not in without


@pytest.mark.parametrize("stopped", [9, 16])
def test_averages_survive_an_interruption_to_the_bit(finished, data, tmp_path, monkeypatch, stopped):
    genuine, calls = trainer.training_step, iter(range(1, 100))

    def step(*arguments):
        if next(calls) == stopped:
            raise KeyboardInterrupt
        return genuine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "run")
    resumed = train(data, tmp_path / "run", resume=True)
    assert same(resumed["averaged"], finished[1]["averaged"])
    assert same(resumed["network"], finished[1]["network"])
    assert same(checkpoint.load(tmp_path / "run" / "best.pt")["network"], finished[1]["averaged"])


def test_validation_scores_the_averaged_weights(data, tmp_path, monkeypatch):
    seen = []

    def dice(network, cases, *_):
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return [0.5 for _ in cases]

    monkeypatch.setattr(trainer, "case_dice", dice)
    last = train(data, tmp_path / "run", "validation=1", "validate_from=100")
    assert same(seen[-1], last["averaged"])
    assert not same(seen[-1], last["network"])


def test_evaluate_scores_the_last_weights_beside_the_averaged(finished, data, tmp_path, capsys):
    run, *_ = finished

    def scores(*argv):
        out = tmp_path / "scores"
        argv = ["evaluate", run, "--data", data, "--out", out, "--pictures", "0", "--nifti", "none", *argv]
        assert cli.main([str(word) for word in argv]) == 0
        with open(out / "scores.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        found = {}
        for row in rows:
            found.setdefault(row["method"], []).append((row["case"], row["dice"], row["hd95"]))
        return found

    both, last, averaged = scores(), scores("--weights", "last"), scores("--weights", "averaged")
    assert both == averaged
    assert both["decoder 1, last weights"] == last["decoder 1"]
    assert "decoder 1, last weights" not in last
    line = mistake(capsys, "evaluate", run.parent / "plain", "--data", data)
    assert "no run folder" in line


def test_a_run_without_averaged_weights_says_how_to_get_them(data, tmp_path, capsys):
    train(data, tmp_path / "run", "average=0", "iterations=2")
    line = mistake(capsys, "evaluate", tmp_path / "run", "--data", data, "--weights", "averaged")
    assert "has no averaged weights; train with average=0.99, or use --weights best or last" in line


def test_rates_and_weights_follow_their_schedules(data, tmp_path):
    train(data, tmp_path / "run", "schedule=cosine", "warmup=5", "average=0", "ramp_length=4", "consistency=0.5")
    for row in read_metrics(tmp_path / "run" / "metrics.csv"):
        t = row.iteration
        assert row.learning_rate == pytest.approx(0.01 * (1 + math.cos(math.pi * (t - 1) / 23)) / 2, rel=1e-12)
        assert row.consistency_weight == (0 if t <= 5 else 0.5 * ramp(t - 5, 4, 2))


@pytest.mark.parametrize(("shape", "filters"), [((2, 1, 32, 16, 48), 4), ((1, 2, 32, 48), 8), ((2, 1, 16, 16, 16), 16)])
def test_packed_convolutions_are_the_same_sums(shape, filters):
    torch.manual_seed(0)
    network = MutualVNet(shape[1], 3, filters, dropout=0.0, dims=len(shape) - 2).double()
    image = torch.randn(*shape, dtype=torch.float64)

    def gradients():
        network.zero_grad()
        logits, features = network(image)
        (logits[0].sin().sum() + (logits[1] * logits[0]).mean() + features[1].mean()).backward()
        return logits, {name: weight.grad.clone() for name, weight in network.named_parameters()}

    names = list(network.state_dict())
    logits, wanted = gradients()
    packed_logits, found = pack(network) and gradients()
    assert list(network.state_dict()) == names
    for a, b in zip(logits, packed_logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name in wanted:
        assert torch.allclose(wanted[name], found[name], rtol=1e-8, atol=1e-10 * largest), name


def test_a_packed_convolution_takes_an_odd_size():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3, padding=1)).double()
    x = torch.randn(2, 2, 5, 4, 1, dtype=torch.float64)
    wanted = layer(x)
    assert torch.equal(pack(layer)(x), wanted)
    assert torch.allclose(layer(x[:, :, :4]), torch.nn.functional.conv3d(x[:, :, :4], layer[0].weight, layer[0].bias, padding=1))


# ------------------------------------------------------------------------------------------------------- await_classes


def awaiting(data, run, monkeypatch, known_from, *overrides, resume=False, stop=None):
    """A training whose decoders predict class 1 from that iteration on, by made-up statistics."""
    genuine = trainer.training_step
    calls = iter(range(1 if not resume else stop, 1000))

    def step(*arguments):
        t = next(calls)
        if t == stop and not resume:
            raise KeyboardInterrupt
        shares = [[0.9, 0.1] if t >= known_from else [1.0, 0.0]] * 2
        return *genuine(*arguments)[:3], *map(torch.tensor, ([0.5, 0.5], [1.0, 1.0], [0.1, 0.1], shares, 0.0))

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", step)
        return train(data, run, "await_classes=true", "iterations=60", "checkpoint_every=5", *overrides, resume=resume)


def test_the_ramp_up_waits_until_every_class_is_predicted(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_AWAIT_EVERY", 10)
    last = awaiting(data, tmp_path / "run", monkeypatch, 21, "ramp_length=4")
    assert last["ramp_from"] == 30  # the window 21..30 is the first in which the class is there
    for row in read_metrics(tmp_path / "run" / "metrics.csv"):
        assert row.consistency_weight == (0 if row.iteration <= 30 else ramp(row.iteration - 30, 4, 2))
    never = awaiting(data, tmp_path / "never", monkeypatch, 1000)
    assert never["ramp_from"] is None
    assert {row.consistency_weight for row in read_metrics(tmp_path / "never" / "metrics.csv")} == {0.0}


@pytest.mark.slow_cases("26", "42")  # not slow as a whole: mutants have to face it
@pytest.mark.parametrize("stop", [26, 42])  # in the window that decides, and after it: the checkpoints are of 25 and 40
def test_waiting_survives_an_interruption_to_the_bit(data, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(trainer, "_AWAIT_EVERY", 10)
    whole = awaiting(data, tmp_path / "whole", monkeypatch, 21)
    with pytest.raises(KeyboardInterrupt):
        awaiting(data, tmp_path / "parts", monkeypatch, 21, stop=stop)
    at = checkpoint.load(tmp_path / "parts" / "last.pt")["iteration"]
    parts = awaiting(data, tmp_path / "parts", monkeypatch, 21, "log_every=7", resume=True, stop=at + 1)
    assert parts["ramp_from"] == whole["ramp_from"] == 30
    assert same(parts["network"], whole["network"])
    assert same(parts["averaged"], whole["averaged"])
