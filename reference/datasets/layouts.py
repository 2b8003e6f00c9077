"""The supported layouts of data sets on disk.

`open_dataset(folder)` returns an object with `names("train")`, `names("test")`, `path(name)` and `load(name)`
(`rplib.reference.datasets.cases.Dataset`). To add a layout, write such a class and add it to `LAYOUTS`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rplib.errors import UserError, printable
from rplib.reference.config import Config
from rplib.reference.datasets.cases import Case, Dataset
from rplib.reference.datasets.h5 import Brats, LeftAtrium, Pancreas
from rplib.reference.datasets.nifti import NiftiFolder
from rplib.reference.datasets.nnunet import NnunetFolder
from rplib.reference.progress import progress

__all__ = ["LAYOUTS", "Brats", "Case", "Dataset", "LeftAtrium", "NiftiFolder", "Pancreas", "Split"]

LAYOUTS: dict[str, type[Dataset]] = {kind.layout: kind for kind in (LeftAtrium, Pancreas, Brats, NiftiFolder)}


class Split(NamedTuple):
    """Case names of the training list by use."""

    labelled: list[str]
    validation: list[str]  # labelled cases held out for model selection
    unlabelled: list[str]


def open_dataset(
    root: str | Path,
    layout: str = LeftAtrium.layout,
    classes: int = 2,
    channels: int | None = None,
    dims: int | None = None,
    normalisation: str = "z-score",
) -> Dataset:
    """Open the data set in a folder, given the name of its layout.

    Args:
        classes: C, background included.
        channels, dims, normalisation: of the images, for the layout ``"generic"`` (`NiftiFolder`, or `NnunetFolder` for
            a folder of nnU-Net); the others have one channel and three axes, and are normalised on disk.

    Raises:
        UserError: unknown layout, or no such folder.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown data layout {layout!r}; expected one of: {', '.join(LAYOUTS)}.")
    kind = LAYOUTS[layout]
    if issubclass(kind, NiftiFolder):
        folder = Path(root)
        if (folder / NnunetFolder.images_folder).is_dir() and not (folder / NiftiFolder.images_folder).is_dir():
            kind = NnunetFolder
        return kind(root, classes, channels, dims, normalisation)
    if channels not in (None, 1) or dims not in (None, 3):
        raise UserError(
            f"data layout {layout!r} has one channel and three axes; set in_channels=1 and give patch three numbers, or "
            "use dataset=generic."
        )
    return kind(root, classes)


def open_for(config: Config, root: str | Path) -> Dataset:
    """Open the data set in a folder with the settings of a run.

    Raises:
        UserError: no such folder, or it does not have this layout.
    """
    return open_dataset(root, config.dataset, config.classes, config.in_channels, len(config.patch), config.normalisation)


def guess_layout(root: str | Path) -> str:
    """Infer the layout from the folders and lists in `root`.

    Raises:
        UserError: no known layout; the message lists the names looked for and the names found.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no data folder {root}.")
    signs = {
        LeftAtrium.layout: [f"{LeftAtrium.cases_folder}/"],
        Pancreas.layout: [f"{Pancreas.cases_folder}/"],
        NiftiFolder.layout: [f"{NiftiFolder.images_folder}/", f"{NnunetFolder.images_folder}/"],
        Brats.layout: [f"{split}{Brats.list_suffix}" for split in Brats.splits] + [f"{Brats.cases_folder}/*.h5"],
    }
    for layout, names in signs.items():
        if any((root / name).is_dir() if name.endswith("/") else any(root.glob(name)) for name in names):
            return layout
    if (root / "train.list").is_file():  # the check then reports its cases as missing, one by one
        return LeftAtrium.layout
    looked = "; ".join(f"{layout}: {', '.join(names)}" for layout, names in signs.items())
    there = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    shown = ", ".join(map(printable, there[:5])) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
    raise UserError(
        f"{root} contains no known data set: looked for {looked}; found {shown or 'nothing'}. Pass the folder that contains one "
        "of these, or put your images into images/ and your labels into labels/."
    )


def split_training(dataset: Dataset, config: Config) -> Split:
    """Split the training list into labelled, validation and unlabelled cases.

    The first `labelled` names are labelled; with ``labelled=0``, all cases that have a label.

    Raises:
        UserError: the list has too few cases.
    """
    names = dataset.names("train")
    shown = f"{dataset.list_name('train')} in {dataset.root}"
    if config.labelled > len(names):
        raise UserError(f"labelled={config.labelled} but {shown} has {len(names)} cases; lower labelled.")
    if config.labelled:
        labelled, rest = names[: config.labelled], names[config.labelled :]
    else:
        labelled = [name for name in names if dataset.has_label(name)]
        rest = [name for name in names if name not in set(labelled)]
    if not rest and not config.labelled_only:
        raise UserError(
            f"labelled={config.labelled} uses all cases of {shown} and leaves none unlabelled; lower labelled, "
            f"or set batch_size={config.labelled_per_batch} for labelled-only training."
        )
    kept = len(labelled) - config.validation
    if kept < 1:
        raise UserError(
            f"validation={config.validation} leaves none of the {len(labelled)} labelled cases of {shown} for training; "
            "lower validation or add labels."
        )
    return Split(labelled[:kept], labelled[kept:], [] if config.labelled_only else rest)


def load_cases(dataset: Dataset, names: Sequence[str], needs_label: bool, what: str = "cases") -> list[Case]:
    """Read cases into memory, with a progress bar on stderr."""
    return [dataset.load(name, needs_label) for name in progress(names, f"reading {what}")]
