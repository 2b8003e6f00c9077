"""What each rank does that test_reference_ranks.py starts by torchrun, with a folder, a data set and free ports."""

import contextlib
import io
import os
import sys
from pathlib import Path

import torch

from rplib.reference import train
from rplib.reference.config import Config
from rplib.reference.network import MutualVNet
from rplib.reference.training import trainer
from rplib.reference.training.distributed import Ranks, distributed, joined, synchronise_batch_norm
from rplib.reference.training.methods import build_objective
from rplib.reference.training.step import training_step

CPU = torch.device("cpu")
METHODS = ("both", "mutual-consistency", "both, instance norm")


def steps(method: str, ranks: Ranks) -> dict:
    """Two training steps in float64 (no mask hangs on the last bit) on 5 samples, 2 of them labelled."""
    torch.manual_seed(0)
    method, _, instance = method.partition(", ")
    network = MutualVNet(filters=2, dropout=0.0, norm="instance" if instance else "batch").double()
    images, labels = torch.randn(5, 1, 16, 32, 16).double(), torch.randint(0, 2, (2, 16, 32, 16))
    mine = slice(ranks.rank, None, ranks.size)
    synchronise_batch_norm(network, ranks, CPU)
    model = distributed(network, ranks, CPU)
    optimiser = torch.optim.SGD(network.parameters(), 0.01, 0.9)
    objective = build_objective(Config(method=method), ranks.group)
    found = {}
    for t in range(2):
        terms = training_step(model, objective, optimiser, images[mine], labels[mine], 0.7)
        found |= {f"loss {t} {i}": term for i, term in enumerate(terms)}
        found |= {f"gradient {t} {name}": p.grad.clone() for name, p in network.named_parameters()}
    return found | network.state_dict()


def cut_short(iteration: int):
    """The training's step, which a Ctrl-C ends at that iteration."""
    genuine, calls = trainer.training_step, iter(range(1, 10**6))

    def step(*arguments):
        if next(calls) == iteration:
            raise KeyboardInterrupt
        return genuine(*arguments)

    return step


def broken(iteration: int):
    """The training's step, with a weight of NaN from that iteration on."""
    genuine, calls = trainer.training_step, iter(range(1, 10**6))

    def step(model, *arguments):
        if next(calls) == iteration:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return genuine(model, *arguments)

    return step


def main(folder: Path, data: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)

    def rplib(*arguments: str, step=trainer.training_step) -> tuple[int, str]:
        genuine, trainer.training_step = trainer.training_step, step
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                return train.main(["--device", "cpu", *arguments]), said.getvalue()
        finally:
            trainer.training_step = genuine
            # torchrun's own meeting point serves one process group; the others of this program meet by themselves.
            os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=ports.pop())

    start = ["--recipe", "la-4", "--data", str(data), "--set", *os.environ["TINY"].split()]
    results: dict = {"first": rplib(*start, "dropout=0", "iterations=2", "--out", str(folder / "first"))}
    with joined(CPU) as ranks:
        results |= {method: steps(method, ranks) for method in METHODS}
    os.environ["MASTER_PORT"] = ports.pop()
    start += ["protocol=paper", "validate_from=2", "validate_every=2", "dropout=0.5"]
    trainer.case_dice = lambda network, cases, config, device: [1 / (3 + int(case.name[-1])) for case in cases]
    results["whole"] = rplib(*start, "--out", str(folder / "whole"))
    trainer.write_curves = lambda _: None  # drawn once, that is enough
    results["cut"] = rplib(*start, "--out", str(folder / "parts"), step=cut_short(5))
    results["resumed"] = rplib("--resume", "--out", str(folder / "parts"))
    results["nan"] = rplib(*start, "--out", str(folder / "nan"), step=broken(4))
    results["mistake"] = rplib(*start, "labelled=5", "--out", str(folder / "mistake"))
    results["too many"] = rplib(*start, "batch_size=1", "patch=32,16,16", "--out", str(folder / "many"))
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
