"""Damaged files, kills and mutants in small numbers: the scripts that count them work, and find nothing.

More of each: `fuzz_files.py`, `kill_runs.py`, `mutation.py`; figures in README.md.
"""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_files
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


def spin(*_: object) -> str:
    while True:
        pass


@POSIX
@pytest.mark.parametrize(
    ("wrong", "counted"),
    [(spin, {"hung": 1}), (lambda *_: os.kill(os.getpid(), 9), {"died": 1}), (lambda *_: "exit code 1", {"failed": 1})],
)  # fmt: skip
def test_what_ends_badly_or_never_is_counted(monkeypatch, wrong, counted):
    monkeypatch.setattr(fuzz_files, "SECONDS", 1)
    monkeypatch.setattr(fuzz_files, "verdict", wrong)
    counts, failures = fuzz_files.fuzz("toml", 1, seed=1)
    assert counts == counted and len(failures) == 1 and failures[0].startswith("toml, seed 1, file 0: ")


@pytest.mark.slow
@POSIX
def test_a_disturbed_conversion_is_finished_by_the_same_command():
    assert "shrink: 11 runs" in run("kill_runs.py", "shrink", "--runs", 11)


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_more_damaged_files():
    run("fuzz_files.py", "--files", 200, "--seed", 5)


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("job", "runs"), [("train", 11), ("evaluate", 11), ("predict", 11), ("phantom", 11), ("sweep", 11), ("torchrun", 2)]
)
def test_disturbed_runs_are_finished_by_the_same_command(job, runs):
    assert f"{job}: {runs} runs" in run("kill_runs.py", job, "--runs", runs)


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_mutants_are_killed(tmp_path):
    """A tenth of the standing sample, some of each part: every one is killed or known to be equivalent."""
    out = run("mutation.py", "--share", 0.1, "--results", tmp_path / "mutants.jsonl")
    assert "| all | 33 |" in out, out
