"""What is prepared for a GPU, run here as far as it goes: the checks in the interpreter, the driver with other parts."""

import argparse
import csv
import sys

import pytest
import torch

pytest.importorskip("triton")

from rplib.bench import gpu, gpu_checks, sweep
from rplib.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
def test_same_bits(capsys):
    assert gpu_checks.identical(DEVICE, runs=2, spatial=(3, 2, 2), channels=((2, 16), (4, 5)))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * 2 * 6 and all("0 of 2 runs differ" in line for line in said)


def test_a_difference_of_one_bit_is_seen(monkeypatch):
    true = gpu_checks.gradients
    calls = []

    def unsteady(*arguments):
        calls.append(1)
        loss, *grads = true(*arguments)
        return [loss * (1 + 2**-23 * (len(calls) == 2)), *grads]

    monkeypatch.setattr(gpu_checks, "gradients", unsteady)
    assert not gpu_checks.identical(DEVICE, runs=2, spatial=(3, 2, 2), channels=((2, 16),))


def test_a_repeated_volume_has_the_loss_of_the_volume(capsys, monkeypatch):
    assert gpu_checks.large(DEVICE, spatial=(8, 8, 4), repeats=6)
    assert "24,576 elements" in capsys.readouterr().out
    true = gpu_checks.gradients

    def wrong(call, logits, features):  # as if voxels far away were not reached
        loss, *grads = true(call, logits, features)
        for g in grads:
            g[..., 1500:] = 0
        return [loss, *grads]

    monkeypatch.setattr(gpu_checks, "gradients", wrong)
    assert not gpu_checks.large(DEVICE, spatial=(8, 8, 4), repeats=6)


@pytest.mark.slow
def test_every_variant_once(capsys):
    assert gpu_checks.once(DEVICE, spatial=(3, 2, 2), channels=((2, 16), (3, 5)))
    assert len(capsys.readouterr().out.splitlines()) == 2 * 2 * 6


@pytest.mark.slow
def test_candidates_of_the_sweep_compute_the_same():
    logits, features = gpu_checks.networks(1, 2, 16, (9, 8, 7), torch.float32, DEVICE)
    import rplib

    loss_fn = rplib.ReliableMutualLoss(impl="triton")
    truth = gpu_checks.gradients(loss_fn, logits, features)
    seen = set()
    for function, chosen in sweep.candidates(4, channels_last=False):
        seen.add(function)
        with sweep.tiles(function, chosen):
            ours = gpu_checks.gradients(loss_fn, logits, features)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(ours, truth, strict=True)), (function, chosen)
    assert seen == {"statistics_tiles", "weighting_tiles", "gradient_tiles"}


# --------------------------------------------------------------------------------------------------------- the driver


def arguments(out, **changed):
    options = {"out": out, "parts": None, "data": None, "minutes": None, "again": False} | changed
    return argparse.Namespace(**options)


@pytest.fixture
def some_parts(monkeypatch, tmp_path):
    """A part that works, one that fails the first time, one that takes long, one whose tool is missing; and a GPU."""
    flag = tmp_path / "flag"
    code = f"import pathlib, sys; p = pathlib.Path({str(flag)!r}); sys.exit(0) if p.exists() else (p.touch(), sys.exit(3))"
    known = [
        gpu.Part("works", "prints", [sys.executable, "-c", "print('here')"]),
        gpu.Part("fails", "once", [sys.executable, "-c", code]),
        gpu.Part("missing", "no such tool", ["no-such-tool"], needs="no-such-tool"),
        gpu.Part("long", "sleeps", [sys.executable, "-c", "import time; time.sleep(60)"]),
    ]
    monkeypatch.setattr(gpu, "parts", lambda out, data: known)
    monkeypatch.setattr(gpu, "_versions", lambda: {"gpu": "a GPU", "torch": "1", "triton": "2", "commit": "abc"})
    return known


def results(out):
    with (out / "parts.csv").open(newline="") as file:
        return [(row["part"], row["result"], row["gpu"]) for row in csv.DictReader(file)]


def test_parts_are_kept_and_failures_repeated(some_parts, tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu.run(arguments(out, parts="works,fails,missing")) == 1
    assert results(out) == [("works", "good", "a GPU"), ("fails", "failed", "a GPU"), ("missing", "left out", "a GPU")]
    assert "here" in (out / "works.log").read_text()
    assert gpu.run(arguments(out, parts="works,fails")) == 0
    assert results(out)[3:] == [("fails", "good", "a GPU")]  # what worked was not run again
    assert gpu.run(arguments(out, parts="works", again=True)) == 0
    assert results(out)[4:] == [("works", "good", "a GPU")]


def test_a_limit_stops_a_part(some_parts, tmp_path):
    out = tmp_path / "out"
    assert gpu.run(arguments(out, parts="long,works", minutes=0.02)) == 0
    assert results(out) == [("long", "stopped", "a GPU")]  # and the next was not started


def test_mistakes(some_parts, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown part 'nothing'; expected one or more of works"):
        gpu.run(arguments(tmp_path, parts="nothing"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="part 'train-la-8' needs --data"):
        gpu.run(arguments(tmp_path, parts="train-la-8"))


def test_the_real_parts_begin_and_resume_trainings(tmp_path):
    names = [part.name for part in gpu.parts(tmp_path, None)]
    assert names[:5] == ["check", "tests", "identical", "large", "bench"] and len(set(names)) == len(names)
    training = {part.name: part for part in gpu.parts(tmp_path, tmp_path)}["train-la-8"]
    assert "--recipe" in training.command and "--resume" not in training.command
    (tmp_path / "la-8").mkdir()
    (tmp_path / "la-8" / "last.pt").touch()
    training = {part.name: part for part in gpu.parts(tmp_path, tmp_path)}["train-la-8"]
    assert "--resume" in training.command and "--recipe" not in training.command


def test_the_settings_of_trainings_and_profiles_exist(tmp_path):
    """A part that dies of a misspelt setting would be found out on a borrowed GPU."""
    from rplib.reference.config import load_recipe, parse_overrides

    for recipe, settings in (*gpu._TRAININGS.values(), *(("la-8", settings) for settings in gpu._PROFILES.values())):
        load_recipe(recipe).replace(**parse_overrides(settings))


def test_bytes_that_the_profiler_printed():
    """The form of `ncu --csv`: a row per launch and metric, numbers with thousands' commas."""
    log = "\n".join(
        [
            "==PROF== Connected to process 7",
            '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","7","statistics_kernel","dram__bytes_read.sum","Mbyte","578.03"',
            '"0","7","statistics_kernel","gpu__time_duration.sum","us","131.5"',
            '"1","7","gradient_kernel","dram__bytes_write.sum","byte","64,225,280"',
            "==PROF== Disconnected",
        ]
    )
    found = gpu.bytes_per_kernel(log)
    assert found["statistics_kernel"]["dram__bytes_read.sum"] == pytest.approx(578.03e6)
    assert found["statistics_kernel"]["gpu__time_duration.sum"] == pytest.approx(131.5e-6)
    assert found["gradient_kernel"]["dram__bytes_write.sum"] == 64_225_280
    assert gpu.bytes_per_kernel("no table") == {}
