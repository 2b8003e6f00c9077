"""What a training says about its pseudo-labels: columns of metrics.csv, curves, and the warnings."""

import pytest
from reference_tools import write_dataset

from rplib.errors import UserError
from rplib.reference.config import Config
from rplib.reference.reporting.curves import curves_png
from rplib.reference.reporting.run_log import LogRow, RunLog, read_metrics
from rplib.reference.training.monitor import Monitor


def row(t, dice=0.5, weight=0.1, shares=((0.9, 0.1), (0.9, 0.1)), **more):
    return LogRow(t, 1.0, dice, 0.2, weight, 0.01, 0.1, pseudo_labels=shares, **more)


def looked(rows, shares=(0.9, 0.1), maximum=1.0, iterations=400):
    return Monitor(shares, maximum, iterations).look(rows)


def test_a_supervised_loss_that_rises_with_the_weight_is_reported_once():
    rows = [row(t, 1.0 - 0.005 * t, 0.0) for t in range(1, 101)] + [row(t, 0.9, 0.4) for t in range(101, 200)]
    [text] = looked(rows)
    assert text.startswith("iteration 110: the supervised loss rose from 0.522 to 0.900 while the weight")
    assert "grew to 0.4" in text
    for setting in ("consistency", "ramp_every", "warmup", "supervised=dice+cross_entropy", "schedule=polynomial"):
        assert setting in text
        assert setting.partition("=")[0] in Config.__dataclass_fields__


@pytest.mark.parametrize(
    "rows",
    [
        [row(t, 1.0 - 0.005 * t, 0.001 * t) for t in range(1, 200)],  # it falls
        [row(t, 0.5 + 0.2 * (t % 2), 0.001 * t) for t in range(1, 200)],  # it scatters
        [row(t, 0.5 if t < 100 else 0.9, 0.1) for t in range(1, 200)],  # it rises, the weight does not
        [row(t, 0.05 if t < 100 else 0.1, 0.001 * t) for t in range(1, 200)],  # it rises next to nothing
    ],
)
def test_what_is_no_trouble_is_not_reported(rows):
    assert looked(rows) == []


def test_a_training_without_mutual_loss_has_nothing_to_watch():
    assert looked([row(t, 0.01 * t, 0.0, ((1.0, 0.0),) * 2) for t in range(1, 200)], maximum=0.0) == []


def test_a_class_that_vanishes_is_reported_by_its_name():
    here, gone = ((0.8, 0.1, 0.1),) * 2, ((0.8, 0.2, 0.0), (0.8, 0.1, 0.1))
    rows = [row(t, shares=here, weight=0.01) for t in range(1, 101)] + [row(t, shares=gone, weight=0.01) for t in range(101, 200)]
    [text] = looked(rows, (0.8, 0.1, 0.1))
    assert text.startswith("iteration 110: decoder 1 does not predict class 2, which has 10 % of the labelled voxels")
    rows = [r._replace(pseudo_labels=((1.0, 0.0, 0.0),) * 2) if r.iteration > 100 else r for r in rows]
    assert [text.split(",")[0] for text in looked(rows, (0.8, 0.1, 0.1))] == [
        "iteration 110: neither decoder predicts class 1",
        "iteration 110: neither decoder predicts class 2",
    ]


def test_a_class_that_never_came_is_missed_only_once_the_ramp_up_is_under_way():
    never = [row(t, weight=0.0005 * t, shares=((1.0, 0.0),) * 2) for t in range(1, 200)]
    [text] = looked(never)
    assert text.startswith("iteration 110: neither decoder predicts class 1")  # 0.0005 t > 0.05 on average over 101..110
    assert looked([r for r in never if r.iteration <= 100]) == []
    assert looked(never, shares=(1.0, 0.0)) == []  # the labels do not have it either


def test_a_resumed_training_is_watched_as_if_it_had_not_stopped():
    rows = [row(t, 1.0 - 0.005 * t, 0.0) for t in range(1, 101)] + [row(t, 0.9, 0.4) for t in range(101, 200)]
    monitor = Monitor((0.9, 0.1), 1.0, 400)
    assert monitor.look(rows[:103]) == []
    assert monitor.look(rows[103:]) == looked(rows)


def test_rows_are_written_and_read_to_the_bit(tmp_path):
    full = row(1, taught_by_1=1 / 3, taught_by_2=0.25, mean_weight=0.9, disagreement=0.0, shares=((1 / 3, 2 / 3), (0.5, 0.5)))
    plain = LogRow(2, 1.0, 2.0, 3.0, 0.5, 0.01, 0.1, 0.75)
    log = RunLog(tmp_path, 0)
    log.add([full, plain])
    log.close()
    path = tmp_path / "metrics.csv"
    assert read_metrics(path) == [full, plain]
    path.write_text(path.read_text()[:-1] + "\n3,1.0,2.0,3.0,0.5,0.01,0.1,,0.1,0.2,0.3,0.4,0.9 0.1;0.8 0.")
    assert read_metrics(path) == [full, plain]  # what a kill cut short is left out
    path.write_text(",".join(LogRow._fields[:8]) + "\n2,1.0,2.0,3.0,0.5,0.01,0.1,0.75\n")
    assert read_metrics(path) == [plain]  # a run of an older version
    path.write_text("iteration,loss\n1,2\n")
    with pytest.raises(UserError, match="has the columns iteration, loss; expected iteration, total"):
        read_metrics(path)


