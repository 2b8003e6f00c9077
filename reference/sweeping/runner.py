"""Trains and scores the missing runs of a plan, several at a time."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rplib.errors import UserError
from rplib.reference.checkpoint import CONFIG
from rplib.reference.files import LOCK, locked, remove_leftovers
from rplib.reference.sweeping.plan import Plan, Planned

LOGS = "logs"
_POLL = 0.2  # seconds between checks of the running commands


def run_plan(plan: Plan, say: Callable[[str], None] = print) -> None:
    """Train and evaluate every run that is not finished; an interrupted run is resumed.

    Every run is two commands, `rplib train` and `rplib evaluate`, each in its own process with one thread. Their output
    goes to a log. A run that fails does not stop the others.

    Raises:
        UserError: some failed (reported at the end), or a folder has other settings (reported before the first starts).
    """
    commands = {run: _commands(run, plan) for run in plan.runs}
    for run in plan.runs:
        _remove_leftovers(run.folder)
    waiting = [run for run, left in commands.items() if left]
    say(f"{len(plan.runs)} runs, {len(plan.runs) - len(waiting)} of them finished; {plan.jobs} at a time")
    (plan.out / LOGS).mkdir(parents=True, exist_ok=True)
    running: dict[Planned, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < plan.jobs:
                run = waiting.pop(0)
                running[run] = _start(commands[run].pop(0), _log(run, plan))
                say(f"{run.folder.name}: started")
            time.sleep(_POLL)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode:
                    failed.append(f"{run.folder.name} ({_last_line(_log(run, plan))})")
                    say(f"{run.folder.name}: failed")
                elif commands[run]:
                    running[run] = _start(commands[run].pop(0), _log(run, plan))
                else:
                    say(f"{run.folder.name}: finished")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} of {len(plan.runs)} runs failed: {'; '.join(failed)}; logs are in {plan.out / LOGS}.")


def _commands(run: Planned, plan: Plan) -> list[list[str]]:
    """The commands that a run still needs."""
    commands: list[Sequence[str | Path]] = []
    finished = run.finished
    if not finished:
        known = (run.folder / CONFIG).is_file()
        arguments = ["--resume"] if known else ["--recipe", run.recipe, "--set", *run.settings]
        commands.append(["train", "--data", plan.data, "--out", run.folder, *arguments])
    if not finished or not run.scores(plan.split).is_file():
        commands.append(["evaluate", run.folder, "--data", plan.data, "--split", plan.split, "--nifti", "none", "--no-maps"])
    return [[sys.executable, "-m", "rplib", *map(str, arguments)] for arguments in commands]


def _remove_leftovers(folder: Path) -> None:
    """Remove what a command that was killed after its last result left: a finished run starts no command that would."""
    for lock in list(folder.rglob(LOCK)):
        with contextlib.suppress(UserError, OSError), locked(lock.parent, str(lock.parent)):  # not while another process writes
            remove_leftovers(lock.parent)


def _start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _log(run: Planned, plan: Plan) -> Path:
    return plan.out / LOGS / f"{run.folder.name}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.removeprefix("rplib: error: ") for line in reversed(lines) if line.strip()), "nothing in its log")
