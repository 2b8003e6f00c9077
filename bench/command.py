"""What ``python -m rplib.bench.<module>`` has in common: words in, exit code out, a user's mistake as one line."""

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
    """Read the process's words and run; a `UserError` is one line on stderr and exit code 2.

    Args:
        module: its name below rplib.bench. summary: its docstring, of which the first line is shown.
    """
    parser = argparse.ArgumentParser(prog=f"python -m rplib.bench.{module}", description=summary.split("\n")[0])
    add_arguments(parser)
    args = parser.parse_args()
    try:
        return run(args)
    except UserError as error:
        print(f"rplib: error: {error}", file=sys.stderr)
        return 2
