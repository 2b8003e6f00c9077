"""Faults while a command runs, at random moments, and what is left afterwards.

    python tests/kill_runs.py --runs 50 [--seed 1] [train evaluate predict shrink phantom sweep torchrun]
    python tests/kill_runs.py --runs 12 --faults "full disk" quota "small disk" -- train shrink

Each run is disturbed once: killed (SIGKILL), terminated (SIGTERM), interrupted (SIGINT), not allowed files beyond a random size,
on a disk that is full or over quota from a random write on, on a disk of a random size (a tmpfs; without the right to mount one a
full disk instead), without one of its input files, or joined by a second process with the same arguments. Then the command runs
once more (a training with --resume), on the same disk with more room. It must end with 0 and leave what an undisturbed run
leaves, to the bit, and nothing of ours beside it. A disturbed run itself may end with 0, 2 (one line), 130 (SIGINT) or 143
(SIGTERM), and never shows a traceback. The count goes on at --first: runs K to N of a seed are the same in every run.
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAULTS = (
    "kill", "terminate", "kill", "no room", "vanished file", "kill", "two writers", "interrupt", "full disk", "quota",
    "small disk",
)  # fmt: skip
LONGEST = 900  # seconds
OF_THE_MOMENT = ("environment.json", "curves.png", "last.previous.pt")  # times and paths; what was there before
REFUSED = {"full disk": errno.ENOSPC, "quota": errno.EDQUOT}
# For processes that the command starts: `sitecustomize` is imported by every interpreter.
SITECUSTOMIZE = """
import os, sys
if "RPLIB_REFUSED" in os.environ:
    sys.path.insert(0, os.environ["RPLIB_TESTS"])
    import kill_runs
    kill_runs.refuse_writes(*map(int, os.environ["RPLIB_REFUSED"].split()))
"""


class Job(NamedTuple):
    """A command, what it is given, how it goes on, and what it leaves that counts."""

    arguments: list[str]
    again: list[str]
    inputs: Path
    out: Path
    alone: bool = True  # whether a second writer is refused


def jobs(folder: Path) -> dict[str, Callable[[Path], Job]]:
    """Every job with an output folder to be chosen; inputs lie in `folder`."""
    from reference_tools import TINY, write_dataset

    data, run = folder / "data", folder / "run"
    names = write_dataset(data, train=5, test=3)
    settings = [*TINY, "checkpoint_every=2", "log_every=1", "protocol=paper", "validate_from=4", "validate_every=4"]
    arguments = ["train", "--recipe", "la-4", "--data", str(data), "--device", "cpu", "--set", *settings]
    code, message = finish(start([*arguments, "--out", str(run)], folder / "log"))
    assert code == 0, message
    images = [str(data / "2018LA_Seg_Training Set" / name / "mri_norm2.h5") for name in names[5:]]

    def train(out: Path) -> Job:
        mine = [*arguments, "--out", str(out)]
        return Job(mine, [*mine, "--resume"], data, out)

    def evaluate(out: Path) -> Job:
        mine = ["evaluate", str(run), "--data", str(data), "--out", str(out), "--nifti", "all", "--device", "cpu"]
        return Job(mine, mine, data, out)

    def predict(out: Path) -> Job:
        mine = ["predict", str(run), *images, "--out", str(out), "--score", "--device", "cpu", "--existing", "skip"]
        return Job(mine, mine, data, out, alone=False)

    def shrink(out: Path) -> Job:
        mine = ["data", "shrink", str(data), str(out)]
        return Job(mine, mine, data, out)

    def phantom(out: Path) -> Job:
        mine = ["data", "phantom", str(out), "--cases", "2", "--size", "32", "32", "32"]
        return Job(mine, mine, folder / "nothing", out)

    def sweep(out: Path) -> Job:
        plan = folder / f"{out.name}.toml"
        last = dict(one.split("=", 1) for one in settings)  # a later setting replaces an earlier one
        listed = ", ".join(f"{key} = {_toml(value)}" for key, value in last.items())
        plan.write_text(
            f'data = "{data}"\nout = "{out}"\nseeds = [3]\nset = {{ {listed} }}\n'
            '[cells.alone]\nrecipe = "la-4-supervised"\n'
            'set = { batch_size = 2, labelled_per_batch = 2 }\n[cells.both]\nrecipe = "la-4"\n'
        )
        return Job(["sweep", str(plan)], ["sweep", str(plan)], data, out)

    def torchrun(out: Path) -> Job:
        mine = [*arguments, "--out", str(out)]
        return Job(["torchrun", *mine], ["torchrun", *mine, "--resume"], data, out)

    return {
        "train": train, "evaluate": evaluate, "predict": predict, "shrink": shrink, "phantom": phantom, "sweep": sweep,
        "torchrun": torchrun,
    }  # fmt: skip


def _toml(value: str) -> str:
    return f"[{value}]" if "," in value else value if value.replace(".", "").isdigit() else f'"{value}"'


def refuse_writes(number: int, after: int) -> None:
    """From the given file on, the disk takes no more: the error comes where a file is synchronised, as of a quota on NFS."""
    genuine, left = os.fsync, iter(range(after))

    def fsync(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(number, os.strerror(number))
        genuine(descriptor)

    os.fsync = fsync


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[], None]]:
    """A tmpfs of that size at an empty folder; the yielded function gives it room."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "rplib", str(folder)], check=True, capture_output=True)

    def give_room() -> None:
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)

    try:
        yield give_room
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    try:
        with small_disk(folder, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        folder.rmdir()
        return False


def preload() -> None:
    """What every command imports, once: the runs are forked from this process."""
    for name in ("trainer", "curves", "scoring", "report", "new_images", "phantom", "shrink"):
        packages = {"trainer": "training", "scoring": "evaluation", "new_images": "inference", "phantom": "datasets"}
        package = packages.get(name, "conversion" if name == "shrink" else "reporting")
        importlib.import_module(f"rplib.reference.{package}.{name}")
    for name in ("monai.inferers", "matplotlib.figure", "torch.utils.tensorboard", "torch.optim", "SimpleITK"):
        importlib.import_module(name)


def start(arguments: list[str], log: Path, room: int | None = None, refused: tuple[int, int] | None = None) -> tuple[int, Path]:
    """A forked process that runs a command; its id and its log."""
    process = os.fork()
    if process:
        return process, log
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LONGEST)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if room is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        if refused is not None:
            refuse_writes(*refused)
            os.environ["RPLIB_REFUSED"] = f"{refused[0]} {refused[1]}"
        if arguments[0] == "torchrun":
            program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rplib"]
            os.execv(sys.executable, [*program, *arguments[1:]])
        from rplib import cli

        code = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
    raise AssertionError


