"""`method`: the paper's loss, its ablations and the peers, each against its formula and through the trainer."""

import pytest
import torch
from reference_tools import TINY, write_dataset

import rplib
from rplib.errors import UserError
from rplib.reference.config import METHODS, Config, load_recipe
from rplib.reference.reporting.run_log import read_metrics
from rplib.reference.training import trainer
from rplib.reference.training.methods import build_objective


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them takes as long as these trainings."""
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)


def networks(classes: int, dtype=torch.float64):
    random = torch.Generator().manual_seed(5)
    logits = [torch.randn(3, classes, 4, 5, 3, dtype=dtype, generator=random) * 2 for _ in range(2)]
    features = [torch.randn(3, 6, 4, 5, 3, dtype=dtype, generator=random) for _ in range(2)]
    target = torch.randint(0, classes, (2, 4, 5, 3), generator=random)
    return [z.requires_grad_() for z in logits], features, target


def which(p, i, j):
    """Where j is more confident: the lower entropy."""
    entropies = [-(q * (q + 1e-6).log()).sum(1) for q in p]
    return (entropies[i] > entropies[j]).double()


def how(p, features, j):
    """1 minus the mean squared difference of p_j and the cosine to its classes' mean features."""
    hard = torch.nn.functional.one_hot(p[j].argmax(1), p[j].shape[1]).double()  # (B, *spatial, C)
    prototypes = torch.einsum("bfxyz,bxyzc->bcf", features[j], hard)
    cosines = torch.nn.functional.cosine_similarity(features[j][:, None], prototypes[..., None, None, None], dim=2)
    return 1 - (cosines - p[j]).square().mean(1)


def by_hand(method: str, logits, features):
    """The term that the two decoders teach each other by, from the papers' formulas."""
    p = [z.softmax(1) for z in logits]
    total = torch.zeros((), dtype=torch.float64)
    for i, j in ((0, 1), (1, 0)):
        if method == "mutual-consistency":
            sharp = p[j] ** 10 / (p[j] ** 10).sum(1, keepdim=True)  # temperature 0.1
            total = total + (p[i] - sharp).square().mean()
            continue
        mask = which([q.detach() for q in p], i, j) if method in ("both", "which-only") else torch.ones_like(p[0][:, 0])
        weight = how([q.detach() for q in p], features, j) if method in ("both", "how-only") else 1.0
        entropy = torch.nn.functional.cross_entropy(logits[i], p[j].argmax(1), reduction="none")
        total = total + (mask * weight * entropy).sum() / mask.sum()
    return total


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_its_formula(method, classes):
    logits, features, target = networks(classes)
    config = Config(method=method, classes=classes)
    terms = build_objective(config)(logits, features, target, 0.3)
    expected = by_hand(method, logits, features)
    torch.testing.assert_close(terms.mutual, expected.detach(), rtol=1e-5, atol=0)
    supervised = rplib.MutualObjective(impl="naive")(logits, features, target, 0.0)
    torch.testing.assert_close(terms.dice, supervised.dice)
    ours = torch.autograd.grad(terms.total, logits)
    theirs = torch.autograd.grad(supervised.total + 0.3 * expected, logits)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "confidence", "weighting"),
    [
        ("both", "entropy", "similarity"),
        ("which-only", "entropy", None),
        ("how-only", None, "similarity"),
        ("cross-pseudo-supervision", None, None),
    ],
)
def test_each_ablation_leaves_out_one_question(method, confidence, weighting):
    keywords = Config(method=method).loss_keywords
    assert (keywords["confidence"], keywords["weighting"]) == (confidence, weighting)


def test_consistency_is_computed_in_float32_and_at_any_temperature():
    logits, features, target = networks(3, torch.float32)
    half = [z.detach().bfloat16() for z in logits]
    terms = build_objective(Config(method="mutual-consistency", classes=3, temperature=0.001))(half, features, target, 1.0)
    expected = sum(
        (half[i].float().softmax(1) - (half[j].float() / 0.001).softmax(1)).square().mean() for i, j in ((0, 1), (1, 0))
    )
    assert terms.mutual.dtype == torch.float32
    torch.testing.assert_close(terms.mutual, expected)


def test_every_method_trains_by_the_same_trainer(tmp_path):
    """Same crops and weights at first, so the same Dice; the other term is each method's own."""
    write_dataset(tmp_path / "data")
    first, last = {}, {}
    for method in METHODS:
        config = load_recipe("la-4", [*TINY, "iterations=2", f"method={method}"])
        trainer.train(config, tmp_path / "data", tmp_path / method, device="cpu")
        first[method], last[method] = read_metrics(tmp_path / method / "metrics.csv")
        assert load_recipe(tmp_path / method / "config.toml").method == method
    assert len({row.dice for row in first.values()}) == 1
    assert len({row.mutual for row in first.values()}) == len(METHODS)
    assert len({row.dice for row in last.values()}) == len(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["confidence=none"], "confidence is 'none'; expected one of: entropy, max_probability"),
        (["method=neither"], "method is 'neither'; expected one of: both, which-only, how-only, cross-pseudo-supervision"),
        (["method=cps"], "expected one of: both, which-only"),
        (["temperature=0"], "expected more than 0.0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError) as caught:
        load_recipe("la-8", arguments)
    assert message in str(caught.value)
