"""`rplib data check`: reads every case of a data set and reports invalid files."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rplib.errors import UserError
from rplib.reference.datasets.cases import MOST_CLASSES
from rplib.reference.datasets.layouts import NiftiFolder, guess_layout, open_dataset
from rplib.reference.progress import progress

_MANY = 4  # with at least this many labelled cases, a label value that occurs in only one is reported


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

    unlabelled, bare, sizes = 0, 0, []
    voxels: dict[int, dict[str, int]] = defaultdict(dict)  # label value -> case -> number of voxels
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
        for value, number in zip(*np.unique(case.label, return_counts=True), strict=True):
            voxels[int(value)][name] = int(number)
        if not case.label.any() and case.label.ndim == 2:
            bare += 1  # normal for slices
        elif not case.label.any():
            problems.append(
                f"{dataset.path(name)}: 'label' contains only background; "
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
        known = dataset.label_names
        labels = ", ".join(f"{value} ({known[value]})" if value in known else str(value) for value in sorted(voxels))
        highest = max([*voxels, *known], default=0)
        print(
            f"{dataset.dims}-D, {dataset.channels} channel{'s' * (dataset.channels != 1)}, labels {labels}: "
            f"--set in_channels={dataset.channels} classes={highest + 1}"
        )
    remarks = [*dataset.remarks(), *(label_remarks(voxels) if own else [])] if sizes else []
    if bare:
        remarks.append(f"{bare} label{'s' * (bare != 1)} of 2-D images contain{'s' * (bare == 1)} only background.")
    for remark in remarks:
        print(remark)
    if problems:
        print(f"rplib: error: {len(problems)} problem{'s' * (len(problems) != 1)} found in {root}", file=sys.stderr)
        return 2
    print("no problems found")
    return 0


def label_remarks(voxels: Mapping[int, Mapping[str, int]]) -> list[str]:
    """Remarks on label values that look like mistakes: gaps, and values in a single case.

    Args:
        voxels: per label value, the number of voxels in each case that contains it.

    >>> label_remarks({0: {"a": 90, "b": 90}, 2: {"a": 10, "b": 10}})
    ['no case contains label 1, although 2 occurs; renumber the labels 0..1 without gaps, or that class has no training voxel.']
    """
    remarks = []
    highest = max(voxels, default=0)
    gaps = [value for value in range(1, highest) if value not in voxels]
    if gaps:
        shown = ", ".join(map(str, gaps[:5])) + ", ..." * (len(gaps) > 5)
        many = len(gaps) > 1
        remarks.append(
            f"no case contains label{'s' * many} {shown}, although {highest} occurs; renumber the labels 0..{len(voxels) - 1} "
            f"without gaps, or {'those classes have' if many else 'that class has'} no training voxel."
        )
    cases = {name for counts in voxels.values() for name in counts}
    for value, counts in sorted(voxels.items()):
        if value and len(counts) == 1 and len(cases) >= _MANY:
            ((name, number),) = counts.items()
            remarks.append(
                f"label {value} occurs in only one of {len(cases)} labelled cases, {name} ({number} voxel{'s' * (number != 1)}); "
                "check whether it is a mistake."
            )
    return remarks
