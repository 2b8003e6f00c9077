"""Check a wide network, 32 classes and 256 feature channels: register usage and bytes moved by the kernels.

    python -m rplib.bench.wide

Compiles the kernels ahead of time for sm_80, sm_90 and sm_100, and counts their bytes in Triton's interpreter: several minutes.
Exit code 1 if a kernel spills registers, a result is wrong, or the bytes pass 1.3 times the floor.
"""

import argparse
import sys
from itertools import product

from rplib.bench.ahead_of_time import matrix, report_all, table
from rplib.bench.command import main
from rplib.bench.floor import floor_bytes
from rplib.bench.metered import MeterFailedError, metered
from rplib.bench.shapes import DTYPES, LAYOUTS, Case, Shape
from rplib.errors import UserError

CLASSES, FEATURES = 32, 256
TARGETS = ("sm_80", "sm_90", "sm_100")
MOST_BYTES = 1.3  # of the floor


def bytes_moved(case: Case) -> tuple[str, bool]:
    """One line about a case, and whether it passed."""
    shape = case.shape
    floor = floor_bytes(shape.classes, shape.features, DTYPES[case.dtype].itemsize)
    try:
        found = metered(case)
    except MeterFailedError as error:
        return f"{case}: failed: {error}", False
    lanes, sectors = found.lane_bytes / floor, found.sector_bytes / floor
    good = found.right and lanes <= MOST_BYTES
    return (
        f"{case}: {found.lane_bytes:.0f} B/voxel by lane, {lanes:.2f} x the floor of {floor}; "
        f"{found.sector_bytes:.0f} by sector, {sectors:.2f} x; {found.launches} launches; {found.verdict}"
        f"{'' if found.right else '  WRONG'}{'' if lanes <= MOST_BYTES else f'  more than {MOST_BYTES} x'}"
    ), good


def run(args: argparse.Namespace) -> int:
    """Print both reports; returns 1 if a check failed."""
    if args.edge < 1 or args.jobs < 1:
        raise UserError(f"--edge is {args.edge} and --jobs {args.jobs}; expected at least 1.")
    rows = report_all(matrix(shapes=[(CLASSES, FEATURES)], targets=TARGETS), args.jobs, progress=True)
    print(table(rows), flush=True)
    spilling = [row for row in rows if row.spills]
    print(f"\n{len(rows)} kernels compiled for {', '.join(TARGETS)}; {len(spilling)} spill registers.\n", flush=True)
    bad = len(spilling)
    for dtype, layout in product(DTYPES, LAYOUTS):
        line, good = bytes_moved(Case(Shape("wide", 1, CLASSES, FEATURES, (args.edge, args.edge, 2 * args.edge)), dtype, layout))
        print(line, flush=True)
        bad += not good
    print("OK" if not bad else f"{bad} of {len(rows)} kernels and {len(DTYPES) * len(LAYOUTS)} counts failed.")
    return 1 if bad else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--edge", type=int, default=16, metavar="N", help="count on N x N x 2N voxels (%(default)s); more weigh partial sums less"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes (default %(default)s)")


if __name__ == "__main__":
    sys.exit(main("wide", __doc__, add_arguments, run))
