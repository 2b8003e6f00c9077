"""`rplib train`: the run folder, resumption after kill -9, checkpoints, protocols, mistakes."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from reference_tools import TINY, mistake, write_case, write_dataset

import rplib
from rplib import cli
from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.config import KEYS, load_config, load_recipe
from rplib.reference.reporting.run_log import read_metrics, record_session
from rplib.reference.training import trainer
from rplib.reference.training.run_folder import warn_of_other_bits

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root)
    return root


def tiny(*overrides: str, recipe: str = "la-4"):
    return load_recipe(recipe, [*TINY, *overrides])


def losses(run: Path) -> list[tuple]:
    """Everything in metrics.csv but the seconds, as numbers that equal only bit for bit."""
    return [row._replace(seconds=0.0) for row in read_metrics(run / "metrics.csv")]


def same_weights(a: Path, b: Path) -> bool:
    first, second = (torch.load(path, weights_only=True)["network"] for path in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run by the command line that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    command_line = ["train", "--recipe", "la-4", "--data", str(data), "--out", str(run), "--set", *TINY, "--device", "cpu"]
    assert cli.main(command_line) == 0
    return run


# --------------------------------------------------------------------------------------------------------- run folder


def test_the_run_folder_holds_what_is_promised(finished, data):
    names = {path.name for path in finished.iterdir()}
    assert {"config.toml", "metrics.csv", "last.pt", "best.pt", "curves.png", "environment.json"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert not any(name.startswith(".") for name in names)
    assert tomllib.loads((finished / "config.toml").read_text()).keys() == KEYS.keys()
    assert load_config(finished / "config.toml") == tiny()
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    session = json.loads((finished / "environment.json").read_text())["sessions"][0]
    assert session["torch"] == torch.__version__
    assert session["data"] == str(data.resolve())


def test_metrics_have_one_row_an_iteration(finished):
    rows = read_metrics(finished / "metrics.csv")
    assert [row.iteration for row in rows] == list(range(1, 13))
    for row in rows:
        assert row.total == pytest.approx(0.5 * row.dice + row.consistency_weight * row.mutual, rel=1e-6)
        assert row.consistency_weight == rplib.ramp(row.iteration, 40, 2)
        assert row.learning_rate == 0.01
        assert row.seconds > 0
        assert row.mutual > 0
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header.startswith("iteration,total,dice,mutual,consistency_weight,learning_rate,seconds,validation_dice,taught_by_1,")


def check_events(run: Path) -> None:
    """What TensorBoard shows equals metrics.csv, each iteration once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("loss/mutual")]
    assert shown == [(row.iteration, pytest.approx(row.mutual)) for row in read_metrics(run / "metrics.csv")]


def test_tensorboard_events_hold_the_same_numbers(finished):
    check_events(finished)


def test_the_network_of_a_run_loads_in_evaluation_mode(finished):
    network, config = checkpoint.load_network(finished)
    assert (network.training, config) == (False, tiny())
    best = torch.load(finished / "best.pt", weights_only=True)
    assert (best["iteration"], best["chosen_by"]) == (12, "last iteration")
    assert same_weights(finished / "best.pt", finished / "last.pt")
    assert all(torch.equal(value, best["network"][key]) for key, value in network.state_dict().items())
    alone, _ = checkpoint.load_network(finished / "last.pt")
    assert torch.equal(alone.decoder1.out_conv.weight, network.decoder1.out_conv.weight)


def test_training_twice_gives_the_same_bits(finished, data, tmp_path):
    trainer.train(tiny(), data, tmp_path / "run", device="cpu")
    assert losses(tmp_path / "run") == losses(finished)
    assert same_weights(tmp_path / "run" / "last.pt", finished / "last.pt")


def test_the_script_in_the_checkout_accepts_the_same_options(data, tmp_path):
    """From a folder where nothing is importable, without an installation on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command_line = ["--recipe", "la-4", "--data", data, "--out", tmp_path / "run", "--set", *TINY, "iterations=2"]
    script = ROOT / "reference" / "train.py"
    subprocess.run([sys.executable, script, *command_line], check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert len(losses(tmp_path / "run")) == 2


def test_the_folder_refuses_another_name():
    code = "import reference"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: this folder is the package rplib.reference, not reference" in done.stderr


# ----------------------------------------------------------------------------------------------------------- resuming

# Each runs `rplib train` with a trap that kills the process, as `kill -9` does, at one exact moment.
TRAPS = {
    "between two checkpoints": """
from rplib.reference.training import trainer
def step(*command_line, calls=[0], genuine=trainer.training_step):
    calls[0] += 1
    if calls[0] == 9: die()
    return genuine(*command_line)
trainer.training_step = step
""",
    "in the middle of writing the second checkpoint": """
