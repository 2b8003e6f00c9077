"""Evaluate a trained run: Dice, Jaccard, 95HD and ASD per case and on average, next to a fixed-box baseline.

RUN/evaluation-test/report.html collects everything: protocol, tables, pictures, reliability maps, curves, settings.

examples:
  rplib evaluate RUN --data DIR                         all test cases; writes RUN/evaluation-test
  rplib evaluate RUN --data DIR --cases 4 --stride 32 32 16     quick check: few cases, few windows
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib evaluate`."""
    from rplib.reference.arguments import count, length, positive

    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder of `rplib train`, or a checkpoint (*.pt, *.pth)")
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: RUN/evaluation-SPLIT)")
    parser.add_argument(
        "--weights",
        choices=("best", "last", "averaged"),
        help="weights of the run (default: best if they exist, else last); with averaged weights, also evaluates the last ones",
    )
    parser.add_argument("--split", choices=("test", "train", "val"), default="test", help="list of cases (default: %(default)s)")
    parser.add_argument("--cases", type=positive, metavar="N", help="evaluate only the first N cases of the list")
    parser.add_argument(
        "--stride",
        type=positive,
        nargs="+",
        metavar="N",
        help="voxels between windows, one number per axis (default: the run's setting)",
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="windows per forward pass (default: the run's setting)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    parser.add_argument(
        "--spacing", type=length, nargs="+", metavar="MM",
        help="voxel size in mm, one number per axis, for distances in mm and for NIfTI headers (default: as in the "
        "files; the published h5 files lack it, Left Atrium: 0.625 0.625 0.625)",
    )  # fmt: skip
    parser.add_argument(
        "--patients",
        metavar="REGEX",
        help="add scores per patient, over all voxels of the patient: a regular expression with one group, which matches the "
        "patient in a case's name, such as '(patient[0-9]+)_'",
    )
    parser.add_argument("--largest-component", action="store_true", help="keep the largest component of each class (paper: no)")
    parser.add_argument(
        "--nifti", choices=("prediction", "all", "none"), default="prediction",
        help="NIfTI files to write: predictions; all: also image, ground truth and score (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures",
        type=count,
        default=6,
        metavar="N",
        help="number of worst cases to show, as slices and as reliability maps (default: %(default)s)",
    )
    parser.add_argument("--no-maps", action="store_true", help="skip the reliability maps (a few more windows per case)")


def run(args: argparse.Namespace) -> int:
    """Evaluates and returns the exit code; user errors raise `rplib.errors.UserError`."""
    from rplib.errors import UserError
    from rplib.reference.evaluation.patients import patient_pattern
    from rplib.reference.evaluation.scoring import evaluate
    from rplib.reference.files import output_folder, remove_leftovers
    from rplib.reference.reporting.report import VOLUMES, nifti_writer, write

    run_folder = args.run_folder if args.run_folder.is_dir() else args.run_folder.parent
    out = args.out or run_folder / f"evaluation-{args.split}"
    if not args.run_folder.exists():
        raise UserError(f"no run folder {args.run_folder}; create one with `rplib train --out {args.run_folder}`.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder.")
    patients = None if args.patients is None else patient_pattern(args.patients)
    volumes = None if args.nifti == "none" else nifti_writer(out / VOLUMES, args.spacing, args.nifti == "all")
    with output_folder(out, f"--out {out}"):
        remove_leftovers(out, deep=True)
        report = evaluate(
            args.run_folder,
            args.data,
            weights=args.weights,
            split=args.split,
            cases=args.cases,
            stride=args.stride,
            batch=args.batch,
            device=args.device,
            spacing=args.spacing,
            keep_largest=args.largest_component,
            on_case=volumes,
            maps=0 if args.no_maps else args.pictures,
            pictures=args.pictures,
            patients=patients,
        )
        write(report, out, args.pictures)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`rplib evaluate` with these arguments (default: those of the process)."""
    from rplib.cli import main as rplib

    return rplib(["evaluate", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    # `python reference/evaluate.py` uses the checkout that contains it, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
