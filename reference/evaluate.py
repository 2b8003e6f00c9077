"""Score a trained run on its test cases: Dice, Jaccard, 95HD and ASD per case and on average, beside a fixed box.

RUN/evaluation-test/report.html holds all of it in one file: protocol, tables, pictures, reliability maps, curves, settings.

examples:
  rplib evaluate RUN --data DIR                         all test cases, into RUN/evaluation-test
  rplib evaluate RUN --data DIR --cases 4 --stride 32 32 16     quick look: few cases, few windows
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUN/evaluation-SPLIT)")
    parser.add_argument(
        "--weights",
        choices=("best", "last", "averaged"),
        help="weights of the run (default: best where it was written, else last); beside averaged weights the last are scored",
    )
    parser.add_argument("--split", choices=("test", "train", "val"), default="test", help="which list (default: %(default)s)")
    parser.add_argument("--cases", type=positive, metavar="N", help="only the first N cases of the list")
    parser.add_argument(
        "--stride",
        type=positive,
        nargs="+",
        metavar="N",
        help="voxels between windows, one number per axis (default: the run's setting)",
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="windows per forward pass (default: the run's setting)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--spacing", type=length, nargs="+", metavar="MM",
        help="voxel size in mm, one number per axis, for distances in mm too and for the NIfTI header (default: as in the "
        "files; the published h5 files do not hold it, Left Atrium: 0.625 0.625 0.625)",
    )  # fmt: skip
    parser.add_argument("--largest-component", action="store_true", help="keep the largest part of each class (the paper: no)")
    parser.add_argument(
        "--nifti", choices=("prediction", "all", "none"), default="prediction",
        help="what to write as NIfTI: labels of decoder 1; image, truth and score too; nothing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures",
        type=count,
        default=6,
        metavar="N",
        help="worst cases to show, as slices and as reliability maps (default: %(default)s)",
    )
    parser.add_argument("--no-maps", action="store_true", help="no reliability maps; they take a few windows a case more")


def run(args: argparse.Namespace) -> int:
    """Evaluates and returns the exit code; mistakes raise `rplib.errors.UserError`."""
    from rplib.errors import UserError
    from rplib.reference.evaluation.scoring import evaluate
    from rplib.reference.reporting.report import VOLUMES, nifti_writer, write

    run_folder = args.run_folder if args.run_folder.is_dir() else args.run_folder.parent
    out = args.out or run_folder / f"evaluation-{args.split}"
    if not args.run_folder.exists():
        raise UserError(f"no run folder {args.run_folder}; make one with `rplib train --out {args.run_folder}`.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder.")
    volumes = None if args.nifti == "none" else nifti_writer(out / VOLUMES, args.spacing, args.nifti == "all")
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
    )
    write(report, out, args.pictures)
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """`rplib evaluate` with these words (default: the process's own)."""
    from rplib.cli import main as rplib

    return rplib(["evaluate", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    # `python reference/evaluate.py` finds rplib in the checkout that it lies in, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
