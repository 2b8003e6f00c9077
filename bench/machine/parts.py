"""What the instructions of the kernels of the loss are: per voxel, by step of the source and by kind.

    python -m rplib.bench.machine.parts [--shapes 2x16,4x16] [--dtypes bfloat16] [--layouts contiguous] [--passes weighting]

A step is the function that a kernel's loop over blocks calls; what the function calls in turn belongs to it. A kind is a group
of opcodes (KINDS); the last column counts passes through shared memory. Input and counts are those of
`python -m rplib.bench.machine`.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

from rplib.bench.command import main
from rplib.bench.machine.driver import Ran
from rplib.bench.machine.report import DTYPES, LAYOUTS, VOXELS, launches_of, shapes_of
from rplib.bench.machine.sass import executions, machine_code
from rplib.errors import UserError

KINDS = {
    "global": "LDG STG LDGSTS LDGDEPBAR",
    "shared": "LDS STS LDSM STSM SHFL REDUX BAR WARPSYNC DEPBAR ATOMS",
    "special": "MUFU",
    "tensor": "HMMA IMMA",
    "float": "FADD FMUL FFMA FMNMX FMNMX3 FADD2 FMUL2 FFMA2 HFMA2 HADD2 HMUL2",
    "select": "FSETP ISETP FSEL SEL FSET PLOP3 VIMNMX IMNMX VOTE P2R R2P UISETP USEL LOP3",
    "convert": "I2F I2FP F2I F2F F2FP PRMT",
    "integer": "IADD3 IADD IMAD LEA SHF SHL SHR IABS ISCADD UIADD3 UIMAD ULEA USHF UMOV ULOP3 IADD64 UIADD3 VIADD",
}
"""Kind -> opcodes; every other one (moves, branches, uniform loads of constants) is "rest"."""
_KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}
PASSES = "passes"
_LOOP = {"_run", "_walk", "_block", "_whole_or_tail", "_gradient_block"}
_PASSES = ("statistics", "weighting", "gradient")


def steps(ptx: str) -> dict[int, str]:
    """Line of the PTX -> the step that it belongs to, from Triton's notes of inlined calls; what has none is "loop".

    A note is innermost first: voxels.py:409:20 @[ voxels.py:361:8 @[ weighting.py:236:5 ] ].
    """
    files = {Path(path).name: path for path in re.findall(r'^\t\.file\s+\d+ "([^"]+)"', ptx, re.MULTILINE)}
    found: dict[int, str] = {}
    step = "loop"
    for number, line in enumerate(ptx.splitlines(), start=1):
        if re.match(r"\s*\.loc\s", line):
            frames = re.findall(r"([\w.]+\.py):(\d+):\d+", line.partition("//")[2])
            names = [_function(files[file], int(at)) for file, at in frames[::-1]]
            step = next((name for name in names if name not in _LOOP and not name.endswith("_kernel")), "loop")
        found[number] = step
    return found


@cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(n.lineno, n.end_lineno or 0, n.name) for n in functions]


def _function(path: str, line: int) -> str:
    return next((name for first, last, name in _functions(path) if first <= line <= last), "loop")


def parts(ran: Ran, architecture: int) -> dict[str, Counter[str]]:
    """Step -> kind -> instructions executed by warps in this launch; PASSES -> passes through shared memory."""
    step_of = steps(ran.ptx)
    found: dict[str, Counter[str]] = {}
    for instruction, warps in executions(machine_code(ran.ptx, ran.cubin, architecture), ran):
        kinds = found.setdefault(step_of.get(instruction.line, "loop"), Counter())
        kinds[_KIND_OF.get(instruction.opcode, "rest")] += warps
    for line, access in ran.counts.shared_accesses.items():
        found.setdefault(step_of.get(line, "loop"), Counter())[PASSES] += access.units
    return found


def table(found: dict[str, Counter[str]], voxels: int) -> str:
    """Fixed-width text, per voxel, the largest step first; the last column is of shared memory and not in the sum."""
    kinds = [kind for kind in [*KINDS, "rest"] if any(of[kind] for of in found.values())]
    rows = sorted(found.items(), key=lambda item: -sum(item[1][kind] for kind in kinds))
    lines = [["step", *kinds, "all", PASSES]]
    for step, of in [*rows, ("all", sum(found.values(), Counter()))]:
        counts = [*(of[kind] for kind in kinds), sum(of[kind] for kind in kinds), of[PASSES]]
        lines.append([step, *(f"{count / voxels:.2f}" for count in counts)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="2x16,4x16,14x32", metavar="CxF,...", help="classes x features (default %(default)s)")
    parser.add_argument("--dtypes", default="float32", help="comma-separated (default %(default)s)")
    parser.add_argument("--layouts", default="contiguous", help="comma-separated (default %(default)s)")
    parser.add_argument("--passes", default=",".join(_PASSES), help="comma-separated (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    asked = {name: getattr(args, name).split(",") for name in ("dtypes", "layouts", "passes")}
    for (name, values), known in zip(asked.items(), (DTYPES, LAYOUTS, _PASSES), strict=True):
        if wrong := [value for value in values if value not in known]:
            raise UserError(f"--{name}: unknown {wrong[0]!r}; expected some of {', '.join(known)}.")
    for (classes, features), dtype, layout in product(shapes_of(args.shapes), asked["dtypes"], asked["layouts"]):
        for ran in launches_of(classes, features, dtype, layout, 90):
            if ran.name.removesuffix("_kernel") in asked["passes"]:
                print(f"{ran.name}: C = {classes}, F = {features}, {dtype}, {layout}, sm_90; warp instructions per voxel")
                print(table(parts(ran, 90), VOXELS), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main("parts", str(__doc__), add_arguments, run))
