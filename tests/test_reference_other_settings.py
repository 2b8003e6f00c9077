"""Settings other than the defaults reach what they name, by hand: SGD, schedule, seeds, crops, tolerances, rounding."""

import itertools
import math
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from reference_tools import TINY, mistake, write_case, write_dataset
from test_reference_batches import numbered
from torch import nn

from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.config import Config, load_recipe
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.evaluation.metrics import assd, hd95, score
from rplib.reference.reporting.run_log import read_metrics
from rplib.reference.training import trainer
from rplib.reference.training.batches import Crop, TwoStreamBatches, cut, padding
from rplib.reference.training.step import training_step
from rplib.reference.training.validation import case_dice


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them takes as long as these trainings."""
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root)
    return root


def settings(*overrides: str) -> Config:
    return load_recipe("la-4", [*TINY, *overrides])


# -------------------------------------------------------------------------------------------------------- optimisation


def test_the_weights_follow_sgd_with_momentum_and_weight_decay(data, tmp_path, monkeypatch):
    """v = momentum * v + (g + weight_decay * w); w = w - rate * v, in float64 beside the training."""
    momentum, decay, rate, n = 0.7, 0.03, 0.02, 4
    seen = []

    def step(network, *rest):
        before = [p.detach().clone() for p in network.parameters()]
        terms = training_step(network, *rest)
        seen.append((before, [p.grad.clone() for p in network.parameters()], [p.detach().clone() for p in network.parameters()]))
        return terms

    monkeypatch.setattr(trainer, "training_step", step)
    config = settings(f"momentum={momentum}", f"weight_decay={decay}", f"learning_rate={rate}", f"iterations={n}",
                      "schedule=polynomial")  # fmt: skip
    trainer.train(config, data, tmp_path / "run", device="cpu")
    speed = [torch.zeros_like(w, dtype=torch.float64) for w in seen[0][0]]
    for t, (before, gradients, after) in enumerate(seen, 1):
        now = rate * (1 - (t - 1) / n) ** 0.9
        for v, w, g, found in zip(speed, before, gradients, after, strict=True):
            v.mul_(momentum).add_(g.double() + decay * w.double())
            assert torch.allclose(found.double(), w.double() - now * v, rtol=1e-5, atol=1e-7)
    assert len(seen) == n


def test_the_polynomial_rate_begins_with_the_rate_and_never_reaches_zero(data, tmp_path):
    for schedule, factor in (("polynomial", lambda t: (1 - (t - 1) / 12) ** 0.9), ("constant", lambda t: 1.0)):
        trainer.train(settings(f"schedule={schedule}", "learning_rate=0.05"), data, tmp_path / schedule, device="cpu")
        rows = read_metrics(tmp_path / schedule / "metrics.csv")
        assert [row.learning_rate for row in rows] == pytest.approx([0.05 * factor(t) for t in range(1, 13)], rel=1e-12)


def test_a_step_is_one_of_its_own_gradient_alone():
    """What an earlier step left in the gradients is gone; the update is that of this loss, and the terms are detached."""
    network = nn.Conv3d(1, 2, 1, bias=False)
    images, labels = torch.randn(2, 1, 2, 2, 2), torch.zeros(1, 2, 2, 2)

    class TwoDecoders(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = network

        def forward(self, x):
            return [self.one(x), self.one(x)], [x, x]

    def objective(logits, features, labels, weight):
        total = sum((z * z).mean() for z in logits) * weight
        return SimpleNamespace(total=total, dice=total.detach() + 1, mutual=total.detach() + 2)

    model = TwoDecoders()
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    network.weight.grad = torch.full_like(network.weight, 1e6)
    before = network.weight.detach().clone()
    expected = torch.autograd.grad(2 * (network(images) ** 2).mean() * 3.0, network.weight)[0]
    terms = training_step(model, objective, optimiser, images, labels, 3.0)
    assert torch.allclose(network.weight.detach(), before - 0.5 * expected, atol=1e-6)
    assert not any(term.requires_grad for term in terms)
    assert torch.allclose(terms[1] - 1, terms[0]) and torch.allclose(terms[2] - 2, terms[0])


def test_autocast_covers_the_networks_forward_pass_and_nothing_else():
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 2)

        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return [self.one(x)], [x]

    def objective(logits, *_):
        seen.append((torch.is_autocast_enabled("cpu"), logits[0].dtype))
        total = logits[0].float().mean()
        return SimpleNamespace(total=total, dice=total.detach(), mutual=total.detach())

    network = Network()
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    training_step(network, objective, optimiser, torch.zeros(1, 2), torch.zeros(1), 1.0, torch.bfloat16)
    training_step(network, objective, optimiser, torch.zeros(1, 2), torch.zeros(1), 1.0)
    assert seen == [True, (False, torch.bfloat16), False, (False, torch.float32)]


# --------------------------------------------------------------------------------------------------------------- seeds


def test_the_seed_decides_weights_and_crops(data, tmp_path):
    def first(seed):
        """Weights before the first step (a rate of next to nothing), names and losses of a training."""
        config = settings(f"seed={seed}", "iterations=2", "learning_rate=1e-30", "weight_decay=0", "dropout=0")
        run = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        trainer.train(config, data, run, device="cpu")
        weights = checkpoint.load(run / "last.pt")["network"]["encoder.block_one.conv.0.weight"]
        return weights, [row._replace(seconds=0) for row in read_metrics(run / "metrics.csv")]

    one, again, other = first(5), first(5), first(6)
    assert torch.equal(one[0], again[0]) and one[1] == again[1]
    assert not torch.equal(one[0], other[0]) and one[1] != other[1]
    torch.manual_seed(5)
    plain = checkpoint.build_network(settings()).state_dict()["encoder.block_one.conv.0.weight"]
    assert torch.allclose(one[0], plain, atol=1e-6)


def test_each_stream_has_a_generator_of_its_own_from_the_seed():
    config = Config(patch=(16, 16, 16), stride=(16, 16, 16), seed=77)
    batches = TwoStreamBatches([numbered("L")] * 4, [numbered("U", labelled=False)] * 4, config)
    states = [stream.random.bit_generator.state for stream in batches._streams]
    assert states == [np.random.default_rng([77, index]).bit_generator.state for index in (0, 1)]
    crops = [batches.draw().crops for _ in range(20)]
    assert any([c.start for c in labelled] != [c.start for c in unlabelled] for labelled, unlabelled in crops)


def test_seeds_of_several_numbers_differ():
    seeds = {trainer._seed(*numbers) for numbers in itertools.product(range(6), range(6), range(6))}
    assert len(seeds) == 6**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert trainer._seed(1337, 1) != trainer._seed(1337, 2) != trainer._seed(1, 1337)


# --------------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
@pytest.mark.parametrize(
    ("shape", "patch"), [((9, 14, 7), (16, 8, 8)), ((5, 6, 3), (8, 9, 4)), ((20, 8, 8), (8, 8, 8)), ((7, 5), (6, 6))]
)
def test_a_crop_is_the_turned_and_padded_volume_s(shape, patch, device):
    """Against NumPy's own swap, flip and pad, for every symmetry and every start."""
    volume = np.random.default_rng(0).random((2, *shape), np.float32)
    for swapped, back in itertools.product((False, True), itertools.product((False, True), repeat=2)):
        turned = volume.swapaxes(1, 2) if swapped else volume
        for axis in range(2):
            turned = np.flip(turned, 1 + axis) if back[axis] else turned
        wide = np.pad(turned, [(0, 0)] + [(20, 20)] * len(shape))
        sizes = zip(turned.shape[1:], patch, strict=True)
        for start in itertools.product(*[sorted({-3, -1, 0, 1, max(n - e, 0), n - e + 2}) for n, e in sizes]):
            expected = wide[(slice(None), *(slice(20 + s, 20 + s + e) for s, e in zip(start, patch, strict=True)))]
            out = np.full((2, *patch), np.nan, np.float32)
            source = volume if device is None else torch.from_numpy(volume)
            target = out if device is None else torch.from_numpy(out)
            cut(source, Crop(0, swapped, back, start), patch, target)
            assert np.array_equal(out, expected), (swapped, back, start)