def descendants(process: int) -> list[int]:
    """A machine that goes down and a Ctrl-C meet all processes of a command."""
    try:
        own = [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has ended, or this is no Linux
        return []
    return [*own, *(other for one in own for other in descendants(one))]


def finish(process: tuple[int, Path]) -> tuple[int, str]:
    _, status = os.waitpid(process[0], 0)
    return os.waitstatus_to_exitcode(status), process[1].read_text(errors="replace")


def left(job: Job) -> dict[str, str]:
    """What lies in the output folder, by name: hashes, without what a clock or a path has written."""
    import torch

    found = {}
    for path in sorted(p for p in job.out.rglob("*") if p.is_file()):
        name = str(path.relative_to(job.out))
        if path.name.startswith("events.") or path.suffix in (".html", ".log") or path.name in OF_THE_MOMENT:
            continue
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            text = repr([(k, v.tolist()) for k, v in content["network"].items()]) + str(content["iteration"])
        elif path.name == "metrics.csv":
            with path.open(newline="") as file:
                text = repr([[v for k, v in row.items() if k != "seconds"] for row in csv.DictReader(file)])
        elif path.suffix == ".h5":
            import h5py

            with h5py.File(path) as file:
                text = repr([(k, file[k][()].tobytes()) for k in file])
        else:
            text = repr(path.read_bytes())
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def disturbed(fault: str, job: Job, seconds: float, draw: random.Random, log: Path) -> str:
    """Runs the job with the fault; what is wrong with how it ended, or ""."""
    room = draw.choice((100, 1000, 5000, 20_000, 100_000, 1_000_000)) if fault == "no room" else None
    if fault == "two writers":
        both = [start(job.arguments, log), start(job.arguments, log.with_suffix(".second"))]
        ends = [finish(process) for process in both]
        codes = sorted(code for code, _ in ends)
        message = ends[0][1] + ends[1][1]
        refused = ("another rplib process", "is not empty", "not an empty folder")
        right = codes in ([0, 0], [0, 2]) if not job.alone or job.arguments[0] != "train" else codes == [0, 2]
        if job.arguments[0] == "sweep":  # each may have taken a run that the other wanted
            right = codes in ([0, 0], [0, 2], [2, 2])
        if codes in ([0, 2], [2, 2]) and not any(text in message for text in refused):
            right = False
        return "" if right and "Traceback" not in message else f"exit codes {codes}: {message[-500:]}"
    refused = (REFUSED[fault], draw.randrange(12)) if fault in REFUSED else None
    process = start(job.arguments, log, room, refused)
    gone = None
    if fault in ("kill", "terminate", "interrupt", "vanished file"):
        time.sleep(draw.uniform(0, 1.1 * seconds))
    if fault in ("kill", "terminate", "interrupt"):
        number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[fault]
        with contextlib.suppress(ProcessLookupError):
            for one in [process[0]] if fault == "terminate" else [process[0], *descendants(process[0])]:
                os.kill(one, number)
    elif fault == "vanished file":
        files = sorted(path for path in job.inputs.rglob("*") if path.is_file()) if job.inputs.is_dir() else []
        if files:
            gone = draw.choice(files)
            content = gone.read_bytes()
            gone.unlink()
    code, message = finish(process)
    if gone is not None:
        gone.write_bytes(content)
    allowed = {"kill": (-signal.SIGKILL, 0), "terminate": (143, 0), "interrupt": (130, 0)}.get(fault, (0, 2))
    if job.arguments[0] == "torchrun":  # it ends with 1 and a traceback of its own
        ours = "/rplib/" in message or message.count("rplib: error") > 1
        return f"exit code {code}: {message[-800:]}" if ours else ""
    if code not in allowed or "Traceback" in message:
        return f"exit code {code}: {message[-800:]}"
    mistakes = [line for line in message.splitlines() if line.startswith("rplib: error: ")]
    return "" if code != 2 or len(mistakes) == 1 else f"{len(mistakes)} lines of errors: {message[-500:]}"


def finished(name: str, job: Job, expected: dict[str, str], log: Path) -> tuple[bool, str]:
    """Gives a disturbed job once more, where it is not finished; (whether it was, what is wrong with what it leaves or "")."""
    unfinished = job.out.exists() and left(job) != expected
    if unfinished and name == "phantom":  # written into an empty folder only: it is to be emptied
        shutil.rmtree(job.out)
        unfinished = False
    again = unfinished or not job.out.exists()
    if again:
        code, message = finish(start(job.again, log))
        if code:
            return again, f"given again: exit code {code}: {message[-800:]}"
    found = left(job)
    different = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
    return again, f"left something else: {different}" if different else ""


def run(
    names: list[str], runs: int, seed: int, first: int = 0, faults: tuple[str, ...] = FAULTS
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Disturbs each job so often, by the faults in turn; counts by (job, fault), and the failures.

    (job, "given again"): runs that the fault reached before they had ended.
    """
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base).resolve()
        every, mounts = jobs(folder), "small disk" in faults and can_mount(folder / "disk")
        for name in names:
            whole = every[name](folder / f"{name}-whole")
            began = time.monotonic()
            code, message = finish(start(whole.arguments, folder / "log"))
            seconds = time.monotonic() - began
            assert code == 0, message
            expected = left(whole)
            kib = sum(path.stat().st_size for path in whole.out.rglob("*") if path.is_file()) // 1024
            for k in range(first, first + runs):
                draw = random.Random(f"{name} {seed} {k}")
                fault = faults[k % len(faults)] if name != "torchrun" else ("terminate", "kill")[k % 2]
                if fault == "small disk" and not mounts:
                    fault = "full disk"
                with contextlib.ExitStack() as disks:
                    place, give_room = folder, None
                    if fault == "small disk":
                        place = folder / "disk"
                        give_room = disks.enter_context(small_disk(place, draw.randrange(4, kib + kib // 4 + 8)))
                    job = every[name](place / f"{name}-{k}")
                    wrong = disturbed(fault, job, seconds, draw, folder / "log")
                    if give_room:
                        give_room()
                    if not wrong:
                        again, wrong = finished(name, job, expected, folder / "log")
                        counts[name, "given again"] += again
                    counts[name, fault] += 1
                    if wrong:
                        failures.append(f"{name}, seed {seed}, run {k} ({fault}): {wrong}")
                    shutil.rmtree(job.out, ignore_errors=True)
    return counts, failures


def counted(faults: Counter[str]) -> str:
    """
    >>> counted(Counter({"kill": 3, "full disk": 2}))
    '5 runs (full disk 2, kill 3)'
    """
    return f"{faults.total()} runs ({', '.join(f'{fault} {n}' for fault, n in sorted(faults.items()))})"


def main() -> int:
    every = ("train", "evaluate", "predict", "shrink", "phantom", "sweep", "torchrun")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", default=every, metavar="JOB", help=", ".join(every))
    parser.add_argument("--runs", type=int, default=len(FAULTS), metavar="N", help="of each job (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS, metavar="FAULT", help=f"of {sorted(set(FAULTS))}")
    args = parser.parse_args()
    bad, together = [], Counter[str]()
    preload()
    for name in args.jobs:
        counts, failures = run([name], args.runs, args.seed, args.first, tuple(args.faults))
        again = counts.pop((name, "given again"), 0)
        mine = Counter({fault: n for (_, fault), n in counts.items()})
        together += mine
        print(f"{name}: {counted(mine)}, {again} given again, {len(failures)} failures", flush=True)
        for failure in failures:
            print(f"  {failure}", flush=True)
        bad += failures
    print(f"together: {counted(together)}, {len(bad)} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"OMP_NUM_THREADS": "1", "RPLIB_TESTS": str(ROOT / "tests")}
    with tempfile.TemporaryDirectory() as hook:
        Path(hook, "sitecustomize.py").write_text(SITECUSTOMIZE)
        os.environ["PYTHONPATH"] = os.pathsep.join([hook, str(ROOT)])
        code = main()
    sys.exit(code)
