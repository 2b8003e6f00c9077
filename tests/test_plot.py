"""`rplib.plot` draws what `rplib.reliability` says; `rplib.unstack` and `rplib.regions` bring other outputs into its form."""

import subprocess
import sys

import pytest
import torch
from loss_cases import ANY_K_IMPLS, networks
from test_loss_objective import true_dice
from truth import leaves, truth

import rplib

# ------------------------------------------------------------------------------------------------- pictures


def sheet(spatial, count=2, **keywords):
    plot = pytest.importorskip("matplotlib") and __import__("rplib.plot").plot
    logits, features = networks(spatial, 3, 6, count=count)
    image = torch.randn(2, 1, *spatial)
    logits, features = [z.cpu() for z in logits], [f.cpu() for f in features]
    return plot.reliability_sheet(image, logits, features, **keywords), logits, features, image


def panels(figure):
    return {a.get_title(): a.images[0].get_array().data for a in figure.axes if a.images and a.get_title()}


@pytest.mark.parametrize("count", [2, 3])
def test_every_panel_holds_its_map(count):
    figure, logits, features, image = sheet((9, 7), count, sample=1)
    drawn = panels(figure)
    assert torch.equal(torch.tensor(drawn["image"]), image[1, 0].T)
    maps = rplib.reliability(logits, features)
    for k in range(count):
        of = [m for m in maps if m.teacher == k]
        which = torch.stack([m.mask[1] for m in of]).any(0)
        assert torch.equal(torch.tensor(drawn[f"which: network {k} teaches"]), which.float().T)
        how = torch.stack([m.weight[1] for m in of]).amax(0)
        torch.testing.assert_close(torch.tensor(drawn[f"how: weight of network {k}"]), how.T)
        assert torch.equal(torch.tensor(drawn[f"pseudo-labels {k}"]), logits[k][1].argmax(0).float().T)
        entropy = torch.distributions.Categorical(logits=logits[k][1].movedim(0, -1)).entropy()
        torch.testing.assert_close(torch.tensor(drawn[f"entropy of network {k}"]), entropy.T, rtol=1e-4, atol=1e-5)


def test_a_volume_shows_the_slice_with_most_to_teach_or_the_one_asked_for(tmp_path):
    figure, logits, features, image = sheet((6, 5, 4), weighting=None, file=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    taught = torch.stack([m.mask[0] for m in rplib.reliability(logits, features)]).any(0).sum((0, 1))
    assert f"slice {int(taught.argmax())}" in figure.get_suptitle()
    figure, logits, features, image = sheet((6, 5, 4), index=-1, target=torch.ones(2, 1, 6, 5, 4))
    drawn = panels(figure)
    assert torch.equal(torch.tensor(drawn["image"]), image[0, 0, ..., 3].T)
    assert (drawn["target"] == 1).all() and "slice 3" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"sample": 2}, "sample is 2"),
        ({"index": 4}, "index is 4"),
        ({"target": torch.ones(2, 5, 5, 4)}, r"target.*\(2, 1, 5, 5, 4\)"),
    ],
)
def test_pictures_of_what_is_not_there(keywords, text):
    with pytest.raises(ValueError, match=text):
        sheet((6, 5, 4), **keywords)


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, rplib, rplib.plot\n"
        "z = [torch.randn(1, 2, 4, 4)] * 2\n"
        "try:\n    rplib.plot.reliability_sheet(z[0], z, z)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "rplib[reference]" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("spatial", [(9,), (5, 4), (5, 4, 3)])
def test_unstack(spatial):
    stacks = [torch.randn(2, 3, 4, *spatial) for _ in range(2)]
    levels = rplib.unstack(stacks)
    assert len(levels) == 3
    assert all(torch.equal(levels[s][k], stacks[k][:, s]) for s in range(3) for k in range(2))
    lists = [[torch.randn(2, 4, 8), torch.randn(2, 4, 4)] for _ in range(2)]
    assert rplib.unstack(lists)[1][0] is lists[0][1]
    with pytest.raises(ValueError, match=r"\[3, 2\] levels"):
        rplib.unstack([stacks[0], stacks[1][:, :2]])
    with pytest.raises(TypeError, match="outputs is a Tensor"):
        rplib.unstack(stacks[0])


@pytest.mark.parametrize("weighting", ["similarity", None])
def test_a_stack_is_no_volume(weighting):
    """(B, levels, C, X, Y) has the axes of 3-D logits: target or features show what it is, and the error names the helper."""
    stacks = [torch.randn(2, 3, 4, 6, 5, requires_grad=True) for _ in range(2)]
    features = [torch.randn(2, 8, 6, 5) for _ in range(2)]
    target = torch.randint(0, 4, (1, 6, 5))
    objective = rplib.MutualObjective(weighting=weighting)
    with pytest.raises(ValueError, match=r"rplib\.unstack"):
        objective(stacks, None if weighting is None else features, target, 0.1)
    with pytest.raises(ValueError, match=r"rplib\.unstack"):
        rplib.ReliableMutualLoss(weighting=weighting)(stacks, features)
    with pytest.raises(ValueError, match=r"rplib\.unstack"):
        rplib.ReliableMutualLoss(weighting=None)([torch.randn(2, 3, 4, 6, 5, 4)] * 2)
    objective(rplib.unstack(stacks)[0], features, target, 0.1).total.backward()
    assert stacks[0].grad[:, 0].abs().sum() > 0 and (stacks[0].grad[:, 1:] == 0).all()


@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_regions_are_binary_problems_of_the_sigmoid(impl):
    logits, features = networks((6, 5, 4), 3, 6, dtype=torch.float64)
    target = torch.randint(0, 2, (1, 3, 6, 5, 4), device=logits[0].device)
    z = leaves(logits)
    problems = rplib.regions(z)
    for r, pair in enumerate(problems):
        for own, given in zip(pair, z, strict=True):
            torch.testing.assert_close(own.softmax(1)[:, 1], given[:, r].sigmoid())
    terms = [rplib.MutualObjective(impl=impl)(pair, features, t, 0.3) for pair, t in zip(problems, target.unbind(1), strict=True)]
    total = torch.stack([term.total for term in terms]).mean()
    expected = []
    for r in range(3):
        pair = [torch.stack([torch.zeros_like(t[:, r]), t[:, r]], 1) for t in logits]
        dice = sum(true_dice(t, target[:, r], (1,)) for t in pair)
        expected.append(0.5 * dice + 0.3 * truth(pair, features).loss)
    torch.testing.assert_close(total.detach(), torch.stack(expected).mean(), rtol=1e-12, atol=0)
    total.backward()
    assert all((t.grad[:, r].abs().sum() > 0) for t in z for r in range(3))
    with pytest.raises(TypeError, match="logits is a Tensor"):
        rplib.regions(logits[0])
