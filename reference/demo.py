"""The whole job on generated data in a minute or two: train labelled-only and mutual under one budget, score, picture.

The organ of the generated volumes cannot be found by its intensity: no threshold reaches a Dice of 0.6. Both trainings
go through the code of `rplib train`, with the same number of iterations, the same labelled crops and the same seed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ITERATIONS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `rplib demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="of the volumes and of both trainings (default: %(default)s)")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, metavar="N", help="budget of each training (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit code; mistakes raise `rplib.errors.UserError`."""
    from rplib.reference.demonstration import demonstrate

    result = demonstrate(args.out, args.seed, args.iterations, args.device)
    print(result.table, end="")
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """`rplib demo` with these words (default: the process's own)."""
    from rplib.cli import main as rplib

    return rplib(["demo", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    # `python reference/demo.py` finds rplib in the checkout that it lies in, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
