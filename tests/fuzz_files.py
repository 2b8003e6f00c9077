"""Damaged files of every format through the commands that read them: no traceback, no hang, no write outside, the file is named.

    python tests/fuzz_files.py --files 2000 [--seed 1] [--first K] [h5 nifti nrrd checkpoint toml list csv]

Each file is a sound one with random damage: flipped bits, bytes and numbers replaced, parts cut out, doubled or filled with
zeros, the end cut off. It goes through `rplib` in a forked process with a limit of memory and of CPU time, so that a busy machine
changes nothing; a process that dies, or waits for ten minutes, is a failure. A file that is still good gives 0, any other 2 and
one line that names it (`data check` and the conversions list the files on stdout).
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 3 << 30  # bytes beyond what the process has when it begins
SECONDS = 30  # of CPU time for a file
SILENCE = 600.0  # seconds: a process that waits for ever takes no CPU time
BATCH = 50  # files a process

NUMBERS = [
    b"0", b"-1", b"nan", b"inf", b"1e999", b"9" * 30, b"9" * 5000, b"0x" + b"f" * 4000, b"2147483648", b"1.5", b"true", b"''",
]  # fmt: skip
WORDS = [
    b"..", b"../../x", b"/etc/passwd", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"[" * 2000, b'"', b"\x1b[2J", b"=", b",",
]  # fmt: skip


def damaged(content: bytes, random: random.Random) -> bytes:
    """The content with one to four kinds of damage."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        # Headers are short and lie at both ends: half of the damage goes there.
        place = random.randrange(len(data)) if random.random() < 0.5 else random.randrange(min(len(data), 400))
        place = len(data) - 1 - place if random.random() < 0.2 else place
        length = random.choice((1, 2, 4, 8, 60, 500))
        kind = random.randrange(9)
        if kind <= 2:
            data[place] ^= 1 << random.randrange(8)
        elif kind == 3:
            data[place : place + length] = random.randbytes(length)
        elif kind == 4:
            data[place : place + length] = bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) * length
        elif kind == 5:
            del data[place : place + length]
        elif kind == 6:
            data[place:place] = data[place : place + length] if random.random() < 0.5 else random.choice(WORDS)
        elif kind == 7:
            numbers = list(re.finditer(rb"[0-9][0-9.]*", bytes(data[:20_000])))
            if numbers:
                found = random.choice(numbers)
                data[found.start() : found.end()] = random.choice(NUMBERS)
        else:
            del data[place:]
    return bytes(data)


class Target(NamedTuple):
    """A sound set of files, which of them is damaged, and the command that reads it."""

    file: Path
    command: list[str]
    clean: Callable[[], None] = lambda: None  # before each file


def targets(kind: str, folder: Path) -> list[Target]:
    """Sound files of one format, written into an empty folder."""
    import nibabel
    import numpy as np
    import SimpleITK as sitk
    from reference_tools import TINY, write_dataset

    from rplib import cli
    from rplib.reference.datasets.layouts import open_dataset

    data, out = folder / "data", folder / "out"
    if kind in ("h5", "list", "checkpoint"):
        names = write_dataset(data, train=3, test=1)
        case = open_dataset(data).path(names[0])
    if kind == "h5":
        import h5py

        with h5py.File(case, "a") as file:
            file.attrs["affine"] = np.diag([2.0, 1.0, 1.0, 1.0])
        return [Target(case, ["data", "check", str(data)])]
    if kind == "list":
        return [Target(data / "train.list", ["data", "check", str(data)])]
    if kind == "nifti":
        found = []
        for suffix in (".nii", ".nii.gz"):
            root = folder / suffix[1:]
            for k, part in enumerate(("images", "labels")):
                (root / part).mkdir(parents=True)
                for name in "abc":
                    values = np.random.default_rng(k).integers(0, 2 if k else 200, (9, 8, 7)).astype(np.uint8 if k else np.int16)
                    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 1.0, 1.0, 1.0])), root / part / f"{name}{suffix}")
            found += [Target(root / part / f"b{suffix}", ["data", "check", str(root)]) for part in ("images", "labels")]
        return found
    if kind == "nrrd":
        found = []
        for compressed in (False, True):
            root, dest = folder / f"raw{compressed:d}", folder / f"dest{compressed:d}"
            for name in "abc":
                (root / name).mkdir(parents=True)
                values = np.random.default_rng(0).integers(0, 200, (9, 8, 7)).astype(np.int16)
                sitk.WriteImage(sitk.GetImageFromArray(values), str(root / name / "lgemri.nrrd"), compressed)
                label = sitk.GetImageFromArray((values > 100).astype(np.uint8) * 255)
                sitk.WriteImage(label, str(root / name / "laendo.nrrd"), compressed)
            arguments = ["data", "left-atrium", str(root), str(dest)]
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main(arguments) == 0
            written = open_dataset(dest).path("b")

            def clean(written: Path = written) -> None:
                written.unlink(missing_ok=True)

            found += [Target(root / "b" / f"{what}.nrrd", arguments, clean) for what in ("lgemri", "laendo")]
        return found
    if kind in ("checkpoint", "csv"):
        from rplib.reference import checkpoint
        from rplib.reference.config import load_recipe

        config = load_recipe("la-4", [*TINY, "filters=1"])
        network = checkpoint.build_network(config)
    if kind == "checkpoint":
        run = folder / "run.pt"
        checkpoint.save(run, {"network": network.state_dict(), "config": config.to_toml(), "iteration": 1})
        arguments = ["predict", str(run), str(case), "--out", str(out), "--existing", "overwrite", "--device", "cpu"]
        return [Target(run, arguments)]
    if kind == "toml":
        recipe = folder / "own.toml"
        recipe.write_text(load_config_text())
        arguments = ["train", "--recipe", str(recipe), "--data", str(folder / "none"), "--out", str(out)]
        return [Target(recipe, arguments, lambda: shutil.rmtree(out, ignore_errors=True))]
    run = folder / "run"
    (run / "evaluation-test").mkdir(parents=True)
    (run / "config.toml").write_text(config.to_toml())
    scores = run / "evaluation-test" / "scores.csv"
    lines = [f"CASE{k},{by},1,0.{k}5,0.{k}4,{k}.5,1.{k},," for k in range(5) for by in ("decoder 1", "mean of both", "fixed box")]
    scores.write_text("case,method,class,dice,jaccard,hd95,asd,hd95_mm,asd_mm\n" + "".join(f"{line}\n" for line in lines))
    return [Target(scores, ["compare", str(run)])]


