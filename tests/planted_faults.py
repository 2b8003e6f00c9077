"""Show that the tests bite: plant one fault at a time into a copy of the project and see which test fails.

    python tests/planted_faults.py [--only NAME] [--jobs 2]

A fault that no test catches, a test that fails without any fault, or a substitution whose text is no longer in the source ends
with exit code 1. Nothing in the checkout is changed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import Fault
from faults_loss import LOSS
from faults_trainer import TRAINER

ROOT = Path(__file__).resolve().parent.parent
FAULTS = (*LOSS, *TRAINER)


def copy_of_the_project(folder: Path) -> Path:
    """What the tests need, with the links kept as links."""
    for name in ("rplib", "kernels", "reference", "bench", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def plant(fault: Fault, folder: Path) -> None:
    """Apply the substitutions.

    Raises:
        SystemExit: a text does not occur exactly once; rewrite the fault.
    """
    path = folder / fault.file
    source = path.read_text()
    for old, new in fault.substitutions:
        if source.count(old) != 1:
            raise SystemExit(f"fault {fault.name!r}: {fault.file} holds {source.count(old)} times, not once:\n{old}")
        source = source.replace(old, new)
    path.write_text(source)


def failing_tests(tests: list[str], folder: Path) -> tuple[list[str], str]:
    """Run tests on the copy; names of those that failed, and pytest's output."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("RPLIB_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "--no-header", "-W", "ignore", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        return tests, f"E  the process died of signal {-done.returncode}"
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE), done.stdout


def check(fault: Fault) -> bool:
    """True where the named test fails on the faulty copy."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_the_project(Path(name))
        plant(fault, folder)
        failed, output = failing_tests([fault.test], folder)
    reason = re.findall(r"^(?:E  |\S+:\d+: )(.*)", output, re.MULTILINE)
    print(f"{'caught    ' if failed else 'NOT CAUGHT'}  {fault.name}\n            {fault.test}", flush=True)
    if failed and reason:
        print(f"            {reason[-1].strip()[:150]}", flush=True)
    return bool(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    if not faults:
        raise SystemExit(f"no fault has {args.only!r} in its name")
    with tempfile.TemporaryDirectory() as name:
        for k, fault in enumerate(faults):  # all texts first: a stale one should not show after minutes
            plant(fault, copy_of_the_project(Path(name, f"plant{k}")))
        failed, output = failing_tests(sorted({fault.test for fault in faults}), copy_of_the_project(Path(name, "sound")))
    if failed:
        print(output)
        print(f"{len(failed)} tests fail without any fault: {', '.join(failed)}")
        return 1
    print(f"{len({f.test for f in faults})} tests pass without a fault\n", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        caught = list(pool.map(check, faults))
    print(f"\n{sum(caught)} of {len(faults)} faults caught")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
