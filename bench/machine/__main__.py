"""``python -m rplib.bench.machine``: what the kernels of the loss do per voxel, as compiled."""

import sys

from rplib.bench.command import main
from rplib.bench.machine import report

if __name__ == "__main__":
    sys.exit(main("machine", str(report.__doc__), report.add_arguments, report.run))
