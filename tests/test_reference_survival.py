"""Runs that survive: no room on the disk, weights that break, `--deterministic`; steps that wait for nothing."""

import contextlib
import math
import resource
import threading
from pathlib import Path

import pytest
import torch
from reference_tools import TINY, mistake, write_dataset
from torch.utils._python_dispatch import TorchDispatchMode

from rplib import cli
from rplib.reference import checkpoint
from rplib.reference.config import load_recipe
from rplib.reference.reporting.run_log import read_metrics, read_sessions
from rplib.reference.training import run_folder, trainer
from rplib.reference.training.batches import TwoStreamBatches
from rplib.reference.training.feeding import Feed

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them takes as long as these trainings."""
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root)
    return root


def start(data: Path, run: Path, *overrides: str) -> list[str]:
    return ["train", "--recipe", "la-4", "--data", str(data), "--out", str(run), "--set", *TINY, *overrides]


def losses(run: Path) -> list[tuple]:
    return [row._replace(seconds=0.0) for row in read_metrics(run / "metrics.csv")]


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let a file grow beyond that, as it does on a full disk or beyond a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_step(monkeypatch, iteration: int, act):
    """Calls act(network) before the step of that iteration."""
    genuine, calls = trainer.training_step, iter(range(1, 10**6))

    def step(network, *rest):
        if next(calls) == iteration:
            act(network)
        return genuine(network, *rest)

    monkeypatch.setattr(trainer, "training_step", step)


# ---------------------------------------------------------------------------------------------------------------- disk


def test_too_little_room_is_reported_before_the_data_is_read(tmp_path, capsys):
    with files_of_at_most(1 << 20):
        line = mistake(capsys, *start(tmp_path / "no data", tmp_path / "run"))
    assert "has no space for the 9 MB that this run may write (File too large; " in line
    assert list((tmp_path / "run").iterdir()) == []


def test_the_room_of_the_paper_training():
    """12,347,716 weights of 4 bytes: three times weights and momentum, once weights, and the rows of 15,000 iterations."""
    weights = 4 * 12_347_716
    assert 7 * weights < run_folder.room_needed(Path("nowhere"), load_recipe("la-8")) < 7 * weights + (16 << 20)
    averaged = load_recipe("la-8", ["average=0.99"])
    assert 10 * weights < run_folder.room_needed(Path("nowhere"), averaged) < 10 * weights + (16 << 20)


def test_a_folder_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    line = mistake(capsys, *start(data, tmp_path / "file" / "run"))
    assert f"--out {tmp_path / 'file' / 'run'} cannot be written (Not a directory); choose another folder" in line


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(start(data, whole)) == 0
    with monkeypatch.context() as patch, contextlib.ExitStack() as full:
        at_step(patch, 7, lambda _: full.enter_context(files_of_at_most(1 << 18)))
        line = mistake(capsys, *start(data, run))
    assert f"can no longer be written (File too large); iteration 5 is kept in {run / 'last.pt'}; free space" in line
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    assert losses(run) == losses(whole)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("settings", [[], ["protocol=paper", "validate_from=10", "validate_every=10"]])
def test_weights_that_break_in_a_step_do_not_reach_a_checkpoint(data, tmp_path, capsys, monkeypatch, settings):
    """The loss of iteration 10 is finite, what the step makes of the weights is not; 10 is due for a checkpoint."""
    at_step(monkeypatch, 10, lambda network: network.decoder2.out_conv.weight.register_hook(lambda g: g * float("inf")))
    line = mistake(capsys, *start(data, tmp_path / "run", *settings))
    assert "weights are not finite after iteration 10 (decoder2.out_conv.weight; cases CASE" in line
    assert "the last good checkpoint is" in line
    saved = checkpoint.load(tmp_path / "run" / "last.pt")
    assert saved["iteration"] == 5
    assert all(value.isfinite().all() for value in saved["network"].values())
    assert not (tmp_path / "run" / "best.pt").exists()
    assert len(losses(tmp_path / "run")) == 9  # up to the look before


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_runs_are_identical_and_stay_so_when_resumed(data, tmp_path, monkeypatch, device):
    def both(*_):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark

    for name in ("one", "two", "parts"):
        with monkeypatch.context() as patch:
            at_step(patch, 1, both)
            last = "iterations=7" if name == "parts" else "iterations=12"
            assert cli.main([*start(data, tmp_path / name, last), "--device", device, "--deterministic"]) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    with monkeypatch.context() as patch:
        at_step(patch, 1, both)  # without the word: the run remembers
        arguments = ["--resume", "--out", str(tmp_path / "parts"), "--device", device, "--set", "iterations=12"]
        assert cli.main(["train", *arguments]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "one")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["network"] for name in ("one", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [session["deterministic"] for session in read_sessions(tmp_path / "parts")] == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


# --------------------------------------------------------------------------------------------------------------- speed


class Waits(TorchDispatchMode):
    """Notes every operation whose result Python has to see, with the iteration that it belongs to."""

    names = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.iteration, self.seen = 0, []

    def note(self, name: str) -> None:
        self.seen.append((self.iteration, name))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        if name in self.names:
            self.note(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["both", "mutual-consistency"])
def test_nothing_between_two_looks_at_the_losses_waits_for_the_device(data, tmp_path, monkeypatch, method):
    """Twelve iterations, one look: after the last."""
    monkeypatch.setattr("rplib.targets.looks_allowed", lambda _: False)  # labels are looked at on a CPU alone
    waits, main = Waits(), threading.current_thread()

    def noted(name, genuine):
        def method(tensor, *arguments, **more):
            if threading.current_thread() is main:
                waits.note(name)
            return genuine(tensor, *arguments, **more)

        return method

    for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    genuine = trainer.training_step

    def step(*arguments):
        waits.iteration += 1
        return genuine(*arguments)

    monkeypatch.setattr(trainer, "training_step", step)
    config = load_recipe("la-4", [*TINY, "log_every=100", "checkpoint_every=100", f"method={method}"])
    with waits:
        trainer.train(config, data, tmp_path / "run", device="cpu")
    assert {"tolist"} <= {name for iteration, name in waits.seen if iteration == 12}  # the look is noted
    assert [(i, name) for i, name in waits.seen if 1 <= i < 12] == []


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("cache", ["ram", "device"])
def test_a_gpu_is_waited_for_at_the_looks_alone(data, tmp_path, monkeypatch, cache):
    genuine, calls = trainer.training_step, iter(range(1, 10**6))

    def step(*arguments):
        terms = genuine(*arguments)
        # From the second step on (the first allocates), until the look after the last.
        torch.cuda.set_sync_debug_mode("default" if next(calls) == 12 else "error")
        return terms

    monkeypatch.setattr(trainer, "training_step", step)
    config = load_recipe("la-4", [*TINY, "log_every=100", "checkpoint_every=100", f"cache={cache}"])
    try:
        trainer.train(config, data, tmp_path / "run", device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_volumes_on_the_device_give_the_same_bits(data, tmp_path, device):
    for cache in ("ram", "device", "auto"):
        config = load_recipe("la-4", [*TINY, "iterations=4", f"cache={cache}"])
        trainer.train(config, data, tmp_path / cache, device=device, deterministic=True)
    assert losses(tmp_path / "ram") == losses(tmp_path / "device") == losses(tmp_path / "auto")


def test_the_feed_is_one_batch_ahead_and_its_state_is_not():
    from test_reference_batches import SMALL, cases

    plain, source = (TwoStreamBatches(*cases(), SMALL) for _ in range(2))
    feed = Feed(source, torch.device("cpu"), torch.channels_last_3d)
    for _ in range(5):
        batch, expected = feed.next(), plain.next()
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.labels, expected.labels)
        assert batch.names == expected.names
        assert feed.state() == plain.state() != source.state()
    feed.close()


def test_an_error_in_the_thread_reaches_the_training(monkeypatch):
    from test_reference_batches import SMALL, cases

    source = TwoStreamBatches(*cases(), SMALL)
    monkeypatch.setattr(source, "cut", lambda *_, **__: 1 / 0)
    feed = Feed(source, torch.device("cpu"), torch.contiguous_format)
    with pytest.raises(ZeroDivisionError):
        feed.next()
    feed.close()


def test_a_compiled_training_has_the_same_numbers_and_checkpoints(data, tmp_path, monkeypatch):
    """By Dynamo without a code generator: what is tested is the trainer's use of it."""
    genuine = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: genuine(module, backend="eager"))
    settings = [*TINY, "iterations=3", "protocol=paper", "validate_from=2", "validate_every=2"]
    for name in ("false", "true"):
        trainer.train(load_recipe("la-4", [*settings, f"compile={name}"]), data, tmp_path / name, device="cpu")
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    network, _ = checkpoint.load_network(tmp_path / "true", "last")
    assert not any("_orig_mod" in key for key in network.state_dict())