def test_curves_show_the_pseudo_labels():
    rows = [row(t, taught_by_1=0.4, taught_by_2=0.6, mean_weight=0.9, disagreement=0.1) for t in range(1, 100)]
    with_them, without = curves_png(rows, Config()), curves_png([r._replace(pseudo_labels=None) for r in rows], Config())
    assert len(with_them) > 1.3 * len(without)


def test_a_training_logs_what_its_objective_reports_and_warns(tmp_path, monkeypatch, capsys):
    """By an objective whose statistics are made up, so that the fields are seen to arrive where they belong."""
    import torch
    from reference_tools import TINY

    from rplib.reference.config import load_recipe
    from rplib.reference.training import trainer

    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data")
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)
    genuine = trainer.training_step
    made_up = [[0.25, 0.5], [0.8, 0.9], [0.1, 0.2], [[1.0, 0.0], [0.75, 0.25]], 0.125]

    def step(*arguments):
        return *genuine(*arguments)[:3], *map(torch.tensor, made_up)

    monkeypatch.setattr(trainer, "training_step", step)
    config = load_recipe("la-4", [*TINY, "ramp_length=0"])
    trainer.train(config, tmp_path / "data", tmp_path / "run", device="cpu")
    for found in read_metrics(tmp_path / "run" / "metrics.csv"):
        assert (found.taught_by_2, found.taught_by_1) == (0.25, 0.5)  # pair (0, 1): decoder 1 is the student, 2 the teacher
        assert found.mean_weight == pytest.approx((0.25 * 0.8 + 0.5 * 0.9) / 0.75)
        assert found.disagreement == 0.125
        assert found.pseudo_labels == ((1.0, 0.0), (0.75, 0.25))
    err = capsys.readouterr().err
    assert err.count("warning: iteration 10: decoder 1 does not predict class 1") == 1


# ------------------------------------------------------------------------------------------------ beside labelled-only


def trained(tmp_path, name, recipe, *argv):
    """Runs `rplib train` on the tiny set, without drawing curves; returns the run folder."""
    from reference_tools import TINY

    from rplib import cli

    run = tmp_path / name
    settings = [*TINY, "batch_size=4", "labelled_per_batch=2", "iterations=4", *argv]
    assert cli.main(["train", "--recipe", recipe, "--data", str(tmp_path / "data"), "--out", str(run), "--set", *settings]) == 0
    return run


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    from rplib.reference.training import trainer

    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data")
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)
    monkeypatch.chdir(tmp_path)


def test_a_training_ends_by_saying_how_to_start_its_baseline(tiny_data, tmp_path, capsys):
    import shlex

    from rplib import cli

    run = trained(tmp_path, "run", "la-4", "consistency=0.1")
    out = capsys.readouterr().out
    command = out[out.index("start it with: ") + 15 :].splitlines()[0]
    assert cli.main(shlex.split(command)[1:]) == 0  # the command that it names works, and gives its baseline
    assert "labelled-only" not in capsys.readouterr().out
    assert (tmp_path / "run-supervised" / "best.pt").is_file()

    from rplib.reference.config import load_config
    from rplib.reference.training.beside_labels import beside_labelled_only, find_baseline

    config = load_config(run / "config.toml")
    assert find_baseline(config, run) == run.parent / "run-supervised"
    assert "evaluate both, then compare them with: rplib compare" in beside_labelled_only(config, run, tmp_path / "data")
    assert find_baseline(config.replace(seed=1), run) is None
    assert find_baseline(config.replace(filters=3), run) is None


@pytest.mark.parametrize(("ours", "verdict"), [(0.75, "25.0 points above"), (0.5, "level with"), (0.25, "25.0 points below")])
def test_with_a_validation_it_says_how_they_compare(tiny_data, tmp_path, monkeypatch, capsys, ours, verdict):
    from rplib.reference.training import trainer

    for name, recipe, dice in (("labels", "la-4-supervised", 0.5), ("both", "la-4", ours)):
        monkeypatch.setattr(trainer, "case_dice", lambda network, cases, *_, dice=dice: [dice for _ in cases])
        batch = ["batch_size=2"] if recipe.endswith("supervised") else []
        trained(tmp_path, name, recipe, "validation=1", *batch)
    out = capsys.readouterr().out
    assert f"On 1 validation case its Dice of {100 * ours:.1f} % is {verdict} labelled-only (50.0 %, " in out
    assert ("Lower consistency" in out) == (ours < 0.5)
