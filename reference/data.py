"""Get a data set ready: convert a raw public release, write a generated one, shrink or check the one you have.

examples:
  rplib data left-atrium RAW DEST          lgemri.nrrd and laendo.nrrd of the 2018 challenge
  rplib data pancreas RAW DEST             Pancreas-CT: DICOM series or NIfTI, and the label files
  rplib data brats RAW DEST                BraTS-2019 training data: *_flair.nii.gz and *_seg.nii.gz
  rplib data phantom DEST                  a generated set, if you have no data yet
  rplib data shrink DATA DEST              a converted set at half the resolution, for laptops
  rplib data check DEST                    reads every case, says what is wrong with which file
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
    "brats": "BraTS-2019 (NIfTI), FLAIR alone",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `rplib data`."""
    words = "|".join([*RELEASES, "phantom", "shrink", "check"])
    commands = parser.add_subparsers(dest="data_command", metavar=words, required=True)

    for name, what in RELEASES.items():
        release = commands.add_parser(name, help=f"convert the raw release of {what}")
        release.add_argument("raw", type=Path, metavar="RAW", help="folder of the raw release; searched with its folders")
        release.add_argument("dest", type=Path, metavar="DEST", help="folder to write; what is there already is not done again")
        release.add_argument(
            "--lists", type=Path, metavar="DIR",
            help="folder with the lists of train and test cases to use (default: those in DEST or RAW, else a seeded split "
            "of the published sizes)",
        )  # fmt: skip
        release.add_argument("--seed", type=int, default=1337, help="of the crop's margins and the split (default: %(default)s)")
        if name == "pancreas":
            release.add_argument(
                "--flip-labels", default="", metavar="AXES",
                help="axes (x, y, z or several) to flip the label files along, where their headers do not place them on the CT",
            )  # fmt: skip

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

    shrink = commands.add_parser("shrink", help="write a converted data set (h5) at a lower resolution, for laptops")
    shrink.add_argument("raw", type=Path, metavar="DATA", help="folder of the data set")
    shrink.add_argument("dest", type=Path, metavar="DEST", help="folder to write; what is there already is not done again")
    shrink.add_argument("--by", type=int, default=2, metavar="N", help="put N x N x N voxels together (default: %(default)s)")

    check = commands.add_parser("check", help="read every case of all lists; exit code 2 if anything is wrong")
    check.add_argument("dest", type=Path, metavar="DEST", help="folder of the data set")
    check.add_argument("--layout", help="left-atrium, pancreas, brats or generic (default: told from the folder)")
    check.add_argument("--classes", type=int, help="background included (default: 2; for generic those that are found)")
    check.add_argument("--channels", type=int, help="for generic: of each image (default: as the first image has)")


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
    from rplib.reference.datasets.phantom import write_phantoms

    test_cases = args.cases // 4 + 1 if args.test_cases is None else args.test_cases
    written = write_phantoms(args.dest, args.cases, test_cases, tuple(args.size), args.seed)
    print(
        f"{args.dest}: {len(written.train)} training and {len(written.test)} test cases; "
        f"the best single threshold finds the organ with Dice {written.threshold_dice:.2f} at most"
    )
    return 0


def _shrink(args: argparse.Namespace) -> int:
    from rplib.errors import UserError
    from rplib.reference.conversion.releases import convert
    from rplib.reference.conversion.shrink import Shrunk

    if args.raw.resolve() == args.dest.resolve():
        raise UserError(f"DATA and DEST are the same folder, {args.dest}; choose another DEST.")
    release = Shrunk(args.raw, args.by)
    return _told(convert(release, args.raw, args.dest, release.lists), args)


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
    return _told(convert(release, args.raw, args.dest, args.lists, args.seed), args)


def _told(converted: "Converted", args: argparse.Namespace) -> int:
    """Say what was done; the exit code."""
    for problem in converted.problems:
        print(problem)
    written = len(converted.written)
    print(
        f"{args.dest}: {written} case{'s' * (written != 1)} written, {len(converted.kept)} were there already, "
        f"{len(converted.unlabelled)} without a label"
    )
    for remark in converted.remarks:
        print(remark)
    if converted.problems:
        many = len(converted.problems)
        print(
            f"rplib: error: {many} case{'s' * (many != 1)} of {args.raw} could not be converted; mend or remove "
            f"{'them' if many != 1 else 'it'} and run the command again (what is done is not done again)",
            file=sys.stderr,
        )
        return 2
    print(f"next: rplib data check {args.dest}")
    return 0
