"""Prepare a data set: convert a raw public release, generate one, downsample or check an existing one.

examples:
  rplib data left-atrium RAW DEST          lgemri.nrrd and laendo.nrrd of the 2018 challenge
  rplib data pancreas RAW DEST             Pancreas-CT: DICOM series or NIfTI, and the label files
  rplib data brats RAW DEST                BraTS-2019 training data: *_flair.nii.gz and *_seg.nii.gz
  rplib data phantom DEST                  a generated set, if you have no data
  rplib data shrink DATA DEST              a converted set at half the resolution
  rplib data check DATA                    reads every case and reports invalid files
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rplib.reference.conversion.releases import Converted

RELEASES = {
    "left-atrium": "the 2018 Left Atrium challenge (NRRD)",
    "pancreas": "Pancreas-CT (DICOM or NIfTI)",
    "brats": "BraTS-2019 (NIfTI), FLAIR only",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib data`."""
    names = "|".join([*RELEASES, "phantom", "shrink", "check"])
    commands = parser.add_subparsers(dest="data_command", metavar=names, required=True)

    for name, what in RELEASES.items():
        release = commands.add_parser(name, help=f"convert the raw release of {what}")
        release.add_argument("raw", type=Path, metavar="RAW", help="folder of the raw release; searched recursively")
        release.add_argument("dest", type=Path, metavar="DEST", help="output folder; existing cases are skipped")
        release.add_argument(
            "--lists", type=Path, metavar="DIR",
            help="folder with the lists of train and test cases to use (default: those in DEST or RAW, else a seeded split "
            "of the published sizes)",
        )  # fmt: skip
        release.add_argument("--seed", type=int, default=1337, help="for the crop margins and the split (default: %(default)s)")
        if name == "pancreas":
            release.add_argument(
                "--flip-labels", default="", metavar="AXES",
                help="axes (x, y, z or several) to flip label files along, for labels whose header does not match the CT",
            )  # fmt: skip

    phantom = commands.add_parser("phantom", help="generate a data set in the layout of the Left Atrium data")
    phantom.add_argument("dest", type=Path, metavar="DEST", help="output folder; new or empty")
    phantom.add_argument("--cases", type=int, default=20, help="cases in train.list (default: %(default)s)")
    phantom.add_argument("--test-cases", type=int, help="cases in test.list (default: a quarter of --cases, plus 1)")
    phantom.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=(48, 48, 40),
        metavar="N",
        help="voxels of X, Y and Z, or of X and Y; the first two vary by up to a quarter between cases (default: 48 48 40)",
    )
    phantom.add_argument(
        "--classes",
        type=int,
        default=2,
        help="number of classes, background included; 3 or more: NIfTI files for the recipe generic (default: 2)",
    )
    phantom.add_argument("--seed", type=int, default=1337, help="the same seed writes the same voxels (default: %(default)s)")

    shrink = commands.add_parser("shrink", help="downsample a converted data set (h5), for small machines")
    shrink.add_argument("raw", type=Path, metavar="DATA", help="folder of the data set")
    shrink.add_argument("dest", type=Path, metavar="DEST", help="output folder; existing cases are skipped")
    shrink.add_argument("--by", type=int, default=2, metavar="N", help="merge N x N x N voxels into one (default: %(default)s)")

    check = commands.add_parser("check", help="read every listed case; exit code 2 if there are problems")
    check.add_argument("dest", type=Path, metavar="DATA", help="folder of the data set")
    check.add_argument("--layout", help="left-atrium, pancreas, brats or generic (default: inferred from the folder)")
    check.add_argument("--classes", type=int, help="number of classes, background included (default: 2; generic: inferred)")
    check.add_argument("--channels", type=int, help="channels per image, generic only (default: as in the first image)")


def run(args: argparse.Namespace) -> int:
    if args.data_command == "check":
        from rplib.reference.datasets.check import check

        return check(args.dest, args.layout, args.classes, args.channels)
    if args.data_command == "shrink":
        return _shrink(args)
    if args.seed < 0:
        from rplib.errors import UserError

        raise UserError(f"--seed is {args.seed}; expected 0 or more.")
    return _phantom(args) if args.data_command == "phantom" else _convert(args)


def _phantom(args: argparse.Namespace) -> int:
    from rplib.errors import UserError
    from rplib.reference.datasets.phantom import write_phantoms
    from rplib.reference.datasets.phantom_organs import write_organs

    test_cases = args.cases // 4 + 1 if args.test_cases is None else args.test_cases
    size = tuple(args.size)
    if args.classes > 2:
        written = write_organs(args.dest, args.cases, test_cases, size, args.classes, args.seed)
    elif len(size) != 3:
        raise UserError(f"--size has {len(size)} numbers; expected three, or two with --classes 3 or more.")
    else:
        written = write_phantoms(args.dest, args.cases, test_cases, size, args.seed)
    print(
        f"{args.dest}: {len(written.train)} training and {len(written.test)} test cases; "
        f"the best single threshold finds an organ with Dice {written.threshold_dice:.2f} at most"
    )
    return 0


def _shrink(args: argparse.Namespace) -> int:
    from rplib.errors import UserError
    from rplib.reference.conversion.releases import convert
    from rplib.reference.conversion.shrink import Shrunk

    if args.raw.resolve() == args.dest.resolve():
        raise UserError(f"DATA and DEST are the same folder, {args.dest}; choose another DEST.")
    release = Shrunk(args.raw, args.by)
    return _report(convert(release, args.raw, args.dest, release.lists), args)


def _convert(args: argparse.Namespace) -> int:
    from rplib.reference.conversion.releases import Release, convert

    release: Release
    if args.data_command == "left-atrium":
        from rplib.reference.conversion.left_atrium import LeftAtriumRelease

        release = LeftAtriumRelease(args.seed)
    elif args.data_command == "pancreas":
        from rplib.reference.conversion.pancreas import PancreasRelease

        release = PancreasRelease(args.flip_labels)
    else:
        from rplib.reference.conversion.brats import BratsRelease

        release = BratsRelease()
    return _report(convert(release, args.raw, args.dest, args.lists, args.seed), args)


def _report(converted: "Converted", args: argparse.Namespace) -> int:
    """Print a summary; returns the exit code."""
    for problem in converted.problems:
        print(problem)
    written = len(converted.written)
    print(
        f"{args.dest}: {written} case{'s' * (written != 1)} written, {len(converted.kept)} already there, "
        f"{len(converted.unlabelled)} without a label"
    )
    for remark in converted.remarks:
        print(remark)
    if converted.problems:
        many = len(converted.problems)
        print(
            f"rplib: error: {many} case{'s' * (many != 1)} of {args.raw} could not be converted; fix or remove "
            f"{'them' if many != 1 else 'it'} and run the command again (finished cases are skipped)",
            file=sys.stderr,
        )
        return 2
    print(f"next: rplib data check {args.dest}")
    return 0
