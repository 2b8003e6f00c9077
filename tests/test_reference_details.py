"""Details that only a change of the source had shown to be unproven: equal chances, devices, dtypes, messages, what is kept."""

import numpy as np
import pytest
import torch
from loss_cases import networks
from reference_tools import TINY, mistake, write_dataset
from test_reference_batches import numbered
from truth import compare

import rplib
from rplib import lean
from rplib.errors import Terminated, UserError
from rplib.options import Options
from rplib.reference import checkpoint
from rplib.reference.config import Config, load_recipe
from rplib.reference.evaluation import metrics
from rplib.reference.inference import windows
from rplib.reference.training import trainer
from rplib.reference.training.batches import TwoStreamBatches, padding
from rplib.reference.training.distributed import Ranks

PATCH = (16, 16, 16)


def batches(device=None, **settings) -> TwoStreamBatches:
    config = Config(patch=PATCH, stride=PATCH, **settings)
    return TwoStreamBatches([numbered("L")] * 4, [numbered("U", labelled=False)] * 4, config, device=device)


# ------------------------------------------------------------------------------------------------------------- batches


def test_half_of_the_symmetries_that_are_drawn_are_reflections():
    """Of 4,000: 2,000 with a standard deviation of 32. Rotations swap and reverse an even number of times together."""
    drawn = batches()
    crops = [crop for _ in range(1000) for stream in drawn.draw().crops for crop in stream]
    assert len(crops) == 4000
    assert abs(sum((crop.swapped + sum(crop.reversed)) % 2 for crop in crops) - 2000) < 130


def test_without_augmentation_nothing_is_turned():
    drawn = batches(augmentation="none")
    crops = [crop for _ in range(20) for stream in drawn.draw().crops for crop in stream]
    assert {(crop.swapped, crop.reversed) for crop in crops} == {(False, (False, False))}


def test_volumes_on_a_device_give_the_batches_of_volumes_in_ram():
    in_ram, there = batches(), batches(torch.device("cpu"))
    for _ in range(3):
        a, b = in_ram.next(), there.next()
        assert a.names == b.names and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_memory_is_pinned_in_ram_alone(monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **keywords: asked.append(keywords) or empty(*size, dtype=keywords.get("dtype"))
    )
    for device in (None, torch.device("cpu")):
        drawn = batches(device)
        drawn.cut(drawn.draw(), pinned=True)
    where = [{key: value for key, value in words.items() if key != "dtype"} for words in asked]
    assert where == [{"pin_memory": True}] * 2 + [{"device": torch.device("cpu")}] * 2


def test_a_state_of_other_streams_is_refused():
    alone = TwoStreamBatches([numbered("L")] * 4, [], Config(patch=PATCH, stride=PATCH, batch_size=2, labelled_per_batch=2))
    with pytest.raises(ValueError, match="zip"):
        batches().restore(alone.state())
    with pytest.raises(ValueError, match="zip"):
        padding((5, 8), PATCH)


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("metric", [metrics.dice, metrics.jaccard, metrics.hd95, metrics.asd, metrics.assd, metrics.score])
def test_a_metric_names_prediction_and_truth_in_their_order(metric):
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\) but truth has \(3,\)"):
        metric(np.ones(2), np.ones(3))


# ----------------------------------------------------------------------------------------------------------- inference


def test_two_classes_are_decided_by_the_foreground_alone():
    """As the paper's threshold, whatever the background's average says."""
    probability = torch.tensor([[0.75, 0.25, 0.5], [0.7, 0.45, 0.5]])
    label, score = windows._decide(probability)
    assert label.tolist() == [1, 0, 0] and torch.equal(score, probability[1])