def test_the_profile_shows_where_a_step_goes_and_keeps_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--recipe", "la-4", "--data", str(data), "--profile", "2", "--device", "cpu", "--set", *TINY]) == 0
    out = capsys.readouterr().out
    shares = {line[:24].strip(): float(line[24:34]) for line in out.splitlines() if line.endswith("%")}
    assert list(shares) == ["data", "forward", "loss", "loss backward", "backward", "optimiser", "sum"]
    assert shares["sum"] == pytest.approx(sum(list(shares.values())[:-1]), abs=0.1) and min(shares.values()) > 0
    assert list(tmp_path.iterdir()) == []
    assert "--out is missing" in mistake(capsys, "train", "--recipe", "la-4", "--data", data)
    assert "--profile needs --recipe" in mistake(capsys, "train", "--data", data, "--profile")


def test_the_memory_of_a_step_holds_what_it_must_and_grows_with_the_batch(data):
    """Weights, momentum and gradients, and then so much a patch."""
    from rplib.reference.training.profiling import profile

    config = load_recipe("la-4-supervised", TINY)
    weights = sum(p.nbytes for p in checkpoint.build_network(config).parameters())
    taken = [profile(config.replace(batch_size=n, labelled_per_batch=n), data, "cpu", steps=1).memory for n in (2, 3, 4)]
    assert taken[0] > 3 * weights
    assert taken[2] - taken[1] == pytest.approx(taken[1] - taken[0], rel=0.1)
    # Both decoders' outputs and features at full resolution are kept whatever the implementation.
    patch = math.prod(config.patch)
    assert taken[1] - taken[0] > 4 * patch * 2 * (config.filters + config.classes)


