"""Train the two-decoder V-Net with a recipe.

examples:
  rplib train --recipe la-8 --data DIR --out RUN
  rplib train --recipe la-8-supervised --data DIR --out RUN --set filters=4 --set patch=64,64,48 --set iterations=1000
  rplib train --resume --out RUN                       resumes exactly where it stopped
  rplib train --recipe la-8 --data DIR --profile       times the parts of a training step
  torchrun --nproc-per-node 4 -m rplib.reference.train --recipe la-8 --data DIR --out RUN     each batch split over 4 GPUs
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib train`."""
    parser.add_argument(
        "--recipe", metavar="NAME|FILE.toml",
        help="one of la-4, la-8, la-16, pancreas-6, pancreas-12, brats-25, brats-50, generic (your own NIfTI folder), each "
        "also as NAME-supervised (la-4, la-8, la-16 also as NAME-robust); or a TOML file",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder; new or empty unless --resume")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        nargs="+",
        default=[],
        dest="overrides",
        help="change settings of the recipe; may be repeated",
    )
    parser.add_argument("--help-settings", action="store_true", help="list every setting with type, default and meaning")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in RUN")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=10,
        metavar="STEPS",
        help="do not train; time the parts of a step and of a validation over STEPS steps (default: %(const)s)",
    )
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms on the GPU too (slower)")


def run(args: argparse.Namespace) -> int:
    """Trains and returns the exit code; user errors raise `rplib.errors.UserError`."""
    from rplib.errors import UserError
    from rplib.reference.config import describe_settings
    from rplib.reference.training.start import start, start_profile

    if args.help_settings:
        print(describe_settings(), end="")
        return 0
    overrides = [setting for settings in args.overrides for setting in settings]
    if args.profile is not None:
        start_profile(args.recipe, args.data, overrides, args.device, args.profile, args.deterministic)
        return 0
    if args.out is None:
        raise UserError("--out is missing: give a run folder, new or empty unless --resume.")
    start(
        recipe=args.recipe,
        data=args.data,
        out=args.out,
        overrides=overrides,
        resume=args.resume,
        device=args.device,
        deterministic=args.deterministic,
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`rplib train` with these arguments (default: those of the process)."""
    from rplib.cli import main as rplib

    return rplib(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    # `python reference/train.py` uses the checkout that contains it, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
