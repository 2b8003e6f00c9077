"""Train the two-decoder V-Net by a recipe.

examples:
  rplib train --recipe la-8 --data DIR --out RUN
  rplib train --recipe la-8-supervised --data DIR --out RUN --set filters=4 --set patch=64,64,48 --set iterations=1000
  rplib train --resume --out RUN                       resumes exactly where it stopped
  rplib train --recipe la-8 --data DIR --profile       where a step's time goes on this machine
  torchrun --nproc-per-node 4 -m rplib.reference.train --recipe la-8 --data DIR --out RUN     one batch shared by 4 GPUs
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib train`."""
    parser.add_argument(
        "--recipe", metavar="NAME|FILE.toml",
        help="settings: la-4, la-8, la-16, pancreas-6, pancreas-12, brats-25, brats-50, generic (your own NIfTI folder), each "
        "also with -supervised; or a file",
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
    parser.add_argument("--help-settings", action="store_true", help="list every setting: type, default, meaning")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in RUN")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=10,
        metavar="STEPS",
        help="train nothing: time the parts of a step and of a validation (default: %(const)s steps)",
    )
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms on the GPU too (slower)")


def run(args: argparse.Namespace) -> int:
    """Trains and returns the exit code; mistakes raise `rplib.errors.UserError`."""
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
        raise UserError("--out is missing: the run folder, new or empty unless --resume.")
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
    """`rplib train` with these arguments (default: the process's own)."""
    from rplib.cli import main as rplib

    return rplib(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    # `python reference/train.py` finds rplib in the checkout that it lies in, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
