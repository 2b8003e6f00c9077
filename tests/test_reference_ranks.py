"""Training by several processes: what one process computes, its run folder, resumption, mistakes reported once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks_program import METHODS, steps
from reference_tools import TINY, write_dataset

from rplib.errors import UserError
from rplib.reference.config import load_recipe
from rplib.reference.reporting.run_log import read_metrics, read_sessions
from rplib.reference.training import trainer
from rplib.reference.training.distributed import Ranks, own_device

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")

ROOT = Path(__file__).resolve().parent.parent
TWO = 2
SETTINGS = [*TINY, "iterations=6", "checkpoint_every=3", "log_every=2"]


def _free_ports(number: int) -> list[str]:
    with_ports = [socket.socket() for _ in range(number)]
    try:
        for s in with_ports:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in with_ports]
    finally:
        for s in with_ports:
            s.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, test=3)
    return root


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """What two ranks wrote, see ranks_program.py."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TWO)]
    program = [ROOT / "tests" / "ranks_program.py", folder, data, *_free_ports(9)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TINY": " ".join(SETTINGS)}
    done = subprocess.run([*torchrun, *map(str, program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(TWO)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_give_loss_gradients_and_statistics_of_one(ranks, method):
    """3 and 2 samples on the ranks; loss, every gradient, weights and running statistics after two steps."""
    alone = steps(method, Ranks())
    assert {name.split()[0] for name in alone} >= {"loss", "gradient"}
    assert any("running_var" in name for name in alone) == ("instance" not in method)
    for rank in range(TWO):
        ours = ranks[rank][method]
        assert ours.keys() == alone.keys()
        for name, value in alone.items():
            # A bias before batch normalisation has no gradient but rounding, which the atol takes.
            torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_rank_0_alone_writes_and_talks(ranks, folder):
    assert [r["whole"][0] for r in ranks] == [0, 0]
    assert "6 iterations" in ranks[0]["whole"][1] and "2 processes (cpu)" in ranks[0]["whole"][1]
    assert "TEST list" in ranks[0]["whole"][1]
    assert ranks[1]["whole"][1] == ""
    names = {path.name for path in (folder / "whole").iterdir()}
    assert {"config.toml", "metrics.csv", "last.pt", "best.pt", "curves.png", "environment.json"} <= names
    assert len([name for name in names if name.startswith("events.")]) == 1
    assert [row.iteration for row in read_metrics(folder / "whole" / "metrics.csv")] == list(range(1, 7))
    assert read_sessions(folder / "whole")[0]["processes"] == TWO


def test_validation_cases_are_shared_and_their_mean_is_that_of_the_list(folder):
    """CASE05 to CASE07; the program gives CASE0n a Dice of 1 / (3 + n)."""
    found = [row.validation_dice for row in read_metrics(folder / "whole" / "metrics.csv")]
    assert found == [None if t % 2 else (1 / 8 + 1 / 9 + 1 / 10) / 3 for t in range(1, 7)]


def test_each_rank_has_dropout_of_its_own(folder):
    saved = torch.load(folder / "whole" / "last.pt", weights_only=True)
    ((other, _),) = saved["other_ranks_random"]
    assert not torch.equal(other, saved["torch_random"])


def test_a_resumed_training_of_two_ranks_resumes_with_the_same_bits(ranks, folder):
    assert [r["cut"][0] for r in ranks] == [130, 130]
    assert [r["resumed"][0] for r in ranks] == [0, 0]
    whole, parts = ([row._replace(seconds=0.0) for row in read_metrics(folder / n / "metrics.csv")] for n in ("whole", "parts"))
    assert parts == whole
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(folder / run / name, weights_only=True)["network"] for run in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_loss_that_is_not_finite_ends_all_ranks_and_is_reported_once(ranks, folder):
    assert [r["nan"][0] for r in ranks] == [2, 2]
    said = ranks[0]["nan"][1]
    assert "not finite at iteration 4" in said and said.count("CASE") == 3  # the names of the whole batch
    assert "rplib: error" not in ranks[1]["nan"][1]
    assert torch.load(folder / "nan" / "last.pt", weights_only=True)["iteration"] == 3


@pytest.mark.parametrize(("what", "message"), [("mistake", "leaves none unlabelled"), ("too many", "shared by 2 processes")])
def test_a_mistake_ends_all_ranks_and_is_reported_once(ranks, what, message):
    assert [r[what][0] for r in ranks] == [2, 2]
    assert message in ranks[0][what][1]
    assert "rplib: error" not in ranks[1][what][1]


def test_torchrun_trains_as_one_process_does(ranks, folder, data, tmp_path):
    """The same crops, so the same first losses; later ones differ where a mask hangs on a last bit."""
    assert ranks[0]["first"][0] == 0, ranks[0]["first"]
    trainer.train(load_recipe("la-4", [*SETTINGS, "dropout=0", "iterations=2"]), data, tmp_path / "one", device="cpu")
    one, two = (read_metrics(path / "metrics.csv") for path in (tmp_path / "one", folder / "first"))
    for a, b in zip(one, two, strict=True):
        assert (b.total, b.dice, b.mutual) == pytest.approx((a.total, a.dice, a.mutual), rel=1e-4)  # float32


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch):
    environment = dict.fromkeys(("RANK", "LOCAL_RANK"), "3") | {"WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device(None, environment) == own_device("cuda", environment) == "cuda:3"
    assert own_device("cpu", environment) == "cpu"
    assert own_device("cuda:1", {}) == "cuda:1"
    with pytest.raises(UserError, match="each process uses its own GPU"):
        own_device("cuda:1", environment)
