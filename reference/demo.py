"""Demo on generated data: train labelled-only and mutual side by side with one budget, evaluate, draw.

Appearance differs from case to case, more than the few labelled cases show. No threshold reaches a Dice of 0.6. Both trainings
run the code of `rplib train`, with the same number of iterations, labelled crops and seed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ITERATIONS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="for the volumes and both trainings (default: %(default)s)")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, metavar="N", help="iterations of each training (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="measure these seeds one after another; needs --csv (instead of --seed)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where --seeds writes one row per seed")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit code; user errors raise `rplib.errors.UserError`."""
    from rplib.errors import UserError
    from rplib.reference.demonstration import demonstrate, measure

    if (args.seeds is None) != (args.csv is None):
        raise UserError("--seeds and --csv belong together: the seeds to measure, and the file for their scores.")
    if args.seeds is not None:
        print(measure(args.out, args.seeds, args.iterations, args.device, args.csv), end="")
        return 0
    result = demonstrate(args.out, args.seed, args.iterations, args.device)
    print(result.table, end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`rplib demo` with these arguments (default: those of the process)."""
    from rplib.cli import main as rplib

    return rplib(["demo", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    # `python reference/demo.py` uses the checkout that contains it, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
