"""Common parts of the conversions: finding cases, skipping finished ones, writing files atomically, case lists."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from rplib.errors import UserError, printable
from rplib.reference.datasets.cases import read_list
from rplib.reference.datasets.h5 import AFFINE, H5Dataset
from rplib.reference.files import (
    name_mistake,
    output_folder,
    output_path,
    remove_leftovers,
    write_atomically,
    write_text_atomically,
)
from rplib.reference.progress import progress

SETTINGS = "conversion"  # attribute of the written files: the conversion settings


class Source(NamedTuple):
    """Files of a case in the raw release."""

    image: Path  # a file, or the folder of a DICOM series
    label: Path | None


class Prepared(NamedTuple):
    """A converted case."""

    image: np.ndarray  # float32
    label: np.ndarray | None  # with the dtype of the published files
    affine: np.ndarray | None  # (4, 4), of the written axes; None if unknown
    remark: str = ""


class Release(ABC):
    """A raw public release: the files of a case, and their preprocessing."""

    layout: type[H5Dataset]
    files: str  # expected files, for messages
    # Without lists, labelled cases are split by these published shares: list -> share of all cases.
    shares: Mapping[str, float]
    published = True  # also available as h5 files, which have no settings attribute and are kept
    withdrawn: frozenset[str] = frozenset()  # in published lists, but no longer in the release

    @property
    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Settings that the written voxels depend on, in addition to the raw files."""

    @abstractmethod
    def find(self, raw: Path) -> dict[str, Source]:
        """Cases by their names in the lists.

        Raises:
            UserError: two files for one case.
        """

    @abstractmethod
    def prepare(self, name: str, source: Source) -> Prepared:
        """Read and preprocess one case.

        Raises:
            UserError: names the file and what is wrong with it.
        """


@dataclass
class Converted:
    """Result of `convert`: case names and remarks."""

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def convert(release: Release, raw: Path, dest: Path, lists: Path | None = None, seed: int = 1337) -> Converted:
    """Convert a raw release into the h5 layout of the published data.

    Cases written by an earlier, possibly interrupted, call are kept. Cases that fail are reported at the end; the lists are
    written once no case fails.

    Args:
        raw: folder of the release, searched recursively.
        dest: folder to write.
        lists: folder with the lists to use; None uses those in `dest` or `raw`; without any, the labelled cases are
            split by `seed`.

    Raises:
        UserError: nothing to convert, inconsistent lists, or a DEST written with other settings.
    """
    if not raw.is_dir():
        raise UserError(f"no folder {raw}; expected the raw release with {release.files}.")
    if dest.exists() and not dest.is_dir():
        raise UserError(f"DEST {dest} is a file; expected a folder.")
    sources = release.find(raw)
    for name, source in sources.items():  # the name is used in lists and as a file name
        expected = name_mistake(name) or (
            "a name without commas and without spaces at its ends" if "," in name or name != name.strip() else None
        )
        if expected is not None:
            shown = printable(name)[:80]
            raise UserError(f"{printable(str(source.image))} would be case {shown!r}; expected {expected}: rename it.")
    if not sources:
        raise UserError(f"{raw} contains no {release.files}; expected the folder that the release was unpacked into.")
    done = Converted(unlabelled=[name for name, source in sources.items() if source.label is None])
    with output_folder(dest, f"DEST {dest}"):
        _convert(release, raw, dest, lists, seed, sources, done)
    return done


def _convert(
    release: Release, raw: Path, dest: Path, lists: Path | None, seed: int, sources: dict[str, Source], done: Converted
) -> None:
    """`convert` once DEST is locked."""
    dataset = release.layout(dest)
    split = _split(release, dataset, sources, raw, lists, seed, done)
    remove_leftovers(dest, deep=True)
    todo: list[str] = []
    for name, source in sources.items():
        (done.kept if _is_done(dataset.path(name), release, source) else todo).append(name)

    remarks: dict[str, list[str]] = {}
    for name in progress(todo, "converting"):
        try:
            prepared = release.prepare(name, sources[name])
            _check(prepared, sources[name])
        except UserError as error:
            done.problems.append(str(error))
            continue
        if prepared.remark:
            remarks.setdefault(prepared.remark, []).append(name)
        _write(_inside(dest, dataset.path(name)), prepared, release)
        done.written.append(name)
    done.remarks += [f"{', '.join(names[:5])}{', ...' * (len(names) > 5)}: {text}" for text, names in remarks.items()]
    if not done.problems:
        for part, names in split.items():
            path = dest / dataset.list_name(part)
            if not path.is_file() or read_list(path) != names:
                write_text_atomically(path, "".join(f"{name}\n" for name in names))


