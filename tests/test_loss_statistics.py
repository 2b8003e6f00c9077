"""`MutualObjective(statistics=True)`: the statistics from the passes of the loss, against counts by hand."""

import pytest
import torch
from loss_cases import ANY_K_IMPLS, DEVICE, TRITON, networks
from test_loss_compile import SYNCHRONISING, Recorder
from truth import leaves, truth

import rplib
from rplib import lean_voxels

PLAIN_IMPL = pytest.mark.parametrize("impl", ANY_K_IMPLS)


def by_hand(logits, features, keep=None, students=None, **keywords):
    """The five fields from the float64 formula; ``keep``: (B, *spatial) bool."""
    exact = truth(logits, features, **keywords)
    keep = torch.ones_like(exact.pairs[0].mask) if keep is None else keep
    pairs = [p for p in exact.pairs if students is None or p.student in students]
    labels = [z.argmax(1)[keep] for z in logits]
    different = [(labels[i] != labels[j]).double().mean() for i in range(len(labels)) for j in range(i)]
    return rplib.ObjectiveStatistics(
        torch.stack([p.mask[keep].double().mean() for p in pairs]),
        torch.stack([p.weight[keep].sum() / max(p.mask[keep].sum().item(), 1) for p in pairs]),
        torch.stack([p.loss for p in pairs]),
        torch.stack([torch.stack([(y == c).double().mean() for c in range(logits[0].shape[1])]) for y in labels]),
        torch.stack(different).mean(),
    )


def assert_same(ours, exact, tolerance):
    for name, a, b in zip(ours._fields, ours, exact, strict=True):
        assert not a.requires_grad and a.shape == b.shape, name
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("keywords", [{}, {"confidence": None, "weighting": None}, {"weighting": None}], ids=str)
@pytest.mark.parametrize(("count", "classes", "piece"), [(2, 2, 1 << 16), (2, 4, 50), (3, 3, 1 << 16)])
@PLAIN_IMPL
def test_against_counts_by_hand(impl, count, classes, piece, keywords, monkeypatch):
    monkeypatch.setattr(lean_voxels, "_PIECE_CPU", piece)
    logits, features = networks((7, 5, 3), classes, 6, batch=3, count=count, dtype=torch.float64)
    target = torch.randint(0, classes, (1, 7, 5, 3), device=DEVICE)
    given = None if keywords.get("weighting", "") is None else features
    total, dice, mutual, statistics = rplib.MutualObjective(impl=impl, statistics=True, **keywords)(logits, given, target, 0.3)
    assert_same(statistics, by_hand(logits, features, **keywords), 1e-12)
    torch.testing.assert_close(statistics.mutual.sum(), mutual, rtol=1e-12, atol=0)
    plain = rplib.MutualObjective(impl=impl, **keywords)(logits, given, target, 0.3)
    assert len(plain) == 3 and all(torch.equal(a, b) for a, b in zip(plain, (total, dice, mutual), strict=True))


@PLAIN_IMPL
def test_under_a_mask_and_with_students(impl):
    logits, features = networks((40,), 3, 6, batch=1, count=3, dtype=torch.float64)
    mask = torch.rand(1, 40, device=DEVICE) < 0.7
    target = torch.zeros(0, 40, dtype=torch.int64, device=DEVICE)
    objective = rplib.MutualObjective(impl=impl, statistics=True, students=(0, 2))
    ours = objective(leaves(logits), features, target, 1.0, mask=mask).statistics
    left = [z[..., mask[0]] for z in logits], [f[..., mask[0]] for f in features]
    assert_same(ours, by_hand(*left, students=(0, 2)), 1e-12)
    nothing = objective(logits, features, target, 1.0, mask=torch.zeros_like(mask)).statistics
    assert all((t == 0).all() for t in nothing)


def test_neither_another_pass_nor_a_synchronisation():
    """The operators over voxels are those without statistics, plus counts of labels; nothing looks at a value."""
    logits, features = networks((40, 30), 3, 6)
    target = torch.randint(0, 3, (1, 40, 30), device=DEVICE)
    names = {}
    for statistics in (False, True):
        objective = rplib.MutualObjective(impl="torch", statistics=statistics)
        with Recorder() as recorder:
            objective(leaves(logits), features, target, 0.3).total.backward()
        names[statistics] = recorder.names
    for heavy in ("aten.exp.default", "aten.max.dim", "aten.log1p.default", "aten.sqrt.default", "aten.bmm.default"):
        assert names[True].count(heavy) == names[False].count(heavy), heavy
    looks = [[n for n in found if any(word in n for word in SYNCHRONISING)] for found in names.values()]
    assert looks[0] == looks[1], "on a CPU the labels are looked at, and nothing else"


def test_compiled_together():
    logits, features = networks((6, 5), 3, 6)
    target = torch.randint(0, 3, (1, 6, 5), device=DEVICE)
    objective = rplib.MutualObjective(impl="torch", statistics=True)
    weight = torch.tensor(0.3, device=DEVICE)
    eager = objective(logits, features, target, weight)
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(leaves(logits), features, target, weight)
    compiled.total.backward()
    for a, b in zip([*eager[:3], *eager.statistics], [*compiled[:3], *compiled.statistics], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow_cases(
    "triton-18-*", "triton-4-dtype1-spatial1-{'weighting': None}", "triton-2-dtype0-spatial0-{'weighting': None}"
)
@pytest.mark.parametrize("keywords", [{}, {"confidence": None, "weighting": None}, {"weighting": None}], ids=str)
@pytest.mark.parametrize(
    ("classes", "dtype", "spatial"), [(2, torch.float32, (7, 5, 3)), (4, torch.bfloat16, (67,)), (18, torch.float32, (1,))]
)
@pytest.mark.parametrize("impl", [TRITON])
def test_of_the_kernels(impl, classes, dtype, spatial, keywords):
    """From the partial sums of the same five launches; the three terms keep their bits."""
    logits, features = networks(spatial, classes, 6, batch=3, dtype=dtype)
    target = torch.randint(0, classes, (1, *spatial), device=DEVICE)
    given = None if keywords.get("weighting", "") is None else features
    objective = rplib.MutualObjective(impl=impl, statistics=True, **keywords)
    z = leaves(logits)
    terms = objective(z, given, target, 0.3)
    terms.total.backward()
    assert_same(terms.statistics, by_hand(logits, features, **keywords), 2e-6)
    plain = rplib.MutualObjective(impl=impl, **keywords)(logits, given, target, 0.3)
    assert len(plain) == 3 and all(torch.equal(a, b) for a, b in zip(plain, terms[:3], strict=True))
    again = objective(logits, given, target, 0.3).statistics
    assert all(torch.equal(a, b) for a, b in zip(terms.statistics, again, strict=True))
