"""Damaged files, kills and mutants in small numbers: the scripts that count them work, and find nothing.

More of each: `fuzz_files.py`, `kill_runs.py`, `mutation.py`; figures in README.md.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@POSIX
def test_damaged_files_are_refused_by_name():
    out = run("fuzz_files.py", "--files", 10)
    assert out.count(": 10 files, {") == 7 and "failed" not in out and "died" not in out


@POSIX
def test_a_disturbed_conversion_is_finished_by_the_same_command():
    assert "shrink: 8 runs" in run("kill_runs.py", "shrink", "--runs", 8)


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_more_damaged_files():
    run("fuzz_files.py", "--files", 200, "--seed", 5)


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("job", ["train", "evaluate", "predict", "phantom"])
def test_disturbed_runs_are_finished_by_the_same_command(job):
    assert f"{job}: 8 runs" in run("kill_runs.py", job, "--runs", 8)


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_mutants_are_killed(tmp_path):
    """Of the training step; other files have survivors (README.md), so that they are for `mutation.py` by hand."""
    arguments = ["--mutants", 11, "--seed", 1, "--results", tmp_path / "mutants.jsonl", "reference/training/step.py"]
    assert "| all | 11 |" in run("mutation.py", *arguments)