def test_padding_puts_the_odd_voxel_behind():
    assert padding((5, 8, 12), (8, 8, 8)) == [(1, 2), (0, 0), (0, 0)]
    assert padding((4, 7, 1), (8, 8, 8)) == [(2, 2), (0, 1), (3, 4)]
    assert padding((5, 8, 12), (8, 8, 8), as_authors=True) == [(4, 4), (3, 3), (1, 1)]
    assert padding((9, 9, 12), (8, 8, 8), as_authors=True) == [(0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("protocol", ["held-out", "paper"])
def test_starts_of_turned_crops_reach_both_ends_of_the_turned_volume(protocol):
    """A long first axis lies along the second where the crop is swapped; short axes are padded before and behind."""
    shape, patch = (40, 19, 13), (16, 16, 16)
    config = Config(patch=patch, stride=patch, protocol=protocol)
    batches = TwoStreamBatches([numbered("L", shape)] * 2, [numbered("U", shape, False)] * 2, config)
    authors = protocol == "paper"
    found: dict[bool, list] = {False: [], True: []}
    for _ in range(600):
        for crop in (crop for stream in batches.draw().crops for crop in stream):
            found[crop.swapped].append(crop.start)
    for swapped, starts in found.items():
        turned = (shape[1], shape[0], shape[2]) if swapped else shape
        for axis, (size, (before, after)) in enumerate(zip(turned, padding(turned, patch, authors), strict=True)):
            last = before + size + after - patch[axis] - authors  # the authors never draw the last one
            assert {s[axis] for s in starts} == set(range(-before, last - before + 1)), (swapped, axis)


# ---------------------------------------------------------------------------------------------------------- validation


class Fixed(nn.Module):
    """Gives the logits that lie in the image's channels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return [x, -x], [x, x]


def test_validation_is_the_mean_over_classes_of_each_case():
    random = np.random.default_rng(2)
    found, expected = [], []
    config = Config(classes=4, in_channels=4, patch=(16, 16, 16), stride=(16, 16, 16), dataset="generic")
    for index in range(3):
        truth = random.integers(0, 4, (16, 16, 16)).astype(np.uint8)
        ours = np.where(random.random(truth.shape) < 0.3, random.integers(0, 4, truth.shape), truth)
        if index == 2:
            ours[ours == 3] = 0  # a class that is missed counts 0
        found.append(Case(f"{index}", np.moveaxis(np.eye(4, dtype=np.float32)[ours], -1, 0).copy(), truth))
        dice = [2 * ((ours == c) & (truth == c)).sum() / ((ours == c).sum() + (truth == c).sum()) for c in (1, 2, 3)]
        expected.append(np.mean(dice))
    assert case_dice(Fixed(), found, config, torch.device("cpu")) == pytest.approx(expected, rel=1e-12)
    assert expected[2] < 0.7


def test_validation_leaves_out_a_class_that_is_nowhere():
    config = Config(classes=3, in_channels=3, patch=(16, 16, 16), stride=(16, 16, 16), dataset="generic")
    cases = []
    for truth, ours in (((0, 1), (0, 1)), ((0, 0), (0, 0)), ((0, 0), (0, 2)), ((0, 2), (0, 0))):
        image = np.moveaxis(np.eye(3, dtype=np.float32)[np.array(ours).repeat(2048)].reshape(16, 16, 16, 3), -1, 0).copy()
        cases.append(Case("x", image, np.array(truth, np.uint8).repeat(2048).reshape(16, 16, 16)))
    found = case_dice(Fixed(), cases, config, torch.device("cpu"))
    assert found == pytest.approx([1.0, math.nan, 0.0, 0.0], nan_ok=True)  # alike; background alone; invented; missed
    paper = case_dice(Fixed(), cases, config.replace(protocol="paper", labelled=8), torch.device("cpu"))
    assert paper == pytest.approx([0.5, 0.0, 0.0, 0.0])


# ----------------------------------------------------------------------------------------------- rounding and tolerances


def nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


@pytest.mark.parametrize(("labelled", "held_out"), [(2, 1), (7, 1), (8, 2), (12, 2), (13, 3), (17, 3), (18, 4)])
def test_a_fifth_of_the_labelled_cases_is_held_out_to_the_nearest(tmp_path, labelled, held_out):
    for index in range(labelled + 2):
        for folder in ("images", "labels") if index < labelled else ("images",):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"c{index:02d}.nii").touch()
    dataset = open_dataset(tmp_path, "generic", channels=1, dims=3)
    test, train = dataset.names("test"), dataset.names("train")
    assert len(test) == held_out and len(train) == labelled + 2 - held_out
    assert not set(test) & set(train) and not {f"c{labelled:02d}", f"c{labelled + 1:02d}"} & set(test)
    assert train[-2:] == [f"c{labelled:02d}", f"c{labelled + 1:02d}"]  # unlabelled ones last


@pytest.mark.parametrize(("shift", "fits"), [(0.0, True), (0.24, True), (0.26, False), (-0.24, True), (-0.26, False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_image_and_label_lie_within_a_quarter_of_the_smallest_voxel(tmp_path, shift, fits, axis):
    image = np.random.default_rng(0).random((4, 4, 4)).astype(np.float32)
    affine = np.diag([2.0, 0.5, 1.0, 1.0])  # the smallest edge is 0.5
    moved = affine.copy()
    moved[axis, 3] += shift * 0.5
    nifti(tmp_path / "images" / "a.nii", image, affine)
    nifti(tmp_path / "labels" / "a.nii", (image > 0.5).astype(np.uint8), moved)
    dataset = open_dataset(tmp_path, "generic")
    if fits:
        assert dataset.load("a").label is not None
    else:
        with pytest.raises(UserError, match="mm at the corners"):
            dataset.load("a")


def test_distances_scale_with_each_axis_of_the_spacing():
    for axis in range(3):
        a, b = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
        a[4, 4, 4] = True
        b[tuple(4 + 3 * (k == axis) for k in range(3))] = True
        spacing = (0.5, 2.0, 7.0)
        found = score(a, b, spacing)
        assert (found.hd95, found.asd, found.hd95_mm, found.asd_mm) == (3, 3, 3 * spacing[axis], 3 * spacing[axis])
        assert hd95(a, b, spacing) == assd(a, b, spacing) == 3 * spacing[axis]


# ------------------------------------------------------------------------------------------------- what a training needs


@pytest.mark.parametrize(
    ("bare", "overrides"),
    [("CASE01", []), ("CASE02", ["validation=1"]), ("CASE06", ["protocol=paper", "validate_from=1"])],
    ids=["labelled", "validation", "test under paper"],
)
def test_a_case_that_needs_a_label_is_refused_before_the_first_step(tmp_path, capsys, monkeypatch, bare, overrides):
    write_dataset(tmp_path / "data")
    path = write_case(tmp_path / "data", bare, image=np.random.default_rng(0).random((20, 18, 17), np.float32))
    monkeypatch.setattr(trainer, "training_step", lambda *_: 1 / 0)
    arguments = ["train", "--recipe", "la-4", "--data", tmp_path / "data", "--out", tmp_path / "run", "--set", *TINY, *overrides]
    assert f"{path} lacks the key 'label'" in mistake(capsys, *arguments)


def test_nothing_is_said_of_a_validation_where_there_is_none(data, tmp_path, capsys):
    trainer.train(settings("iterations=1"), data, tmp_path / "run", device="cpu")
    assert "validation" not in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / "best.pt")["chosen_by"] == "last iteration"
