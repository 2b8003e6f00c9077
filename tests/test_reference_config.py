"""Recipes, `--set`, and config.toml."""

import tomllib

import pytest

from rplib import cli
from rplib.errors import UserError
from rplib.reference.config import BASE, KEYS, RECIPES, Config, load_config, load_recipe, parse, recipe_names

LABELLED = (4, 8, 16)
MUTUAL = [f"la-{n}" for n in LABELLED] + ["pancreas-6", "pancreas-12", "brats-25", "brats-50", "generic"]


def test_the_recipes_are_there():
    names = [f"{name}{rest}" for name in MUTUAL for rest in ("", "-supervised")]
    assert recipe_names() == sorted([*names, *(f"la-{n}-robust" for n in LABELLED)])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_only_what_differs_and_carries_its_name(name):
    table = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    assert table["name"] == name
    base = table.pop("base")
    plain = name.removesuffix("-supervised").removesuffix("-robust")
    assert base == (BASE if plain == name else plain)
    below = Config() if base == BASE else load_recipe(base)
    stated = {"name", "labelled"}  # worth reading in the recipe even where they are the base's
    for key, value in table.items():
        assert key in stated or getattr(below, key) != (tuple(value) if isinstance(value, list) else value), key
    first, _, rest = name.partition("-")
    number = rest.removesuffix("supervised").removesuffix("robust").removesuffix("-")
    assert load_recipe(name).labelled == int(number or 0)  # 0: all that have a label
    assert load_recipe(name).dataset == {"la": "left-atrium"}.get(first, first)


@pytest.mark.parametrize("labelled", LABELLED)
def test_recipes_have_the_paper_settings(labelled):
    config = load_recipe(f"la-{labelled}")
    expected = {
        "patch": (112, 112, 80),
        "batch_size": 4,
        "labelled_per_batch": 2,
        "iterations": 15000,
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "constant",
        "dice_weight": 0.5,
        "consistency": 1.0,
        "ramp_length": 40,
        "ramp_every": 150,
        "stride": (18, 18, 4),
        "filters": 16,
        "dropout": 0.5,
        "norm": "batch",
        "seed": 1337,
        "protocol": "held-out",
        "validation": 0,
        "validate_from": 800,
        "validate_every": 200,
        "confidence": "entropy",
        "method": "both",
        "cross_entropy_on": "logits",
    }
    assert {key: getattr(config, key) for key in expected} == expected


def test_recipes_of_the_other_data_sets_have_the_paper_settings():
    la = load_recipe("la-8")
    for labelled in (6, 12):
        expected = {"dataset": "pancreas", "patch": (96,) * 3, "stride": (16,) * 3, "augmentation": "none"}
        name = f"pancreas-{labelled}"
        assert load_recipe(name) == la.replace(name=name, labelled=labelled, **expected)
    for labelled in (25, 50):
        expected = {"dataset": "brats", "patch": (96,) * 3, "stride": (64,) * 3, "iterations": 30000, "schedule": "polynomial"}
        name = f"brats-{labelled}"
        assert load_recipe(name) == la.replace(name=name, labelled=labelled, **expected)


def test_robust_recipes_and_generic_share_one_objective():
    robust = {"supervised": "dice+cross_entropy", "consistency": 0.1, "schedule": "polynomial", "average": 0.99}
    for n in LABELLED:
        assert load_recipe(f"la-{n}-robust") == load_recipe(f"la-{n}").replace(name=f"la-{n}-robust", **robust)
    assert {key: getattr(load_recipe("generic"), key) for key in robust} == robust
    generic = load_recipe("generic")
    assert (generic.await_classes, generic.dropout, generic.norm) == (True, 0.0, "instance")
    assert load_recipe("la-8-robust").norm == "batch"


@pytest.mark.parametrize("name", MUTUAL)
def test_a_baseline_differs_from_its_recipe_in_the_unlabelled_half_alone(name):
    mutual, baseline = load_recipe(name), load_recipe(f"{name}-supervised")
    assert baseline == mutual.replace(name=baseline.name, batch_size=2, consistency=0.0)
    assert baseline.labelled_only
    assert not mutual.labelled_only


def test_config_toml_reads_back_equal(tmp_path):
    config = load_recipe("la-4", ["filters=3", 'name=with "quotes" and \\', "learning_rate=1e-05", "channels_last=true"])
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "config.toml") == config
    assert tomllib.loads(config.to_toml()).keys() == KEYS.keys()


def test_values_are_written_as_people_write_them():
    config = load_recipe(
        "la-8",
        ["patch=32,32,16", "stride = [8, 8, 4]", "consistency=0", "amp=bfloat16", "protocol='paper'", "method=which-only"],
    )
    assert (config.patch, config.stride, config.consistency) == ((32, 32, 16), (8, 8, 4), 0.0)
    assert (config.amp, config.protocol) == ("bfloat16", "paper")
    assert config.loss_keywords["weighting"] is None
    assert config.loss_keywords["confidence"] == "entropy"


