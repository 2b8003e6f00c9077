"""`process_group`: two processes that hold parts of a batch compute what one process computes with the whole batch."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import HAS_TRITON, networks
from truth import leaves

import rplib

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")

CASES = {
    "default": {},
    "max_probability": {"confidence": "max_probability"},
    "everywhere": {"confidence": None},
    "unweighted": {"weighting": None},
    "probabilities": {"cross_entropy_on": "probabilities"},
}
IMPLS = ["naive", "torch", *(["triton"] if HAS_TRITON else [])]
# Samples of the whole batch that each rank holds, labelled ones first: the ranks differ in what is labelled.
PARTS = {0: [0, 2], 1: [1, 3, 4]}
# Number of labelled samples per rank.
LABELLED = {"both": {0: 1, 1: 1}, "one rank": {0: 0, 1: 1}}

ASKED = [
    *((2, name, "both") for name in CASES),
    (2, "default", "one rank"),
    (4, "default", "one rank"),
    (4, "everywhere", "both"),
]


def _batch(classes: int, poisoned: bool = False):
    logits, features = networks((3, 4, 5), classes, 6, batch=5)
    if poisoned:
        features[1][3, 0, 0, 0, 0] = float("nan")
    target = torch.randint(0, classes, (5, 3, 4, 5), generator=torch.Generator().manual_seed(7))
    return [z.cpu() for z in logits], [f.cpu() for f in features], target


def _evaluate(impl, keywords, logits, features, target, group):
    """Loss and objective, each with its gradients."""
    z = leaves(logits)
    loss = rplib.ReliableMutualLoss(impl=impl, process_group=group, **keywords)(z, features)
    loss.backward()
    w = leaves(logits)
    terms = rplib.MutualObjective(impl=impl, process_group=group, **keywords)(w, features, target, 0.3)
    terms.total.backward()
    return [loss.detach(), *(t.detach() for t in terms)], [t.grad for t in (*z, *w)]


def _local(rank, classes, impl, keywords, counts, poisoned=False):
    logits, features, target = _batch(classes, poisoned)
    part = PARTS[rank]
    labels = target[part][: counts[rank]]
    return _evaluate(impl, keywords, [z[part] for z in logits], [f[part] for f in features], labels, dist.group.WORLD)


def _work(rank: int, port: int, folder: str):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for impl in IMPLS:
        for classes, name, labelled in ASKED:
            results[classes, impl, name, labelled] = _local(rank, classes, impl, CASES[name], LABELLED[labelled])
        for classes in (2, 4):
            results[classes, impl, "poisoned"] = _local(rank, classes, impl, {}, LABELLED["both"], poisoned=True)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _whole(classes, impl, keywords, labelled):
    """One process with the whole batch, labelled samples first as its interface wants them; gradients in that order."""
    logits, features, target = _batch(classes)
    counts = LABELLED[labelled]
    known = [s for rank in (0, 1) for s in PARTS[rank][: counts[rank]]]
    order = known + [s for s in range(5) if s not in known]
    ordered = [[t[order] for t in ts] for ts in (logits, features)]
    values, gradients = _evaluate(impl, keywords, *ordered, target[known], None)
    back = torch.argsort(torch.tensor(order))
    return values, [g[back] for g in gradients]


@pytest.mark.parametrize(("classes", "name", "labelled"), ASKED)
@pytest.mark.parametrize("impl", IMPLS)
def test_two_ranks_are_one_process(ranks, classes, impl, name, labelled):
    values, gradients = _whole(classes, impl, CASES[name], labelled)
    assert values[0] != 0 and values[2] != 0
    for rank in (0, 1):
        ours, local = ranks[rank][classes, impl, name, labelled]
        for a, b in zip(ours, values, strict=True):  # every rank returns the loss of the whole batch
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
        for g, whole in zip(local, gradients, strict=True):  # times the ranks, because DDP averages
            torch.testing.assert_close(g / 2, whole[PARTS[rank]], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [2, 4])
def test_a_bad_value_on_one_rank_shows_on_all(ranks, classes, impl):
    for rank in (0, 1):
        values, gradients = ranks[rank][classes, impl, "poisoned"]
        loss, total, dice, mutual = values
        assert not loss.isfinite() and not total.isfinite() and not mutual.isfinite() and dice.isfinite()
        if impl != "naive":  # the naive form poisons what the bad value touches
            assert not gradients[0].isfinite().all()


@pytest.mark.parametrize("group", ["world", 3])
def test_no_process_group(group):
    with pytest.raises(ValueError, match=r"process_group .*init_process_group"):
        rplib.ReliableMutualLoss(process_group=group)
