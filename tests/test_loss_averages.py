"""`prototypes="average"` and `sample_weights`: against the formula written out, their state, two ranks, and mistakes."""

import copy
import io
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import ANY_K_IMPLS, DEVICE, networks
from test_loss_options import by_hand
from truth import confidence_score, leaves

import rplib
from rplib import lean_voxels

EVERY_IMPL = pytest.mark.parametrize("impl", ANY_K_IMPLS)
DECAY = 0.7


def batches(count=2, classes=3, dtype=torch.float64):
    """Three batches of different networks' outputs; class 2 is rare, and absent from the first."""
    found = []
    for seed in range(3):
        logits, features = networks((7, 5), classes, [6, 4, 5][:count], batch=2, count=count, dtype=dtype, seed=seed)
        for z in logits:
            z[:, 2] -= 100 if seed == 0 else 3
        found.append((logits, features))
    return found


class Expected:
    """The loss over the calls, written from the formula: m <- d m + (1 - d) mean of the batch, where the class is there."""

    def __init__(self, networks: int) -> None:
        self.means = [{} for _ in range(networks)]

    def __call__(self, logits, features, decay=DECAY, valid=None):
        z, f = [t.flatten(2) for t in logits], [t.flatten(2) for t in features]
        plain = [t.detach() for t in z]
        inside = torch.ones_like(plain[0][:, 0], dtype=torch.bool) if valid is None else valid.flatten(1)
        similar = []
        for k, means in enumerate(self.means):
            y = plain[k].argmax(1)
            for c in range(plain[k].shape[1]):
                chosen = (y == c) & inside  # (B, V)
                if chosen.any():
                    mean = f[k].movedim(1, 2)[chosen].sum(0) / (chosen.sum().double() + 1e-6)
                    means[c] = decay * means[c] + (1 - decay) * mean if c in means else mean
            mu = torch.stack([means.get(c, torch.zeros(f[k].shape[1], device=DEVICE).double()) for c in range(plain[k].shape[1])])
            mu = torch.nn.functional.normalize(mu, dim=1, eps=1e-12)
            similar.append(torch.nn.functional.cosine_similarity(mu[None, :, :, None], f[k][:, None], dim=2))
        total = 0
        for i in range(len(z)):
            for j in range(len(z)):
                if i != j:
                    m = (confidence_score(plain[i], "entropy", 1e-6) > confidence_score(plain[j], "entropy", 1e-6)) & inside
                    w = m * (1 - (similar[j] - plain[j].softmax(1)).square().mean(1))
                    ce = -z[i].log_softmax(1).gather(1, plain[j].argmax(1)[:, None])[:, 0]
                    total = total + (w * ce).sum() / (m.sum().double() + 1e-6)
        return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [2, 3])
@EVERY_IMPL
def test_values_and_gradients_over_three_calls(impl, count, masked):
    loss_fn = rplib.ReliableMutualLoss(impl=impl, prototypes="average", prototype_decay=DECAY)
    expected = Expected(count)
    mask = torch.rand(2, 7, 5, device=DEVICE) < 0.6 if masked else None
    for n, (logits, features) in enumerate(batches(count)):
        z, exact = leaves(logits), leaves(logits)
        loss = loss_fn(z, features, mask)
        truth = expected(exact, features, valid=mask)
        torch.testing.assert_close(loss.detach(), truth.detach(), rtol=1e-12, atol=0)
        loss.backward()
        for t, g in zip(z, torch.autograd.grad(truth, exact), strict=True):
            assert (t.grad - g).norm() <= 1e-12 * g.norm()
        alone = rplib.functional.reliable_mutual_loss(logits, features, mask, prototypes="batch", impl=impl)
        assert torch.isclose(loss, alone, rtol=1e-12, atol=0) == (n == 0)  # the first call is that of its batch