def test_the_base_holds_every_key_with_its_default():
    table = tomllib.loads((RECIPES / f"{BASE}.toml").read_text())
    assert list(table) == list(KEYS)
    assert parse((RECIPES / f"{BASE}.toml").read_text(), BASE).replace(name=Config().name) == Config()


def test_a_file_may_name_its_base(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "pancreas-6-supervised"\nfilters = 4\n')
    assert load_recipe(tmp_path / "mine.toml") == load_recipe("pancreas-6-supervised", ["filters=4"])
    for base in ('"nothing"', '"../recipes/la-8"', "3"):
        (tmp_path / "mine.toml").write_text(f"base = {base}\n")
        with pytest.raises(UserError, match="expected the name of a recipe: base, brats-25"):
            load_recipe(tmp_path / "mine.toml")


def test_retired_settings_are_accepted_where_they_say_nothing():
    assert parse('weighting = "similarity"', "old run") == Config()
    with pytest.raises(UserError, match="old run: weighting = 'none' is no longer a setting; use method=which-only"):
        parse('weighting = "none"', "old run")
    with pytest.raises(UserError, match="--set: weighting is no longer a setting; use method=which-only"):
        load_recipe("la-8", ["weighting=none"])


def test_help_settings_lists_every_key(capsys):
    assert cli.main(["train", "--help-settings"]) == 0
    out = capsys.readouterr().out
    for key, f in KEYS.items():
        assert f"  {key} = " in out
        assert f.metadata["comment"] in out
    assert "  patch = [112, 112, 80]  (integers)\n" in out


def test_a_recipe_may_be_a_file_with_some_keys(tmp_path):
    (tmp_path / "mine.toml").write_text("labelled = 5\nfilters = 4\n")
    config = load_recipe(tmp_path / "mine.toml", ["filters=6"])
    assert (config.labelled, config.filters, config.iterations) == (5, 6, 15000)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("filter=4", "unknown setting 'filter'; did you mean filters"),
        ("labeled=4", "did you mean labelled"),
        ("lr=0.1", "unknown setting 'lr'; known: name, dataset"),
        ("filters", "expected key=value"),
        ("filters=four", "filters is 'four'; expected a whole number, such as filters=16"),
        ("filters=4.0", "filters is 4.0; expected a whole number"),
        ("filters=true", "filters is True; expected a whole number"),
        ("filters=0", "filters is 0; expected at least 1"),
        ("filters=", "expected a whole number"),
        ("learning_rate=0", "learning_rate is 0.0; expected more than 0.0"),
        ("learning_rate=nan", "expected a number"),
        ("momentum=1", "expected at most 0.9999"),
        ("channels_last=yes", "expected true or false"),
        ("patch=32,32", "stride [18, 18, 4] and patch [32, 32] have different numbers of axes"),
        ("patch=32", "expected three whole numbers such as patch=32,32,32, or two for 2-D images"),
        ("in_channels=0", "in_channels is 0; expected at least 1"),
        ("patch=32,32,30", "each axis must be a multiple of 16"),
        ("patch=112,112,0", "patch is [112, 112, 0]; expected at least 1."),
        ("patch=112,112,8", "each axis must be a multiple of 16, or the last of three be 1"),
        ("stride=18,18,96", "stride [18, 18, 96] is larger than patch"),
        ("protocol=papers", "expected one of: held-out, paper (did you mean paper?)"),
        ("impl=cuda", "expected one of: auto, triton, torch, naive"),
        ("labelled_per_batch=5", "labelled_per_batch=5 exceeds batch_size=4"),
        ("validation=8", "leaves none of the 8 labelled cases"),
        ("dataset=acdc", "expected one of: left-atrium"),
    ],
)
def test_mistakes_are_one_sentence(word, message):
    with pytest.raises(UserError) as caught:
        load_recipe("la-8", [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_at_odds():
    with pytest.raises(UserError, match="validation=2 has no effect"):
        Config(protocol="paper", validation=2)
    with pytest.raises(UserError, match="too few for batch normalisation"):
        Config(batch_size=1, labelled_per_batch=1, patch=(16, 16, 16), stride=(16, 16, 16))
    with pytest.raises(UserError, match="too few for instance normalisation"):
        Config(norm="instance", patch=(16, 16, 16), stride=(16, 16, 16))
    assert Config(norm="batch", patch=(16, 16, 16), stride=(16, 16, 16)).batch_size == 4


def test_unreadable_recipes(tmp_path):
    with pytest.raises(UserError, match="no recipe named la8; did you mean la-8"):
        load_recipe("la8")
    with pytest.raises(UserError, match=r"nowhere\.toml cannot be read \(No such file"):
        load_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("filters = = 4")
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML"):
        load_recipe(tmp_path / "broken.toml")
    with pytest.raises(UserError, match="here: unknown setting 'filtres'; did you mean filters"):
        parse("filtres = 4", "here")


def test_a_method_of_its_own_shows_in_the_title():
    recipe = load_recipe("la-8")
    assert recipe.title == "la-8"
    assert recipe.replace(method="which-only").title == "la-8, method which-only"
