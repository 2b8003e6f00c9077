"""The plan of a sweep: cells (a recipe and its settings) times seeds, read from one TOML file."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.checkpoint import BEST, CONFIG, LAST
from rplib.reference.config import Config, differences, load_config, load_recipe

# Settings that do not affect the results of a training.
_SAME = {"name", "cache", "checkpoint_every", "log_every", "window_batch"}


@dataclass(frozen=True)
class Cell:
    """One recipe with its own settings, trained with every seed."""

    name: str
    recipe: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """One run: a cell with one seed.

    Attributes:
        folder: the run folder, existing or not.
        adopted: whether it was trained elsewhere and is only read.
    """

    cell: str
    seed: int
    recipe: str
    settings: tuple[str, ...]
    folder: Path
    config: Config
    adopted: bool = False

    @property
    def finished(self) -> bool:
        """Whether it is trained to the last iteration.

        Raises:
            UserError: the folder contains a run with other settings.
        """
        if not (self.folder / CONFIG).is_file():
            return False
        there = load_config(self.folder / CONFIG)
        changed = [key for key in differences(there, self.config) if key not in _SAME]
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.folder} was trained with {key}={getattr(there, key)}, "
                f"the sweep has {key}={getattr(self.config, key)}; "
                "give the cell another name, or delete the folder."
            )
        if not (self.folder / BEST).is_file() or not (self.folder / LAST).is_file():
            return False
        return bool(checkpoint.load(self.folder / LAST)["iteration"] >= self.config.iterations)

    def scores(self, split: str) -> Path:
        """The scores of its evaluation."""
        return self.folder / f"evaluation-{split}" / "scores.csv"


@dataclass(frozen=True)
class Plan:
    """A whole sweep.

    Attributes:
        data: folder of the data set.
        out: folder for run folders, logs, table and page.
        baseline: name of the cell that the others are compared with.
        split: the list that is scored.
        jobs: number of trainings at a time, each with one thread.
        runs: ordered by seed, then by cell, so that at any time all cells have nearly the same seeds.
    """

    data: Path
    out: Path
    baseline: str
    split: str
    jobs: int
    runs: tuple[Planned, ...]

    @property
    def cells(self) -> list[str]:
        return list(dict.fromkeys(run.cell for run in self.runs))


def read_plan(path: Path) -> Plan:
    """Read a plan from its file; paths in it are relative to the file.

    Raises:
        UserError: the file is missing or not TOML, or has an invalid entry.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from error
    _keys(table, {"data", "out", "seeds", "set", "cells", "baseline", "split", "jobs", "adopt"}, str(path))
    for key, kind, example in (("data", str, 'data = "LA"'), ("out", str, 'out = "sweep"'), ("cells", dict, "[cells.NAME]")):
        if not isinstance(table.get(key), kind) or not table[key]:
            raise UserError(f"{path}: {key} is missing or of the wrong type; expected, for example, {example}.")
    seeds = table.get("seeds", [1337])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds is {seeds!r}; expected different whole numbers, for example seeds = [1337, 1338].")
    jobs = table.get("jobs", 1)
    if type(jobs) is not int or jobs < 1:
        raise UserError(f"{path}: jobs is {jobs!r}; expected the number of trainings at a time, at least 1.")
    cells = [_cell(name, cell, path) for name, cell in table["cells"].items()]
    folders = [_slug(cell.name) for cell in cells]
    if len(set(folders)) < len(folders):
        raise UserError(f"{path}: two cells would share one folder ({', '.join(sorted(folders))}); give them clearer names.")
    baseline = table.get("baseline", cells[0].name)
    if baseline not in [cell.name for cell in cells]:
        raise UserError(f"{path}: baseline is {baseline!r}; expected one of the cells: {', '.join(cell.name for cell in cells)}.")
    split, out = table.get("split", "test"), path.parent / table["out"]
    if split not in ("test", "train", "val"):
        raise UserError(f"{path}: split is {split!r}; expected test, train or val.")
    shared = _settings(table.get("set", {}), path)
    elsewhere = _adoptable(table.get("adopt", []), path)
    runs = []
    for seed in seeds:
        for cell in cells:
            settings = (*shared, *cell.settings, f"seed={seed}")
            if not any(word.startswith("name=") for word in settings):
                settings = (*settings, f"name={cell.name}")
            config = load_recipe(cell.recipe, settings)
            found = next((folder for folder, other in elsewhere.items() if set(differences(config, other)) <= _SAME), None)
            folder = out / f"{_slug(cell.name)}-{seed}" if found is None else found
            runs.append(Planned(cell.name, seed, cell.recipe, settings, folder, config, found is not None))
    return Plan(path.parent / table["data"], out, baseline, split, jobs, tuple(runs))


def _cell(name: str, cell: Any, path: Path) -> Cell:
    where = f"{path}, cell {name!r}"
    if not isinstance(cell, dict) or not isinstance(cell.get("recipe"), str):
        raise UserError(f'{where}: recipe is missing; expected, for example, recipe = "la-8".')
    _keys(cell, {"recipe", "set"}, where)
    recipe = cell["recipe"]
    if recipe.endswith(".toml"):
        recipe = str((path.parent / recipe).resolve())
    return Cell(name, recipe, _settings(cell.get("set", {}), path))


def _settings(table: Any, path: Path) -> tuple[str, ...]:
    """A table of settings as options of `--set`."""
    if not isinstance(table, dict):
        raise UserError(f"{path}: set is {table!r}; expected a table of settings, for example set = {{ filters = 8 }}.")
    arguments = []
    for key, value in table.items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, bool):
            value = str(value).lower()
        arguments.append(f"{key}={value}")
    return tuple(arguments)


def _adoptable(patterns: Any, path: Path) -> dict[Path, Config]:
    if not isinstance(patterns, list) or any(not isinstance(pattern, str) for pattern in patterns):
        raise UserError(f'{path}: adopt is {patterns!r}; expected patterns of run folders, for example adopt = ["runs/*"].')
    folders = [folder for pattern in patterns for folder in sorted(path.parent.glob(pattern)) if (folder / CONFIG).is_file()]
    return {folder: load_config(folder / CONFIG) for folder in folders}


def _keys(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}."
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def _slug(name: str) -> str:
    """A name as a folder name.

    >>> _slug("labelled only, Dice + CE")
    'labelled-only-dice-ce'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