@pytest.mark.parametrize(
    ("weights", "autocast", "computed", "error"),
    [(torch.float32, None, torch.float32, 1e-6), (torch.float32, torch.bfloat16, torch.float32, 1e-6),
     (torch.float32, torch.float16, torch.float32, 1e-6), (torch.float64, None, torch.float64, 1e-14)],
)  # fmt: skip
def test_probabilities_are_averaged_in_float32_under_autocast_and_else_in_the_networks_type(weights, autocast, computed, error):
    """The softmax too: of two bfloat16 logits it would be off by 1e-3, of float64 ones in float32 by 1e-8."""

    class Pointwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Conv3d(1, 2, 1)

        def forward(self, windows):
            self.logits = self.head(windows)
            return [self.logits, -self.logits], []

    image, network = np.random.default_rng(0).normal(size=PATCH).astype(np.float32), Pointwise().to(weights).eval()
    with torch.inference_mode():
        averages = windows._averages(network, image, PATCH, PATCH, 1, "cpu", windows.OUTPUTS, autocast)
    assert network.logits.dtype == (autocast or weights)
    exact = network.logits.double().softmax(1)[0]
    for name, expected in ((windows.DECODER_1, exact), (windows.MEAN, torch.full_like(exact, 0.5))):
        assert averages[name].dtype == computed
        assert (averages[name].double() - expected).abs().max() <= error


# ---------------------------------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize(
    ("content", "what"), [([1, 2], "a list;"), ({1: torch.zeros(1)}, "a dict with keys other than text;"), (3, "a int;")]
)
def test_a_checkpoint_of_something_else_says_of_what(tmp_path, content, what):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"other.pt contains {what}"):
        checkpoint.load(tmp_path / "other.pt")


def test_checkpoints_are_read_onto_the_cpu(tmp_path, monkeypatch):
    """Wherever they were written."""
    torch.save({"network": {}}, tmp_path / "a.pt")
    genuine, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *words, **named: asked.append(named) or genuine(*words, **named))
    checkpoint.load(tmp_path / "a.pt")
    assert asked == [{"map_location": "cpu", "weights_only": True}]


# -------------------------------------------------------------------------------------------------------------- trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root)
    return root


def train(data, out, *settings: str) -> None:
    config = load_recipe("la-4", [*TINY, "iterations=2", *settings])
    trainer.train(config, data, out, device="cpu")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)


def test_a_validation_that_finds_nothing_says_what_best_holds(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "case_dice", lambda network, cases, *_: [0.0] * len(cases))
    train(data, tmp_path / "run", "validation=1")
    assert "no validation gave a Dice above 0: best.pt contains the last weights" in capsys.readouterr().err
    train(data, tmp_path / "none", "validation=0")
    assert "no validation" not in capsys.readouterr().err


