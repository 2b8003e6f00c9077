"""``python -m rplib.bench.machine``: counts per voxel of the compiled kernels of the loss."""

import sys

from rplib.bench.command import main
from rplib.bench.machine import report

if __name__ == "__main__":
    sys.exit(main("machine", str(report.__doc__), report.add_arguments, report.run))
