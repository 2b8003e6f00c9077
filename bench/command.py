"""Common entry point of ``python -m rplib.bench.<module>``: parses options, prints user errors as one line."""

import argparse
import sys
from collections.abc import Callable

from rplib.errors import UserError


def main(
    module: str,
    summary: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> int:
    """Parse the process's arguments and run; a `UserError` is printed as one line on stderr, with exit code 2.

    Args:
        module: its name in rplib.bench. summary: its docstring; the first line is shown.
    """
    parser = argparse.ArgumentParser(prog=f"python -m rplib.bench.{module}", description=summary.split("\n")[0])
    add_arguments(parser)
    args = parser.parse_args()
    try:
        return run(args)
    except UserError as error:
        print(f"rplib: error: {error}", file=sys.stderr)
        return 2