def test_a_state_that_cannot_be_restored_names_the_checkpoint(data, tmp_path, capsys):
    train(data, tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    checkpoint.save(last, {**checkpoint.load(last), "batches": "[]"})
    told = mistake(capsys, "train", "--resume", "--out", tmp_path / "run", "--set", "iterations=3")
    assert told.startswith(f"{last} is not a readable checkpoint (") and "use another one or train again" in told


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_loss_is_tried_with_the_types_and_sizes_of_the_training(monkeypatch, amp, dtype):
    seen = []

    def objective(logits, features, target, weight):
        seen.extend((*logits, *features))

    monkeypatch.setattr(trainer, "build_objective", lambda _: objective)
    trainer._try_objective(Config(amp=amp, classes=3, filters=5, patch=(16, 16), stride=(16, 16)), torch.device("cpu"))
    assert [tuple(t.shape[:2]) for t in seen] == [(1, 3)] * 2 + [(1, 5)] * 2
    assert {(t.dtype, t.ndim) for t in seen} == {(dtype, 4)}


def test_seeds_of_several_numbers_stay_what_they_are():
    """A run that was begun by an earlier version resumes with the same random numbers."""
    assert [trainer._seed(*numbers) for numbers in ((1337, 1), (1337, 1, 500), (0,))] == [
        8311963500192281539, 1983992414098049721, 7896617691693857887,
    ]  # fmt: skip


def rank(number, data, out, *settings: str) -> trainer.Training:
    """The training of one of two ranks, which hears nothing of the other."""
    config = load_recipe("la-4", [*TINY, "batch_size=4", "labelled_per_batch=2", *settings])
    out.mkdir(exist_ok=True)
    return trainer.Training(config, data, out, torch.device("cpu"), False, False, Ranks(number, 2))


def test_ranks_have_the_same_weights_and_other_random_numbers(data, tmp_path):
    weights, drawn = [], []
    for number in (0, 1):
        weights.append(rank(number, data, tmp_path / "run", "seed=5").network.state_dict())
        drawn.append(torch.rand(1).item())
    assert all(torch.equal(a, b) for a, b in zip(*(found.values() for found in weights), strict=True))
    assert drawn[0] != drawn[1] and torch.initial_seed() == trainer._seed(5, 1)


def test_two_ranks_stop_together_when_either_was_terminated(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda _, mine: [mine, True] if isinstance(mine, bool) else [mine])
    with pytest.raises(Terminated, match="iteration 2"):
        rank(0, data, tmp_path / "run", "iterations=4", "log_every=2").run()
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == 2


def test_a_finished_training_names_its_device_or_its_ranks(data, tmp_path, capsys):
    train(data, tmp_path / "alone")
    assert " s on cpu; best.pt: iteration 2" in capsys.readouterr().out
    rank(0, data, tmp_path / "two", "iterations=2").run()
    assert " s on 2 processes (cpu); best.pt: iteration 2" in capsys.readouterr().out


def test_a_log_row_holds_the_statistics_of_both_decoders():
    row = trainer.LogRow(1, 1.0, 1.0, 1.0, 0.1, 0.01, 0.5)
    found = trainer._with_statistics(row, [30.0, 10.0, 0.5, 0.9, 0, 0, 0.75, 0.25, 0.6, 0.4, 0.125], 2)
    assert (found.taught_by_1, found.taught_by_2, found.disagreement) == (10.0, 30.0, 0.125)
    assert found.mean_weight == pytest.approx((30 * 0.5 + 10 * 0.9) / 40)
    assert found.pseudo_labels == ((0.75, 0.25), (0.6, 0.4))
    nobody = trainer._with_statistics(row, [0.0, 0.0, 0.5, 0.9, 0, 0, 1.0, 0.0, 1.0, 0.0, 0.0], 2)
    assert nobody.mean_weight == 0.0


# ------------------------------------------------------------------------------------------------------------ lean form


@pytest.mark.parametrize("impl", ["naive", "torch"])
def test_an_eps_above_one_has_the_sign_of_the_formula(impl):
    """Classes of one or two voxels: with the wrong sign their prototypes would point the other way."""
    logits, features = networks((3, 2), 3, 4, dtype=torch.float64, seed=3)
    result = compare(impl, logits, features, eps=2.5)
    result.check(1e-12)
    result.check_maps(1e-12)


def test_of_two_classes_one_channel_of_the_gradient_is_kept():
    logits, features = networks((5, 6), 2, 3)
    z, kept = [t.requires_grad_() for t in logits], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        rplib.functional.reliable_mutual_loss(z, features, impl="torch")
    assert kept.count((2, 1, 30)) == 2 and (2, 2, 30) not in kept


@pytest.mark.parametrize("options", [Options(), Options(reduction="sum", class_weights=(0.5, 1.0, 2.0), temperature=2.0)])
def test_the_lean_form_stays_on_the_device_of_its_inputs(options):
    """On the meta device, which has no values: a tensor made elsewhere would not combine."""
    logits, features = ([torch.empty(2, n, 4, 5, device="meta") for _ in range(2)] for n in (3, 4))
    valid = torch.empty(2, 4, 5, dtype=torch.bool, device="meta")
    known = lean.statistics(logits, features, options, valid, detailed=True)
    found = [t for part in known for t in (part if isinstance(part, list) else [part])]
    assert len(found) == 7 and {t.device.type for t in found} == {"meta"}
    value, statistics = lean.loss_and_statistics([z.requires_grad_() for z in logits], features, options, valid, detailed=True)
    value.backward()
    assert {t.device.type for t in (value, *statistics, *(z.grad for z in logits))} == {"meta"}