@EVERY_IMPL
def test_other_entries_take_the_same_averages(impl):
    """The objective, "none", and the maps, which update nothing."""
    objective = rplib.MutualObjective(impl=impl, prototypes="average", prototype_decay=DECAY, statistics=True)
    nothing_summed = rplib.ReliableMutualLoss(impl=impl, prototypes="average", prototype_decay=DECAY, reduction="none")
    target, expected = torch.randint(0, 3, (1, 7, 5), device=DEVICE), Expected(2)
    for logits, features in batches():
        before = copy.deepcopy(objective.mutual_loss.state_dict())
        found = objective.mutual_loss.reliability(logits, features)
        after = objective.mutual_loss.state_dict()
        assert before["averages.means"].numel() == 0 or torch.equal(before["averages.means"], after["averages.means"])
        truth = expected(logits, features)
        terms = objective(logits, features, target, 1.0)
        torch.testing.assert_close(terms.mutual, truth, rtol=1e-12, atol=0)
        costs = nothing_summed(logits, features)
        again = objective.mutual_loss.reliability(logits, features)
        numbers = torch.stack([pair.mask.sum() for pair in again]).double() + 1e-6
        torch.testing.assert_close((costs.sum(dim=(1, 2, 3)) / numbers).sum(), truth, rtol=1e-12, atol=0)
        assert all(p.prototypes.shape == (2, 3, f.shape[1]) for p, f in zip(again, features[::-1], strict=True))
        assert not any(torch.equal(a.weight, b.weight) for a, b in zip(found, again, strict=True)) or before == {}


def test_state_is_saved_loaded_copied_and_forgotten():
    first, second, third = batches(dtype=torch.float32)
    loss_fn = rplib.ReliableMutualLoss(prototypes="average")
    start = loss_fn(*first)
    loss_fn(*second)
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    loaded = rplib.ReliableMutualLoss(prototypes="average")
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied, whole = copy.deepcopy(loss_fn), rplib.MutualObjective(prototypes="average")
    whole.load_state_dict({f"mutual_loss.{name}": value for name, value in loss_fn.state_dict().items()})
    expected = loss_fn(*third)
    assert expected == loaded(*third) == copied(*third)
    assert whole(*third, torch.zeros(0, 7, 5), 1.0).mutual == expected
    loss_fn.reset_prototypes()
    assert loss_fn(*first) == start
    assert not rplib.ReliableMutualLoss().state_dict() and not rplib.MutualObjective().state_dict()  # as before


def test_evaluation_mode_updates_nothing_and_a_bad_batch_does_not_stay():
    first, second, third = batches(dtype=torch.float32)
    loss_fn = rplib.ReliableMutualLoss(prototypes="average")
    loss_fn(*first)
    kept = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    loss_fn.eval()
    loss_fn(*second)
    assert all(torch.equal(value, kept[name]) for name, value in loss_fn.state_dict().items())
    loss_fn.train()
    bad = [f.clone() for f in second[1]]
    bad[0][0, 0, 0, 0] = float("inf")
    assert not loss_fn(second[0], bad).isfinite()
    assert loss_fn.averages.means.isfinite().all()
    assert loss_fn(*third).isfinite()


def test_a_class_that_a_batch_lacks_keeps_its_mean():
    lacking, full, _ = batches(dtype=torch.float32)
    loss_fn = rplib.ReliableMutualLoss(prototypes="average", prototype_decay=0)
    loss_fn(*lacking)
    assert not loss_fn.averages.known[:, 2].any() and (loss_fn.averages.means[:, 2] == 0).all()
    loss_fn(*full)
    mean = loss_fn.averages.means[:, 2].clone()
    loss_fn(*lacking)
    assert loss_fn.averages.known.all() and mean.abs().sum() > 0
    assert torch.equal(loss_fn.averages.means[:, 2], mean)


@pytest.mark.parametrize("piece", [7, 1 << 16])
def test_half_precision_and_pieces(piece, monkeypatch):
    monkeypatch.setattr(lean_voxels, "_PIECE_CPU", piece)
    loss_fn, expected = rplib.ReliableMutualLoss(prototypes="average", prototype_decay=DECAY), Expected(2)
    for logits, features in batches(dtype=torch.bfloat16):
        exact = expected([z.double() for z in logits], [f.double() for f in features])
        torch.testing.assert_close(loss_fn(logits, features).double(), exact, rtol=1e-5, atol=0)


def test_compiled_after_a_first_call():
    torch._dynamo.reset()
    first, second, third = batches(dtype=torch.float32)
    eager, other = (rplib.ReliableMutualLoss(prototypes="average", impl="torch") for _ in range(2))
    eager(*first), other(*first)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (second, third):
        torch.testing.assert_close(compiled(*batch), eager(*batch), rtol=1e-6, atol=0)


