"""`rplib data check`: reads every case of a data set and reports invalid files."""

import sys
from pathlib import Path

import numpy as np

from rplib.errors import UserError
from rplib.reference.datasets.cases import MOST_CLASSES
from rplib.reference.datasets.layouts import NiftiFolder, guess_layout, open_dataset
from rplib.reference.progress import progress


def check(root: Path, layout: str | None = None, classes: int | None = None, channels: int | None = None) -> int:
    """Prints every problem and a summary.

    Args:
        layout: None infers it from the folder.
        classes: C, background included; None is 2, or any number for the layout ``"generic"``.
        channels: per image, for the layout ``"generic"``; None infers it from the first image.

    Returns:
        0, or 2 if there are problems.

    Raises:
        UserError: no such folder, or an unknown layout.
    """
    layout = layout or guess_layout(root)
    own = layout == NiftiFolder.layout
    dataset = open_dataset(root, layout, classes or (MOST_CLASSES if own else 2), channels)
    problems: list[str] = []
    names: dict[str, list[str]] = {}
    for split in dataset.splits:
        try:
            names[split] = dataset.names(split)
        except UserError as error:
            problems.append(str(error))
            names[split] = []
    splits = list(names)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            both = f"{dataset.list_name(first)} and in {dataset.list_name(second)}"
            problems += [
                f"case {name} is in {both}; remove it from one of them."
                for name in sorted(set(names[first]) & set(names[second]))
            ]

    unlabelled, sizes, found = 0, [], set()
    todo = [(split, name) for split in names for name in names[split]]
    for split, name in progress(todo, "checking"):
        try:
            case = dataset.load(name, needs_label=split != "train")
        except UserError as error:
            problems.append(str(error))
            continue
        several = isinstance(dataset, NiftiFolder) and dataset.channels > 1
        sizes.append(case.image.shape[several:])
        if case.label is None:
            unlabelled += 1
            continue
        found |= set(np.unique(case.label).tolist())
        if not case.label.any():
            problems.append(
                f"{dataset.path(name)}: 'label' is background everywhere; "
                f"{'remove the label file' if own else 'remove the key'} if the case is unlabelled."
            )

    for problem in problems:
        print(problem)
    if sizes and len({len(size) for size in sizes}) == 1:
        axes = [f"{min(axis)}-{max(axis)}" for axis in zip(*sizes, strict=True)]
        counts = [f"{len(names['train'])} training cases ({unlabelled} without a label)"]
        counts += [f"{len(names[split])} {'validation' if split == 'val' else split} cases" for split in splits[1:]]
        print(f"{root}: {', '.join(counts)}; {' x '.join(axes)} voxels")
    if isinstance(dataset, NiftiFolder) and sizes:
        labels = ", ".join(map(str, sorted(found)))
        print(
            f"{dataset.dims}-D, {dataset.channels} channel{'s' * (dataset.channels != 1)}, labels {labels}: "
            f"--set in_channels={dataset.channels} classes={max(found, default=0) + 1}"
        )
    for remark in dataset.remarks() if sizes else []:
        print(remark)
    if problems:
        print(f"rplib: error: {len(problems)} problem{'s' * (len(problems) != 1)} found in {root}", file=sys.stderr)
        return 2
    print("no problems found")
    return 0