def load_config_text() -> str:
    """A recipe of every kind of value, small enough that a sound one asks for little memory."""
    return (
        "base = 'la-8'\nname = 'own'\nfilters = 4\npatch = [32, 32, 32]\nstride = [16, 16, 16]\nlearning_rate = 0.02\n"
        'compile = false\nseed = 3\nmomentum = 0.5  # of SGD\nmethod = "both"\n'
    )


KINDS = ("h5", "nifti", "nrrd", "checkpoint", "toml", "list", "csv")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def verdict(target: Target, folder: Path, before: set[str]) -> str:
    """What is wrong with how the command took the file; "ok 0" and "ok 2" are right."""
    from rplib import cli

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(list(target.command))
    except BaseException:
        return f"traceback: {traceback.format_exc()[-600:]}"
    message = out.getvalue() + err.getvalue()
    mistakes = [line for line in err.getvalue().splitlines() if line.startswith("rplib: error: ")]
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and (len(mistakes) != 1 or "Traceback" in message):
        return f"{len(mistakes)} lines of errors: {err.getvalue()[-300:]}"
    # A damaged list may name another file that is not there, a sound recipe meets the missing data: both are named.
    if code == 2 and str(target.file) not in message and str(target.file.parent) not in message:
        return f"does not name the file: {message[-300:]}"
    if any(not c.isprintable() and c not in "\n\r\t" for c in message):
        return "control characters in the output"
    strangers = {name for name in everything(folder) - before if not name.startswith(("out", "dest"))}
    return f"wrote {sorted(strangers)[:3]}" if strangers else f"ok {code}"


def run_batch(kind: str, folder: Path, seed: int, first: int, last: int, report: int) -> None:
    """In the forked process: a line for each file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = targets(kind, folder)
    sound = {target.file: target.file.read_bytes() for target in kinds}
    for index in range(first, last):
        os.write(report, f"{index} begins\n".encode())
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + SECONDS, resource.RLIM_INFINITY))
        draw = random.Random(f"{kind} {seed} {index}")
        target = draw.choice(kinds)
        target.clean()
        before = everything(folder)
        target.file.write_bytes(damaged(sound[target.file], draw))
        found = verdict(target, folder, before)
        target.file.write_bytes(sound[target.file])
        os.write(report, f"{index} {found!r}\n".encode())


def fuzz(kind: str, number: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Counts of what became of the files, and the failures with what makes them again."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    number += first
    while first < number:
        last = min(first + BATCH, number)
        with tempfile.TemporaryDirectory() as name:
            reader, writer = os.pipe()
            process = os.fork()
            if not process:
                code = 1
                try:
                    os.close(reader)
                    run_batch(kind, Path(name).resolve(), seed, first, last, writer)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            os.close(writer)
            message, hung = b"", False
            while True:
                ready, _, _ = select.select([reader], [], [], SILENCE)
                part = os.read(reader, 1 << 16) if ready else b""
                if not ready:
                    os.kill(process, signal.SIGKILL)
                    hung = True
                if not part:
                    break
                message += part
            os.close(reader)
            _, status = os.waitpid(process, 0)
            hung = hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
        done = [line.partition(" ") for line in message.decode().splitlines() if not line.endswith("begins")]
        for index, _, found in done:
            found = found.strip("'\"")
            counts[found if found.startswith("ok") else "failed"] += 1
            if not found.startswith("ok"):
                failures.append(f"{kind}, seed {seed}, file {index}: {found}")
        first += len(done)
        if first < last:
            if status == 256:
                raise RuntimeError(f"the files of {kind} could not be made")
            counts["hung" if hung else "died"] += 1
            failures.append(f"{kind}, seed {seed}, file {first}: {'no end' if hung else f'status {status}'}")
            first += 1
    return counts, failures


def preload() -> None:
    """What every command imports, once: the batches are forked from this process."""
    for name in ("torch", "monai.inferers", "h5py", "nibabel", "SimpleITK", "rplib.reference.training.trainer",
                 "rplib.reference.inference.new_images", "rplib.reference.reporting.tables"):  # fmt: skip
        importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--files", type=int, default=100, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    bad = []
    preload()
    for kind in args.kinds:
        began = time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        counts, failures = fuzz(kind, args.files, args.seed, args.first)
        seconds = time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
        print(f"{kind}: {args.files} files, {dict(sorted(counts.items()))}, {seconds:.0f} s of CPU time", flush=True)
        for failure in failures:
            print(f"  {failure}", flush=True)
        bad += failures
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    sys.exit(main())