def test_the_work_of_a_step_by_hand():
    """A first convolution of 3 x 3 x 3: 2 x 27 x channels x filters operations a voxel; a backward pass costs twice a forward."""
    from rplib.reference.training.profiling import work

    config = load_recipe("la-4", TINY)
    whole, window = work(config)
    more, _ = work(config.replace(in_channels=config.in_channels + 1))
    first = 2 * 27 * config.filters * math.prod(config.patch) * config.batch_size
    assert more - whole == 2 * first  # forward, and the weight's gradient; the image's is not needed
    assert work(config.replace(batch_size=2 * config.batch_size))[0] == 2 * whole
    assert whole / config.batch_size > 3 * window  # two decoders instead of one, and backwards


def test_the_parts_of_a_measured_step_are_those_of_a_plain_one():
    """Marks change nothing, and each comes once, in order; the loss's backward pass ends before the network's begins."""
    from rplib.reference.training.methods import build_objective
    from rplib.reference.training.step import PARTS, training_step

    images, labels, weights, marks = torch.randn(2, 1, 32, 16, 16), torch.zeros(1, 32, 16, 16).long(), [], []
    for mark in (None, marks.append):
        torch.manual_seed(0)
        network = checkpoint.build_network(load_recipe("la-4", [*TINY, "dropout=0"]))
        for decoder in (network.decoder1, network.decoder2):
            for parameter in decoder.parameters():
                parameter.register_hook(lambda _, mark=mark: mark and mark("a decoder's gradient"))
        optimiser = torch.optim.SGD(network.parameters(), 0.1)
        training_step(network, build_objective(load_recipe("la-4")), optimiser, images, labels, 1.0, None, mark)
        weights.append(network.encoder.block_one.conv[0].weight)
    assert torch.equal(*weights)
    assert list(dict.fromkeys(marks)) == [*PARTS[:3], "a decoder's gradient", *PARTS[3:]]
    assert all(marks.count(part) == 1 for part in PARTS)


def test_a_compiler_that_does_not_work_is_reported_in_one_sentence(data, tmp_path, capsys, monkeypatch):
    failure = type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def compiled(module):
        def forward(*_):
            raise failure("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

        module.forward = forward
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    line = mistake(capsys, *start(data, tmp_path / "run", "compile=true"))
    assert line == "compile=true does not work on this machine (No working C++ compiler found); set compile=false."
