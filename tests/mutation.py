"""Do the tests bite? Mutants drawn at random, each run against the tests that should notice it.

    python tests/mutation.py --mutants 80 --seed 1            over all files below, in proportion to their possible mutants
    python tests/mutation.py --mutants 20 rplib/lean.py       over one of them
    python tests/mutation.py --report                         the table of what has been run

A mutant is the source of one file with one small change on its syntax tree: a comparison, an operator or a constant replaced, a
condition or a sign turned round, two arguments exchanged, a keyword or a statement left out. It is written into a copy of the
project, never into the checkout. The libraries are imported once; each mutant has a process of its own, forked from there, with a
limit of CPU time (so that a busy machine changes nothing). Results are appended to a file: what is there is not run again, and a
run that was stopped goes on. A survivor that no test can kill stands in `mutation_equivalents.toml` with the reason.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".mutants.jsonl"  # not committed
EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.toml")

LOSS = [
    "tests/test_loss_large.py", "tests/test_loss_values.py", "tests/test_loss_objective.py", "-k", "not triton and not naive",
]  # fmt: skip
HOSTILE = "tests/test_reference_hostile.py::test_"
TRAINER = [
    "tests/test_reference_other_settings.py",
    "tests/test_reference_train.py",
    HOSTILE + "sigterm_writes_a_checkpoint_and_the_training_goes_on_to_the_same_bits",
    HOSTILE + "two_writers_of_one_run",
    "tests/test_reference_survival.py::test_weights_that_break_in_a_step_do_not_reach_a_checkpoint",
    "-k", "not killed and not script and not checkout",
]  # fmt: skip
# The tests of each file, quickest and most telling first: the first failure ends a mutant.
TESTS = {
    "rplib/lean.py": LOSS,
    "rplib/lean_voxels.py": LOSS,
    "reference/training/batches.py": ["tests/test_reference_batches.py", "tests/test_reference_other_settings.py"],
    "reference/training/step.py": [
        "tests/test_reference_other_settings.py", "tests/test_reference_survival.py", "-k", "step or sgd or autocast",
    ],
    "reference/training/trainer.py": TRAINER,
    "reference/evaluation/metrics.py": ["tests/test_reference_metrics.py", "rplib/reference/evaluation/metrics.py"],
    "reference/inference/windows.py": ["tests/test_reference_inference.py", "rplib/reference/inference/windows.py"],
    "reference/checkpoint.py": [
        "tests/test_reference_network.py", "tests/test_reference_hostile.py",
        "-k", "checkpoint or flipped or network or state_that",
    ],
    "kernels/*.py": ["tests/test_loss_values.py", "tests/test_loss_objective.py", "-k", "triton"],
}  # fmt: skip
DEFAULT = [name for name in TESTS if "*" not in name]

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.MatMult: ast.Mult,
}  # fmt: skip


class Mutant(NamedTuple):
    """One change: `start` to `end` (bytes of the file) become `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> str:
        """The same for the same change of the same line, wherever that has moved to."""
        return hashlib.sha256(f"{self.file}|{self.old}|{self.new}|{self.context}".encode()).hexdigest()[:16]

    @property
    def context(self) -> str:
        """The line, those before and after it, and the place in it."""
        content = (ROOT / self.file).read_bytes()
        first = content.rfind(b"\n", 0, self.start) + 1
        before = content.rfind(b"\n", 0, max(first - 1, 0)) + 1
        last = content.find(b"\n", content.find(b"\n", self.end) + 1)
        return f"{content[before:last].decode()}@{self.start - first}"


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the source."""
    content = (ROOT / file).read_bytes()
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, changed in _changes(ast.parse(content)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old, new = content[start:end].decode(), "pass" if changed is None else ast.unparse(changed)
        if isinstance(changed, ast.expr):
            new = f"({new})"
        found.append(Mutant(file, node.lineno, start, end, old, new))
    return found


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """(node, what takes its place; None: nothing) for all code that does something; messages and annotations are no code."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.AnnAssign | ast.arg):
            if getattr(node, "value", None) is not None:
                yield from _changes(ast.Expression(node.value))
            continue
        if isinstance(node, ast.FunctionDef):
            for part in (*node.body, *node.args.defaults, *filter(None, node.args.kw_defaults)):
                yield from _changes(ast.Module([part], []))
            continue
        if isinstance(node, ast.ClassDef):
            yield from _changes(ast.Module(node.body, []))
            continue
        yield from _changes_of(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("cast", "print", "UserError"):
            continue
        yield from _changes(node)


def _changes_of(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    def changed(**fields: object) -> ast.AST:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield node, changed(ops=[*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield node, changed(op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield node, changed(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node, node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield node, ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield node, ast.Constant(node.value + 1)
        elif isinstance(node.value, float):
            yield node, ast.Constant(2 * node.value if node.value else 1.0)
    elif isinstance(node, ast.IfExp):
        yield node, changed(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.If | ast.While):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Call):
        if len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            yield node, changed(args=[node.args[1], node.args[0], *node.args[2:]])
        for i in range(len(node.keywords)):
            yield node, changed(keywords=node.keywords[:i] + node.keywords[i + 1 :])
    elif isinstance(node, ast.AugAssign | ast.Continue | ast.Break) or _is_call(node):
        yield node, None


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def draw(files: list[str], number: int, seed: int) -> list[Mutant]:
    """Without repetition, in proportion to the mutants that each file has; more of one seed are the same and more."""
    every = [mutant for file in files for mutant in mutants_of(file)]
    random.Random(seed).shuffle(every)
    return every[:number]


def tests_of(file: str) -> list[str]:
    return TESTS.get(file) or TESTS[f"{Path(file).parent}/*.py"]


def copy_of_the_project(folder: Path) -> None:
    """What the tests need, with the links kept as links."""
    for name in ("rplib", "kernels", "reference", "bench", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(source, folder / name)


def run_tests(folder: Path, argv: list[str], seconds: int) -> tuple[int, str]:
    """Exit code of pytest in a forked process (-signal where one ended it), and the first test that failed."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        message = b""
        while part := os.read(reader, 4096):
            message += part
        os.close(reader)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), message.decode()
    code = 3
    try:
        os.close(reader)
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        os.environ["PYTHONPATH"] = str(folder)
        signal.alarm(60 * seconds)  # a process that waits for ever takes no CPU time

        import pytest

        class First:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    os.write(writer, report.nodeid.encode()[:300])

        options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not slow and not gpu", f"--rootdir={folder}"]
        code = int(pytest.main([*options, *argv], plugins=[First()]))
    except BaseException:
        code = 4
    finally:
        os._exit(code)
    raise AssertionError


def judged(code: int, test: str) -> str:
    """What became of a mutant."""
    if code == 0:
        return "survived"
    if code == 1:
        return f"killed by {test}"
    if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return "killed: out of time"
    if code == 5:
        raise SystemExit("no test was run; look at TESTS")
    return f"killed: pytest ended with {code}"


def preload() -> None:
    """What takes seconds to import, once; nothing of the project itself."""
    import h5py
    import hypothesis
    import matplotlib.figure
    import monai.inferers
    import nibabel
    import pytest
    import rich.table
    import scipy.ndimage
    import SimpleITK
    import torch.utils._python_dispatch
    import torch.utils.tensorboard

    assert h5py and hypothesis and matplotlib and monai and nibabel and pytest and rich and scipy and SimpleITK and torch
    assert not any(name.partition(".")[0] == "rplib" for name in sys.modules)


def read_results(path: Path) -> dict[str, dict[str, object]]:
    """The last result of every mutant."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {row["key"]: row for row in rows}


def equivalents() -> dict[str, str]:
    """Reason by key."""
    return tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8")) if EQUIVALENTS.is_file() else {}


def report(results: dict[str, dict[str, object]]) -> int:
    """Prints the table and the survivors; 1 if one of them is not known to be equivalent."""
    known = {key: reason["reason"] for key, reason in equivalents().items()}
    present = {mutant.key for file in {str(row["file"]) for row in results.values()} for mutant in mutants_of(file)}
    rows = [row for key, row in results.items() if key in present]
    print("| file | mutants | killed | equivalent | survive | score |\n|---|---|---|---|---|---|")
    alive = []
    for file in [*sorted({str(row["file"]) for row in rows}), "all"]:
        mine = [row for row in rows if file in ("all", row["file"])]
        survive = [row for row in mine if row["result"] == "survived"]
        same = [row for row in survive if row["key"] in known]
        killed = len(mine) - len(survive)
        score = 100 * killed / max(len(mine) - len(same), 1)
        print(f"| {file} | {len(mine)} | {killed} | {len(same)} | {len(survive) - len(same)} | {score:.0f} % |")
        if file != "all":
            alive += [row for row in survive if row["key"] not in known]
    for row in alive:
        print(f"\n{row['key']}  {row['file']}:{row['line']}\n  - {row['old']}\n  + {row['new']}")
    return 1 if alive else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="default: lean form, trainer's core, metrics, windows, checkpoint")
    parser.add_argument("--mutants", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived, against today's tests")
    args = parser.parse_args()
    files = args.files or DEFAULT
    results = read_results(args.results)
    if args.report:
        return report(results)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg"}
    os.environ.setdefault("RPLIB_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    sys.dont_write_bytecode = True
    if args.survivors:
        every = {mutant.key: mutant for file in files for mutant in mutants_of(file)}
        again = [key for key, row in results.items() if row["result"] == "survived" and key not in equivalents()]
        todo = [every[key] for key in again if key in every]
    else:
        todo = [mutant for mutant in draw(files, args.mutants, args.seed) if mutant.key not in results]
    if not todo:
        print("nothing to do: all of these mutants have been run")
        return report(results)
    preload()
    with tempfile.TemporaryDirectory() as name, args.results.open("a") as out:
        folder, limits = Path(name), {}
        copy_of_the_project(folder)
        for file in sorted({mutant.file for mutant in todo}):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            code, test = run_tests(folder, tests_of(file), 600)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if code != 0:
                print(f"the tests of {file} fail without a mutant (exit code {code}): {test}")
                return 1
            taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            limits[file] = int(10 + 5 * taken)
            print(f"{file}: its tests pass without a mutant, {taken:.0f} s of CPU time", flush=True)
        for number, mutant in enumerate(todo, 1):
            path = folder / mutant.file
            content = path.read_bytes()
            path.write_bytes(content[: mutant.start] + mutant.new.encode() + content[mutant.end :])
            began = time.monotonic()
            code, test = run_tests(folder, tests_of(mutant.file), limits[mutant.file])
            path.write_bytes(content)
            seconds = round(time.monotonic() - began)
            row = {**mutant._asdict(), "key": mutant.key, "result": judged(code, test), "seconds": seconds}
            out.write(json.dumps(row) + "\n")
            out.flush()
            results[mutant.key] = row
            print(f"{number}/{len(todo)} {row['result'][:100]:100} {mutant.file}:{mutant.line} {mutant.new[:60]!r}", flush=True)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