def bounds(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and past-the-end index of the nonzero part, per axis.

    >>> mask = np.zeros((6, 4)); mask[2:5, 1] = 1
    >>> bounds(mask)
    [(2, 5), (1, 2)]
    """
    found = []
    for axis in range(mask.ndim):
        where = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        found.append((int(where[0]), int(where[-1]) + 1))
    return found


def widened(low: int, high: int, size: int, least: int, below: int, above: int) -> tuple[int, int]:
    """The range low..high-1, widened symmetrically to `least`, then by the margins, within 0..size-1.

    Where the border cuts it below `least`, the other side is extended, as far as the image goes.

    >>> widened(40, 60, 200, least=30, below=5, above=7), widened(0, 20, 200, least=30, below=5, above=5)
    ((30, 72), (0, 30))
    """
    short = max(least - (high - low), 0)
    low, high = low - short // 2 - below, high + short - short // 2 + above
    low, high = max(low, 0), min(high, size)
    if high - low < least:
        low, high = max(min(low, high - least), 0), min(max(high, low + least), size)
    return low, high


def z_score(image: np.ndarray, path: Path, inside: np.ndarray | None = None) -> np.ndarray:
    """float32 with mean 0 and standard deviation 1 (of the voxels `inside`).

    Raises:
        UserError: the image is constant.
    """
    values = image[inside].astype(np.float64) if inside is not None else image.astype(np.float64)
    deviation = values.std() if values.size else 0.0
    if deviation == 0:
        raise UserError(f"{path} is constant; cannot normalise. Copy it again from its source.")
    return ((image - values.mean()) / deviation).astype(np.float32)


def _split(
    release: Release,
    dataset: H5Dataset,
    sources: dict[str, Source],
    raw: Path,
    lists: Path | None,
    seed: int,
    done: Converted,
) -> dict[str, list[str]]:
    """Names of every list; unlabelled cases are in the training list only."""
    labelled = [name for name, source in sources.items() if source.label is not None]
    folder = lists if lists is not None else next((f for f in (dataset.root, raw) if _has_lists(f, dataset)), None)
    if folder is None:
        return _draw(release, dataset, sorted(labelled), sorted(set(sources) - set(labelled)), seed, done)
    split = {}
    for part in dataset.splits:
        path = folder / dataset.list_name(part)
        if not path.is_file():
            raise UserError(f"--lists {folder} has no {path.name}; expected {', '.join(map(dataset.list_name, dataset.splits))}.")
        names = read_list(path)
        gone = [name for name in names if name in release.withdrawn and name not in sources]
        if gone:
            done.remarks.append(f"{', '.join(gone)} of {path} skipped: withdrawn from the archive.")
        absent = [name for name in names if name not in sources and name not in gone]
        if absent:
            raise UserError(f"{path} lists {', '.join(absent[:3])} ({len(absent)} in all), absent from {raw}; add the raw files.")
        bare = [name for name in names if part != "train" and name not in labelled]
        if bare:
            raise UserError(f"{path} lists {', '.join(bare[:3])}, unlabelled in {raw}; use such cases only for training.")
        split[part] = [name for name in names if name not in gone]
    listed = {name for names in split.values() for name in names}
    rest = sorted(set(sources) - listed)
    if rest:
        done.remarks.append(f"{len(rest)} cases are in no list of {folder}: {', '.join(rest[:3])}{', ...' * (len(rest) > 3)}.")
    return split


def _has_lists(folder: Path, dataset: H5Dataset) -> bool:
    return all((folder / dataset.list_name(part)).is_file() for part in dataset.splits)


def _draw(
    release: Release, dataset: H5Dataset, labelled: Sequence[str], unlabelled: Sequence[str], seed: int, done: Converted
) -> dict[str, list[str]]:
    """A seeded split with the published proportions."""
    if len(labelled) < len(dataset.splits):
        raise UserError(
            f"{len(labelled)} labelled cases are too few for {', '.join(map(dataset.list_name, dataset.splits))}; "
            "add cases, or give --lists."
        )
    order = [labelled[i] for i in np.random.default_rng([seed, 0]).permutation(len(labelled))]
    split: dict[str, list[str]] = {"train": []}
    for part, share in release.shares.items():
        number = max(1, round(share * len(order)))
        split[part], order = order[:number], order[number:]
    split["train"] = [*order, *unlabelled]
    sizes = ", ".join(f"{len(split[part])} in {dataset.list_name(part)}" for part in dataset.splits)
    done.remarks.append(f"split by seed {seed}: {sizes}; NOT the published lists (use --lists for comparable scores).")
    return {part: split[part] for part in dataset.splits}


def _is_done(path: Path, release: Release, source: Source) -> bool:
    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r") as file:
            if "image" not in file or ("label" not in file and source.label is not None):
                return False  # a label has been added since
            unknown = release.settings if release.published else {}
            made_with = json.loads(file.attrs[SETTINGS]) if SETTINGS in file.attrs else unknown
    except Exception:  # truncated or damaged in some way: convert again
        return False
    if made_with != release.settings:
        raise UserError(
            f"{path} was converted with other settings ({_settings_text(made_with)}; now {_settings_text(release.settings)}); "
            "choose another DEST, or use the same settings."
        )
    return True


def _settings_text(settings: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "none"


def _check(prepared: Prepared, source: Source) -> None:
    if prepared.label is not None and not prepared.label.any():
        raise UserError(f"{source.label} contains only background; remove it if the case is unlabelled.")


def _inside(dest: Path, path: Path) -> Path:
    """The path of a case, with every part checked."""
    return output_path(dest, *path.relative_to(dest).parts)


def _write(path: Path, prepared: Prepared, release: Release) -> None:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("image", data=prepared.image, compression="gzip")
        if prepared.label is not None:
            file.create_dataset("label", data=prepared.label, compression="gzip")
        if prepared.affine is not None:
            file.attrs[AFFINE] = prepared.affine
        file.attrs[SETTINGS] = json.dumps(release.settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda target: target.write(content.getbuffer()))