def test_other_networks_than_before_and_no_state_in_functions():
    logits, features = batches()[0]
    loss_fn = rplib.ReliableMutualLoss(prototypes="average")
    loss_fn(logits, features)
    with pytest.raises(ValueError, match=r"2 networks, 3 classes and F = 6 .* 2, 3 and 5.*reset_prototypes"):
        loss_fn(logits, [f[:, :5] for f in features])
    for function in (rplib.functional.reliable_mutual_loss, rplib.reliability):
        with pytest.raises(ValueError, match=r"keeps state.*ReliableMutualLoss"):
            function(logits, features, prototypes="average")
    for decay in (1.0, -0.1, "slow"):
        with pytest.raises(ValueError, match="prototype_decay"):
            rplib.MutualObjective(prototypes="average", prototype_decay=decay)


# ------------------------------------------------------------------------------------------------------- sample weights


@pytest.mark.parametrize("options", [{}, {"weighting": None}, {"class_weights": (0.5, 1.0, 2.0), "prototypes": "batch"}])
@EVERY_IMPL
def test_sample_weights(impl, options):
    logits, features = networks((7, 5), 3, 6, batch=3, dtype=torch.float64, seed=1)
    factors = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64, device=DEVICE)
    z, exact = leaves(logits), leaves(logits)
    loss = rplib.functional.reliable_mutual_loss(z, features, sample_weights=factors.float(), impl=impl, **options)
    masks, weights, costs, _ = by_hand(exact, features, **options)
    total = ((costs * factors[None, :, None]).sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)).double() + 1e-6)).sum()
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=1e-12, atol=0)
    loss.backward()
    for t, g in zip(z, torch.autograd.grad(total, exact), strict=True):
        assert (t.grad - g).norm() <= 1e-12 * g.norm() and (t.grad[0] == 0).all()
    found = rplib.reliability(logits, features, sample_weights=factors.tolist(), impl=impl, **options)
    for m, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(m.weight.flatten(1), weight * factors[:, None], rtol=0, atol=1e-12)
    terms = rplib.MutualObjective(impl=impl, **options)(
        logits, features, torch.zeros(1, 7, 5, device=DEVICE), 1.0, sample_weights=factors
    )
    torch.testing.assert_close(terms.mutual, total.detach(), rtol=1e-12, atol=0)
    ones = rplib.functional.reliable_mutual_loss(logits, features, sample_weights=[1, 1, 1], impl=impl, **options)
    assert ones == rplib.functional.reliable_mutual_loss(logits, features, impl=impl, **options)


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ([1.0, 2.0], ValueError, r"shape \(2,\).*\(3,\)"),
        (torch.ones(3, 1), ValueError, r"shape \(3, 1\)"),
        ([1.0, -1.0, 1.0], ValueError, "non-negative"),
        ([1.0, float("nan"), 1.0], ValueError, "finite"),
        ("heavy", TypeError, "sample_weights is 'heavy'"),
        (torch.ones(3, dtype=torch.bool), TypeError, "bool"),
    ],
)
def test_sample_weights_that_do_not_fit(weights, error, text):
    logits, features = networks((4, 3), 2, 5, batch=3)
    weights = weights.to(DEVICE) if isinstance(weights, torch.Tensor) else weights
    with pytest.raises(error, match=text):
        rplib.ReliableMutualLoss()(logits, features, sample_weights=weights)


# ------------------------------------------------------------------------------------------------------------ two ranks


def _parts(samples):
    return [([z[samples].cpu() for z in logits], [f[samples].cpu() for f in features]) for logits, features in batches()]


def _work(rank: int, port: int, folder: str):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for impl in ANY_K_IMPLS:
        loss_fn = rplib.ReliableMutualLoss(impl=impl, prototypes="average", prototype_decay=DECAY, process_group="world")
        found = [loss_fn(*batch, sample_weights=[0.5 + rank]) for batch in _parts([rank])]
        results[impl] = found, loss_fn.state_dict()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
def test_two_ranks_keep_the_averages_of_the_whole_batch(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_work, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for impl in ANY_K_IMPLS:
        loss_fn = rplib.ReliableMutualLoss(impl=impl, prototypes="average", prototype_decay=DECAY)
        whole = [loss_fn(*batch, sample_weights=[0.5, 1.5]) for batch in _parts([0, 1])]
        for found, state in (results[impl] for results in ranks):
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
            torch.testing.assert_close(state, dict(loss_fn.state_dict()), rtol=1e-12, atol=1e-15)
