"""Do the tests bite? Mutants drawn at random, each run against the tests that should notice it.

    python tests/mutation.py                                  the standing sample: so many of each part (SAMPLE); resumable
    python tests/mutation.py --share 0.1 --seed 2             a tenth of that, others
    python tests/mutation.py kernels step                     two parts of it
    python tests/mutation.py --mutants 20 rplib/lean.py       over one file
    python tests/mutation.py kernels/dice.py:29-31            every mutant that begins in these lines
    python tests/mutation.py --report                         the table of what has been run
    python tests/mutation.py --survivors                      what survived, once more, against today's tests

A mutant is the source of one file with one small change on its syntax tree: a comparison, an operator or a constant replaced, a
condition or a sign turned round, two arguments exchanged, a keyword or a statement left out. It is written into a copy of the
project, never into the checkout. The libraries are imported once; each mutant has a process of its own, forked from there, with a
limit of CPU time (so that a busy machine changes nothing). Its tests come in stages, the quickest and most telling first; the
first failure ends it. Results are appended to a file: what is there is not run again, and a run that was stopped goes on. A
survivor that no test can kill stands in `mutation_equivalents.toml` with the reason.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "mutants.jsonl"  # not committed
EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.toml")

SAMPLE: dict[str, tuple[int, list[str]]] = {
    "lean form": (50, ["rplib/lean.py", "rplib/lean_voxels.py"]),
    # Block sizes (tiling.py) change the speed alone, signatures.py serves the compiler of GPUs that are not there:
    # test_ahead_of_time.py and test_bench_guard.py look at these, in minutes.
    "kernels": (100, [f"kernels/{name}.py" for name in (
        "dice", "gradient", "launch", "operators", "passes", "products", "prototypes", "similarity", "statistics", "total",
        "voxels", "weighting",
    )]),
    "batches": (36, ["reference/training/batches.py"]),
    "metrics": (20, ["reference/evaluation/metrics.py"]),
    "inference": (26, ["reference/inference/windows.py"]),
    "checkpoint": (26, ["reference/checkpoint.py"]),
    "step": (16, ["reference/training/step.py"]),
    "trainer": (40, ["reference/training/trainer.py"]),
}  # fmt: skip

HOSTILE = "tests/test_reference_hostile.py::test_"
OTHER = "tests/test_reference_other_settings.py"
DETAILS = "tests/test_reference_details.py"
LEAN = [
    ["tests/test_loss_values.py", "-k", "test_options and torch"],
    ["tests/test_loss_large.py", "tests/test_loss_values.py", "tests/test_loss_objective.py", "-k", "not triton and not naive"],
    ["tests/test_loss_options.py", "tests/test_loss_mask.py", "tests/test_loss_statistics.py", "-k", "not triton and not naive"],
    [DETAILS, "-k", "lean or eps or channel"],
]
KERNELS = [
    ["tests/test_kernels_small.py", "-m", "not gpu"],  # slow together, quick until the first failure
    ["tests/test_loss_values.py", "tests/test_kernels_launches.py", "-k",
     "(triton and (tiny or far_from_zero or first_maximum or feature_count or expanded or negative or apart)) or launches"],
    ["tests/test_loss_statistics.py", "tests/test_loss_targets.py", "tests/test_loss_objective.py", "-k",
     "kernels or (triton and (statistics or targets or smoothing))"],
    # What changes no value: a mask that is missing, features read and left out. FAKE: shapes and types of fake tensors.
    ["tests/test_loss_memory.py", "tests/test_bench_guard.py", "-k", "triton or of_the_teacher_alone"],
]  # fmt: skip
FAKE = ["tests/test_loss_compile.py", "-k", "opcheck_of_the_objective or opcheck_reaches or bodies_never_look"]
# The tests of each file in stages, quickest and most telling first.
TESTS: dict[str, list[list[str]]] = {
    "rplib/lean.py": LEAN,
    "rplib/lean_voxels.py": LEAN,
    "reference/training/batches.py": [["tests/test_reference_batches.py"], [OTHER, DETAILS, "-k",
                                         "crop or padding or stream or symmetries or augmentation or volumes or pinned"]],
    "reference/training/step.py": [
        [OTHER, "-k", "step or sgd or autocast"], ["tests/test_reference_survival.py", "-k", "parts_of_a_measured_step"],
    ],
    "reference/training/trainer.py": [
        [DETAILS, "-k", "validation or restored or tried or seeds or log_row or ranks"],
        [OTHER],
        ["tests/test_reference_average.py", "tests/test_reference_monitor.py", "-k", "average or waits or waiting or logs"],
        ["tests/test_reference_train.py", "-k", "not killed and not script and not checkout"],
        [HOSTILE + "sigterm_writes_a_checkpoint_and_the_training_resumes_to_the_same_bits", HOSTILE + "two_writers_of_one_run",
         "tests/test_reference_survival.py", "-k", "sigterm or two_writers or weights_that_break or nothing_between"],
    ],
    "reference/evaluation/metrics.py": [
        ["tests/test_reference_metrics.py"], ["rplib/reference/evaluation/metrics.py", DETAILS, "-k", "metric"],
    ],
    "reference/inference/windows.py": [
        ["tests/test_reference_inference.py"],
        ["rplib/reference/inference/windows.py", DETAILS, "-k", "window or classes or averaged"],
    ],
    "reference/checkpoint.py": [
        ["tests/test_reference_network.py", "tests/test_reference_hostile.py",
         "-k", "checkpoint or flipped or network or state_that"],
        [DETAILS, "-k", "checkpoint"],
    ],
    "kernels/*.py": [*KERNELS, FAKE],
    "kernels/operators.py": [FAKE, *KERNELS],
}  # fmt: skip

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


def in_lines(place: str) -> list[Mutant]:
    """Of FILE:LINE or FILE:FIRST-LAST, every mutant that begins there."""
    file, _, lines = place.partition(":")
    first, _, last = lines.partition("-")
    return [mutant for mutant in mutants_of(file) if int(first) <= mutant.line <= int(last or first)]


def sample(share: float, seed: int, names: Iterable[str] = SAMPLE) -> list[Mutant]:
    """The standing sample or a share of it; the parts take turns, so that a run that is stopped has seen something of each."""
    parts = [draw(files, max(1, round(share * number)), seed) for number, files in (SAMPLE[name] for name in names)]
    ranked = [(k / len(part), mutant) for part in parts for k, mutant in enumerate(part)]
    return [mutant for _, mutant in sorted(ranked, key=lambda pair: pair[0])]


def part_of(file: str) -> str:
    return next((name for name, (_, files) in SAMPLE.items() if file in files), file)


def tests_of(file: str) -> list[list[str]]:
    return TESTS.get(file) or TESTS[f"{Path(file).parent}/*.py"]


def copy_of_the_project(folder: Path) -> None:
    """What the tests need, with the links kept as links."""
    for name in ("rplib", "kernels", "reference", "bench", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(source, folder / name)


def run_tests(folder: Path, stages: list[list[str]], seconds: int, write_bytecode: bool = False) -> tuple[int, str]:
    """Exit code of pytest in a forked process (-signal where one ended it), and the first test that failed."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        printed = b""
        while part := os.read(reader, 4096):
            printed += part
        os.close(reader)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), printed.decode()
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
        sys.dont_write_bytecode = not write_bytecode
        if not write_bytecode:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for processes that the tests start

        import pytest

        class First:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    os.write(writer, report.nodeid.encode()[:300])

        options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not slow and not gpu", f"--rootdir={folder}"]
        for arguments in stages:
            code = int(pytest.main([*options, *arguments], plugins=[First()]))
            if code:
                break
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
    for name in (
        "h5py", "hypothesis", "matplotlib.pyplot", "monai.inferers", "nibabel", "pytest", "rich.table", "scipy.ndimage",
        "SimpleITK", "torch._dynamo", "torch.utils._python_dispatch", "torch.utils.tensorboard", "triton.runtime.interpreter",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
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
    print("| part | mutants | killed | equivalent | survive | score |\n|---|---|---|---|---|---|")
    alive = []
    for file in [*dict.fromkeys(part_of(str(row["file"])) for row in rows), "all"]:
        mine = [row for row in rows if file in ("all", part_of(str(row["file"])))]
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
    parser.add_argument("files", nargs="*", metavar="PART, FILE or FILE:LINES", help=f"default: every part ({', '.join(SAMPLE)})")
    parser.add_argument("--mutants", type=int, default=20, metavar="N", help="of the given files (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the standing sample (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived, against today's tests")
    args = parser.parse_args()
    results = read_results(args.results)
    if args.report:
        return report(results)
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "RPLIB_ALL_CASES": "1"}
    os.environ.setdefault("RPLIB_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    os.environ.setdefault("TRITON_INTERPRET", "1")
    places = [name for name in args.files if ":" in name]
    files = [name for name in args.files if name not in SAMPLE and name not in places]
    todo = [mutant for place in places for mutant in in_lines(place)]
    if files:
        todo += draw(files, args.mutants, args.seed)
    elif not places:
        todo = sample(args.share, args.seed, args.files or SAMPLE)
    if args.survivors:
        todo = [mutant for file in {str(row["file"]) for row in results.values()} for mutant in mutants_of(file)]
        known = equivalents()
        todo = [m for m in todo if m.key not in known and results.get(m.key, {}).get("result") == "survived"]
    else:
        todo = [mutant for mutant in todo if mutant.key not in results]
    if not todo:
        print("nothing to do: all of these mutants have been run")
        return report(results)
    preload()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, args.results.open("a") as out:
        folder = Path(name).resolve()
        copy_of_the_project(folder)
        limits = Limits(folder, args.results)
        for number, mutant in enumerate(todo, 1):
            path, seconds = folder / mutant.file, limits.of(mutant.file)
            content = path.read_bytes()
            path.write_bytes(content[: mutant.start] + mutant.new.encode() + content[mutant.end :])
            before = _children()
            code, test = run_tests(folder, tests_of(mutant.file), seconds)
            path.write_bytes(content)
            row = {**mutant._asdict(), "key": mutant.key, "result": judged(code, test), "seconds": round(_children() - before, 1)}
            out.write(json.dumps(row) + "\n")
            out.flush()
            results[mutant.key] = row
            printed = f"{number}/{len(todo)} {row['seconds']} s {row['result'][:100]:100} {mutant.file}:{mutant.line}"
            print(printed, repr(mutant.new[:60]), flush=True)
    return report(results)


def _children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Limits:
    """CPU seconds for the mutants of each file, after its tests have passed without one: once, for files and tests as they are.

    This run leaves the compiled tests behind; of the file itself nothing is left, so that a mutant is never taken for it.
    """

    def __init__(self, folder: Path, results: Path) -> None:
        self._folder, self._known = folder, results.with_suffix(".seconds.json")
        every = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".toml") and not path.is_symlink())
        content = hashlib.sha256(b"".join(path.read_bytes() for path in every)).hexdigest()
        read = json.loads(self._known.read_text()) if self._known.is_file() else {}
        self._taken: dict[str, float] = read["taken"] if read.get("content") == content else {}
        self._content = content

    def of(self, file: str) -> int:
        stages = str(sorted(tests_of(file)))  # the same tests in another order take as long
        if stages not in self._taken:
            before = _children()
            code, test = run_tests(self._folder, tests_of(file), 900, write_bytecode=True)
            if code != 0:
                raise SystemExit(f"the tests of {file} fail without a mutant (exit code {code}): {test}")
            self._taken[stages] = round(_children() - before, 1)
            self._known.write_text(json.dumps({"content": self._content, "taken": self._taken}))
            print(f"{file}: its tests pass without a mutant, {self._taken[stages]:.0f} s of CPU time", flush=True)
        for compiled in (self._folder / file).parent.glob(f"__pycache__/{Path(file).stem}.*"):
            compiled.unlink()
        return int(10 + 5 * self._taken[stages])


if __name__ == "__main__":
    sys.exit(main())
