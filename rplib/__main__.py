"""`python -m rplib` runs the command `rplib`."""

import sys

from rplib.cli import main

if __name__ == "__main__":
    sys.exit(main())
