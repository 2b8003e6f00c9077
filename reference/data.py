"""Write a generated data set (`phantom`), or read the one you have and say what is wrong with which file (`check`)."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `rplib data`."""
    commands = parser.add_subparsers(dest="data_command", metavar="phantom|check", required=True)

    phantom = commands.add_parser("phantom", help="write a generated data set in the layout of the Left Atrium data")
    phantom.add_argument("dest", type=Path, metavar="DEST", help="folder to write; new or empty")
    phantom.add_argument("--cases", type=int, default=20, help="in train.list (default: %(default)s)")
    phantom.add_argument("--test-cases", type=int, help="in test.list (default: a quarter of --cases, plus 1)")
    phantom.add_argument(
        "--size",
        type=int,
        nargs=3,
        default=(48, 48, 40),
        metavar=("X", "Y", "Z"),
        help="voxels; the first two grow by up to a quarter from case to case (default: 48 48 40)",
    )
    phantom.add_argument("--seed", type=int, default=1337, help="the same seed writes the same voxels (default: %(default)s)")

    check = commands.add_parser("check", help="read every case of both lists; exit code 2 if anything is wrong")
    check.add_argument("dest", type=Path, metavar="DEST", help="folder of the data set")
    check.add_argument("--layout", default="left-atrium", help="layout on disk (default: %(default)s)")
    check.add_argument("--classes", type=int, default=2, help="background included (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    return {"phantom": _phantom, "check": _check}[args.data_command](args)


def _phantom(args: argparse.Namespace) -> int:
    from rplib.errors import UserError
    from rplib.reference.phantom import write_phantoms

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; expected 0 or more.")
    test_cases = args.cases // 4 + 1 if args.test_cases is None else args.test_cases
    written = write_phantoms(args.dest, args.cases, test_cases, tuple(args.size), args.seed)
    print(
        f"{args.dest}: {len(written.train)} training and {len(written.test)} test cases; "
        f"the best single threshold finds the organ with Dice {written.threshold_dice:.2f} at most"
    )
    return 0


def _check(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rplib.errors import UserError
    from rplib.reference.datasets import open_dataset

    dataset = open_dataset(args.dest, args.layout, args.classes)
    problems: list[str] = []
    names: dict[str, list[str]] = {}
    for split in ("train", "test"):
        try:
            names[split] = dataset.names(split)
        except UserError as error:
            problems.append(str(error))
            names[split] = []
    for name in sorted(set(names["train"]) & set(names["test"])):
        problems.append(f"case {name} is in train.list and in test.list; take it out of one of them.")

    unlabelled, sizes = 0, []
    todo = [(split, name) for split in names for name in names[split]]
    for split, name in tqdm(todo, desc="checking", unit="case", leave=False):
        try:
            case = dataset.load(name, needs_label=split == "test")
        except UserError as error:
            problems.append(str(error))
            continue
        sizes.append(case.image.shape)
        if case.label is None:
            unlabelled += 1
        elif not case.label.any():
            problems.append(f"{dataset.path(name)}: 'label' is background everywhere; take the key out if it is unlabelled.")

    for problem in problems:
        print(problem)
    if sizes:
        axes = [f"{min(axis)}-{max(axis)}" for axis in zip(*sizes, strict=True)]
        print(
            f"{args.dest}: {len(names['train'])} training cases ({unlabelled} without a label), "
            f"{len(names['test'])} test cases; {' x '.join(axes)} voxels"
        )
    if problems:
        print(f"rplib: error: {len(problems)} problem{'s' * (len(problems) != 1)} found in {args.dest}", file=sys.stderr)
        return 2
    print("nothing wrong")
    return 0
