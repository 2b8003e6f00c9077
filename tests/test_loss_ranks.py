"""`process_group`: two processes that hold parts of a batch compute what one process computes with the whole batch."""

import copy
import io
import os
import socket
import time
from datetime import timedelta
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
# What the objective alone takes.
OBJECTIVES = {
    "both terms": {"supervised": "dice+cross_entropy", "students": (0,)},
    "cross_entropy": {"supervised": "cross_entropy", "ignore_index": 1},
    "masked": {"statistics": True},
    "reported": {"statistics": True, "supervised": "dice+cross_entropy"},
}
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


def _batch(classes: int, with_nan: bool = False):
    logits, features = networks((3, 4, 5), classes, 6, batch=5)
    if with_nan:
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


def _local(rank, classes, impl, keywords, counts, with_nan=False):
    logits, features, target = _batch(classes, with_nan)
    part = PARTS[rank]
    labels = target[part][: counts[rank]]
    return _evaluate(impl, keywords, [z[part] for z in logits], [f[part] for f in features], labels, dist.group.WORLD)


def _objective(impl, name, samples, labels, group):
    """The objective with its own options on these samples of the batch; terms (statistics too) and gradients."""
    logits, features, _ = _batch(3)
    z = leaves([t[samples] for t in logits])
    mask = None
    if name == "masked":  # a different share of every sample
        mask = torch.rand(5, 3, 4, 5, generator=torch.Generator().manual_seed(3))[samples] < 0.7
    objective = rplib.MutualObjective(impl=impl, process_group=group, **OBJECTIVES[name])
    terms = objective(z, [f[samples] for f in features], labels, 0.3, mask=mask)
    terms.total.backward()
    values = [t.detach() for t in (*terms[:3], *(terms.statistics if OBJECTIVES[name].get("statistics") else ()))]
    return values, [t.grad for t in z]


def _copies(rank):
    """A module with a group is copied and pickled, and still sums over the ranks."""
    logits, features, _ = _batch(2)
    part = PARTS[rank]
    mine = [z[part] for z in logits], [f[part] for f in features]
    pair = dist.new_group([0, 1])
    found = {}
    for name, group in (("world", dist.group.WORLD), ("by name", "world"), ("other", pair)):
        module = torch.nn.ModuleList([torch.nn.Linear(1, 1), rplib.ReliableMutualLoss(process_group=group)])
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copies = [module, copy.deepcopy(module), torch.load(file, weights_only=False)]
        copies.append(torch.optim.swa_utils.AveragedModel(module).module)
        found[name] = [copied[1](*mine) for copied in copies]
    return found


def _alone(rank, folder):
    """Rank 0 calls, rank 1 does not."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    logits, features, _ = _batch(2)
    done = Path(folder) / "alone"
    if rank == 0:
        try:
            return str(rplib.ReliableMutualLoss(process_group=group)(logits, features))
        except RuntimeError as error:
            return str(error)
        finally:
            done.touch()
    while not done.exists():
        time.sleep(0.05)
    return ""


def _work(rank: int, port: int, folder: str):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for impl in IMPLS:
        for classes, name, labelled in ASKED:
            results[classes, impl, name, labelled] = _local(rank, classes, impl, CASES[name], LABELLED[labelled])
        for classes in (2, 4):
            results[classes, impl, "with_nan"] = _local(rank, classes, impl, {}, LABELLED["both"], with_nan=True)
        for name in OBJECTIVES:
            labels = _batch(3)[2][PARTS[rank]][: LABELLED["both"][rank]]
            results[impl, name] = _objective(impl, name, PARTS[rank], labels, "world")
    results["copies"] = _copies(rank)
    results["alone"] = _alone(rank, folder)  # the last: its group is broken afterwards
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


@pytest.mark.slow_cases(
    "triton-2-everywhere-both", "triton-2-max_probability-both", "triton-2-probabilities-both", "triton-2-default-one rank"
)
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
        values, gradients = ranks[rank][classes, impl, "with_nan"]
        loss, total, dice, mutual = values
        assert not loss.isfinite() and not total.isfinite() and not mutual.isfinite() and dice.isfinite()
        if impl != "naive":  # in the naive form, only what the bad value touches is spoiled
            assert not gradients[0].isfinite().all()


@pytest.mark.slow_cases("triton-reported", "triton-cross_entropy")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_objectives_own_options_over_two_ranks(ranks, impl, name):
    order = [0, 1, 2, 3, 4]  # rank 0 labels sample 0, rank 1 sample 1
    values, gradients = _objective(impl, name, order, _batch(3)[2][:2], None)
    for rank in (0, 1):
        ours, local = ranks[rank][impl, name]
        for a, b in zip(ours, values, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-7)
        for g, whole in zip(local, gradients, strict=True):
            if whole is None:
                assert g is None
            else:
                torch.testing.assert_close(g / 2, whole[PARTS[rank]], rtol=1e-5, atol=1e-9)


def test_copies_of_a_module_with_a_group_still_sum_over_it(ranks):
    logits, features, _ = _batch(2)
    whole = rplib.functional.reliable_mutual_loss(logits, features)
    for rank in (0, 1):
        for name, losses in ranks[rank]["copies"].items():
            for loss in losses:
                torch.testing.assert_close(loss, whole, rtol=2e-6, atol=0, msg=name)


def test_one_rank_alone_gets_an_error_that_says_why(ranks):
    assert "another rank did not take part in time" in ranks[0]["alone"]
    assert "process_group=None" in ranks[0]["alone"]


def test_a_group_by_name_is_asked_for_when_the_loss_is_called():
    """The module may be built before init_process_group, where torch.distributed.group.WORLD is None."""
    logits, features, _ = _batch(2)
    loss_fn = rplib.ReliableMutualLoss(process_group="world")
    with pytest.raises(ValueError, match=r"process_group .*init_process_group"):
        loss_fn(logits, features)


@pytest.mark.parametrize("group", ["worl", 3])
def test_no_process_group(group):
    with pytest.raises(TypeError, match=r"process_group .*world"):
        rplib.ReliableMutualLoss(process_group=group)