import torch
def save(content, file, calls=[0], genuine=torch.save):
    calls[0] += 1
    if calls[0] == 2:
        import io
        whole = io.BytesIO()
        genuine(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2]); file.flush()
        die()
    genuine(content, file)
torch.save = save
""",
    "before the first checkpoint": """
from rplib.reference.training import trainer
def step(*command_line, calls=[0], genuine=trainer.training_step):
    calls[0] += 1
    if calls[0] == 4: die()
    return genuine(*command_line)
trainer.training_step = step
""",
}


@pytest.mark.slow_cases("before the first checkpoint")
@pytest.mark.parametrize("moment", TRAPS)
def test_a_killed_training_resumes_with_the_same_bits(finished, data, tmp_path, moment):
    run = tmp_path / "run"
    trap = "import os, signal, sys\ndef die(): os.kill(os.getpid(), signal.SIGKILL)\n" + TRAPS[moment]
    command = f"{trap}\nfrom rplib.cli import main\nsys.exit(main(sys.argv[1:]))"
    command_line = ["train", "--recipe", "la-4", "--data", str(data), "--out", str(run), "--device", "cpu", "--set", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", command, *command_line], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "curves.png").exists()
    if "middle" in moment:
        assert [path for path in run.iterdir() if path.name.startswith(".rplib-")]  # half of it is on the disk
        assert checkpoint.load(run / "last.pt")["iteration"] == 5

    assert cli.main(["train", "--resume", "--out", str(run), "--device", "cpu"]) == 0
    assert losses(run) == losses(finished)
    assert same_weights(run / "last.pt", finished / "last.pt")
    assert same_weights(run / "best.pt", finished / "best.pt")
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert len(json.loads((run / "environment.json").read_text())["sessions"]) == 2
    check_events(run)


def test_all_that_a_step_depends_on_survives_an_interruption(data, tmp_path):
    """Dropout, momentum, polynomial rate, channels_last, validation: stop at 7 of 10, go on."""
    command_line = [
        "schedule=polynomial",
        "channels_last=true",
        "dropout=0.3",
        "iterations=10",
        "validation=1",
    ]
    config = tiny(*command_line, "validate_from=4", "validate_every=4", "checkpoint_every=3")
    trainer.train(config, data, tmp_path / "whole", device="cpu")

    class Stop(BaseException):
        pass

    genuine, calls = trainer.training_step, iter(range(10**6))

    def step(*command_line):
        if next(calls) == 7:
            raise Stop
        return genuine(*command_line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", step)
        with pytest.raises(Stop):
            trainer.train(config, data, tmp_path / "parts", device="cpu")
    trainer.train(config, data, tmp_path / "parts", device="cpu", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len({row.learning_rate for row in losses(tmp_path / "whole")}) == 10
    for name in ("last.pt", "best.pt"):
        assert same_weights(tmp_path / "parts" / name, tmp_path / "whole" / name)


def test_a_finished_run_can_be_made_longer_and_nothing_else(finished, data, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.train(tiny("iterations=6"), data, run, device="cpu")
    assert cli.main(["train", "--resume", "--out", str(run), "--set", "iterations=12"]) == 0
    assert losses(run) == losses(finished)
    capsys.readouterr()
    assert "iteration 12, past iterations=6" in mistake(capsys, "train", "--resume", "--out", run, "--set", "iterations=6")
    line = mistake(capsys, "train", "--resume", "--out", run, "--set", "learning_rate=1")
    assert "learning_rate 0.01 -> 1.0" in line
    assert losses(run) == losses(finished)


def test_other_cases_are_not_resumed_with(finished, data, tmp_path, capsys):
    write_dataset(tmp_path / "other", train=6)
    line = mistake(capsys, "train", "--resume", "--out", finished, "--data", tmp_path / "other")
    assert "trained on other cases" in line


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"network": {}, "iteration": 1})

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, half)
    assert checkpoint.load(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["half", "empty", "text", "hole", "pickle"])
def test_a_damaged_checkpoint_is_refused_by_name(finished, data, tmp_path, capsys, damage):
    whole = (finished / "last.pt").read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text((finished / "config.toml").read_text())
    for name in ("last.pt", "best.pt"):
        if damage == "pickle":  # code in a pickle must not run
            torch.save({"network": Path("/")}, run / name)
        else:
            hole = whole[: len(whole) // 3] + whole[2 * len(whole) // 3 :]
            content = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint", "hole": hole}
            (run / name).write_bytes(content[damage])
    line = mistake(capsys, "train", "--resume", "--out", run, "--data", data)
    assert f"{run / 'last.pt'} is not a readable checkpoint" in line
    for which in (None, "best", "last"):
        with pytest.raises(UserError, match="is not a readable checkpoint"):
            checkpoint.load_network(run, which)


def test_missing_checkpoints(tmp_path, finished):
    with pytest.raises(UserError, match=r"no checkpoint .*nowhere"):
        checkpoint.load_network(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no last\.pt"):
        checkpoint.load_network(tmp_path)
    checkpoint.save(tmp_path / "last.pt", {"network": {}, "config": tiny().to_toml()})
    (tmp_path / "config.toml").write_text(tiny().to_toml())
    with pytest.raises(UserError, match="do not fit the network"):
        checkpoint.load_network(tmp_path)


# ---------------------------------------------------------------------------------------------------------- protocols


def scripted(monkeypatch, scores):
    """Replaces the Dice of validations by given numbers, and records what it was asked for."""
    asked, numbers = [], iter(scores)

    def dice(network, cases, config, device):
        assert not network.training
        asked.append([case.name for case in cases])
        return [next(numbers)] * len(cases)

    monkeypatch.setattr(trainer, "case_dice", dice)
    return asked


def test_paper_keeps_the_first_best_on_the_test_list(data, tmp_path, monkeypatch, capsys):
    """From 4, every 2; strictly greater replaces: 0 never, 0.3 at 6 does, the second 0.5 does not."""
    asked = scripted(monkeypatch, [0.0, 0.3, 0.5, 0.5, 0.4])
    config = tiny("protocol=paper", "validate_from=4", "validate_every=2")
    trainer.train(config, data, tmp_path / "run", device="cpu")
    assert asked == [(data / "test.list").read_text().split()] * 5
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (best["iteration"], best["score"]) == (8, 0.5)
    assert "test list" in best["chosen_by"]
    assert not same_weights(tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt")
    dice = {row.iteration: row.validation_dice for row in losses(tmp_path / "run") if row.validation_dice is not None}
    assert dice == {4: 0.0, 6: 0.3, 8: 0.5, 10: 0.5, 12: 0.4}
    out, err = capsys.readouterr()
    assert "weights are selected on the TEST list" in err
    assert "on the TEST list; protocol 'paper'" in out


def test_held_out_never_opens_the_test_list(data, tmp_path):
    """Not even to look whether it is there."""
    copy = tmp_path / "data"
    write_dataset(copy)
    (copy / "test.list").unlink()
    trainer.train(tiny("iterations=2"), copy, tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "best.pt").is_file()


def test_the_best_so_far_survives_an_interruption(data, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5])
    command_line = ["protocol=paper", "validate_from=4", "validate_every=4"]
    trainer.train(tiny(*command_line, "iterations=6"), data, tmp_path / "run", device="cpu")
    scripted(monkeypatch, [0.3, 0.5])
    trainer.train(tiny(*command_line), data, tmp_path / "run", device="cpu", resume=True)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (best["iteration"], best["score"]) == (4, 0.5)


def test_validation_moves_labelled_cases_out(data, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, [0.2, 0.1])
    seen = set()

    def step(network, objective, optimiser, images, labels, *rest, genuine=trainer.training_step):
        seen.add(len(labels))
        return genuine(network, objective, optimiser, images, labels, *rest)

    monkeypatch.setattr(trainer, "training_step", step)
    trainer.train(tiny("validation=1", "validate_from=8", "validate_every=8"), data, tmp_path / "run", device="cpu")
    names = (data / "train.list").read_text().split()
    assert asked == [[names[2]], [names[2]]]  # labelled=3: the third; at iteration 8 and at the last
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["iteration"] == 8
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["cases"] == [*names[:2], *names[3:], names[2]]


def test_the_validation_dice_counts_an_empty_prediction_as_zero():
    """By real windows of a network whose last layer decides everywhere alike; `paper` also where the truth is empty."""
    from rplib.reference.datasets.layouts import Case

    config = tiny("protocol=paper")
    network = checkpoint.build_network(config).eval()
    with torch.no_grad():
        network.decoder1.out_conv.weight.zero_()
    image = torch.randn(20, 18, 17).numpy()
    label = (image > 0.5).astype("uint8")
    cases, cpu = [Case("A", image, label), Case("B", image, 0 * label)], torch.device("cpu")
    for bias, expected in (([0.0, 1.0], 0.5 * 2 * label.mean() / (1 + label.mean())), ([1.0, 0.0], 0.0)):
        with torch.no_grad():
            network.decoder1.out_conv.bias.copy_(torch.tensor(bias))
        assert sum(trainer.case_dice(network, cases, config, cpu)) / 2 == pytest.approx(expected)


def test_labelled_only_training_reads_no_unlabelled_case(tmp_path):
    names = write_dataset(tmp_path / "data", train=5)
    for name in names[3:]:
        write_case(tmp_path / "data", name, nothing=torch.zeros(1).numpy())
    config = tiny("batch_size=1", "patch=32,16,16", "consistency=0", "iterations=3")
    trainer.train(config, tmp_path / "data", tmp_path / "run", device="cpu")
    assert [row.consistency_weight for row in losses(tmp_path / "run")] == [0.0] * 3
    assert [row.total for row in losses(tmp_path / "run")] == [pytest.approx(0.5 * row.dice) for row in losses(tmp_path / "run")]


def test_unlabelled_cases_train_without_labels_and_labels_there_change_nothing(tmp_path):
    names = write_dataset(tmp_path / "with")
    write_dataset(tmp_path / "without")
    from rplib.reference.datasets.layouts import open_dataset

    for name in names[3:5]:
        image = open_dataset(tmp_path / "without").load(name).image
        write_case(tmp_path / "without", name, image=image)
    for which in ("with", "without"):
        trainer.train(tiny("iterations=4"), tmp_path / which, tmp_path / f"run-{which}", device="cpu")
    assert losses(tmp_path / "run-with") == losses(tmp_path / "run-without")


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (["--recipe", "la-5"], "no recipe named la-5; did you mean la-8 or la-4"),
        ([], "--recipe is missing"),
        (["--recipe", "la-8", "--set", "filtre=4"], "unknown setting 'filtre'; did you mean filters"),
        (["--recipe", "la-8"], "labelled=8 but train.list in"),
        (["--recipe", "la-4", "--set", "labelled=5"], "leaves none unlabelled"),
        (["--recipe", "la-4", "--device", "cpu", "--set", "amp=bfloat16"], "amp=bfloat16 on a CPU: "),
        (["--recipe", "la-4", "--device", "warp"], "--device warp does not work on this machine"),
        (["--recipe", "la-4", "--set", "impl=triton"], "impl=triton: "),
        (["--resume"], "has no run to resume"),
        (["--recip", "la-8", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_mistakes_of_the_command_line(data, tmp_path, capsys, monkeypatch, command_line, message):
    if "impl=triton" in command_line:
        if torch.cuda.is_available():
            pytest.skip("Triton runs on this machine's GPU")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("rplib.dispatch.interpreting", lambda: False)
        command_line = [*command_line, "--device", "cpu"]
    line = mistake(capsys, "train", "--data", data, "--out", tmp_path / "run", *command_line)
    assert message in line
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_missing_data_folder_or_case(data, tmp_path, capsys):
    start = ["train", "--recipe", "la-4", "--out", tmp_path / "run", "--set", *TINY]
    assert "--data is missing" in mistake(capsys, *start)
    assert "no data folder" in mistake(capsys, *start, "--data", tmp_path / "nowhere")
    names = write_dataset(tmp_path / "data")
    path = write_case(tmp_path / "data", names[1], image=torch.zeros(16, 16, 16).numpy())
    assert f"{path} lacks the key 'label'" in mistake(capsys, *start, "--data", tmp_path / "data")


def test_a_folder_with_something_in_it_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    start = ["train", "--recipe", "la-4", "--data", data, "--out", tmp_path / "run", "--set", *TINY]
    assert "is not empty; choose another folder" in mistake(capsys, *start)
    assert "is not a run folder" in mistake(capsys, *start, "--resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    assert "is a file" in mistake(capsys, *start[:5], "--out", tmp_path / "run" / "thesis.txt")


def test_a_loss_that_is_not_finite_stops_with_iteration_and_cases(data, tmp_path, capsys, monkeypatch):
    genuine, calls = trainer.training_step, iter(range(1, 10**6))

    def step(network, *rest):
        if next(calls) == 8:
            with torch.no_grad():
                network.encoder.block_one.conv[0].weight.fill_(float("nan"))
        return genuine(network, *rest)

    monkeypatch.setattr(trainer, "training_step", step)
    run = tmp_path / "run"
    line = mistake(capsys, "train", "--recipe", "la-4", "--data", data, "--out", run, "--set", *TINY)
    assert "not finite at iteration 8 (total nan" in line
    assert line.count("CASE") == 3
    assert f"the last good checkpoint is {run / 'last.pt'}" in line
    saved = checkpoint.load(run / "last.pt")
    assert saved["iteration"] == 5
    assert all(torch.isfinite(value).all() for value in saved["network"].values())
    assert [row.iteration for row in losses(run)] == list(range(1, 8))


@pytest.mark.parametrize("resumed_with", ["2.13.0+cu130", "2.13.0+cpu"])
def test_a_resumed_run_warns_of_another_build_alone(resumed_with, tmp_path, monkeypatch, capsys):
    """A wheel from PyPI is called 2.13.0 and reports 2.13.0+cu130: not another version."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    record_session(tmp_path, cpu, tmp_path, 0, deterministic=False)
    monkeypatch.setattr(torch, "__version__", resumed_with)
    warn_of_other_bits(tmp_path, cpu, 1, False)
    said = capsys.readouterr().err
    assert said == "" if resumed_with == "2.13.0+cu130" else "torch 2.13.0+cu130 -> 2.13.0+cpu" in said
