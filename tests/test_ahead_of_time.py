"""The ahead-of-time report: correct for known machine code; the kernels of the loss use no more resources than before."""

import csv
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from loss_cases import HAS_TRITON

from rplib.bench.ahead_of_time import VARIANTS, matrix
from rplib.bench.compiled_code import TARGETS, read_amdgcn
from rplib.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "ahead-of-time.csv"
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS)
LONG = pytest.mark.slow


def without_interpreter(*arguments, interpret=None):
    """Run Python in a separate process: in this one, Triton uses its interpreter, which is decided at import."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------- known answers


@pytest.fixture(scope="module")
def known():
    done = without_interpreter(str(ROOT / "tests" / "known_kernels.py"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@EVERY_TARGET
@pytest.mark.parametrize("case", ["add", "add bfloat16", "masked, length divisible by 16"])
def test_aligned_vectors_load_128_bits_at_a_time(known, case, target):
    """256 threads take 16 bytes of each of two arrays: two loads and one store of 128 bits, and nothing else."""
    found = known[case][target]
    assert found["loads"] == {"128": 2} and found["stores"] == {"128": 1}
    assert found["wide_load_share"] == 1.0
    assert found["spills"] == found["stack_bytes"] == found["shared_bytes"] == 0
    assert 4 <= found["registers"] <= 40


@EVERY_TARGET
@pytest.mark.parametrize("case", ["add of unaligned arrays", "masked, any length"])
def test_unknown_alignment_or_a_ragged_mask_loads_one_value_at_a_time(known, case, target):
    found = known[case][target]
    assert found["loads"] == {"32": 8} and found["stores"] == {"32": 4}
    assert found["wide_load_share"] == 0.0


@EVERY_TARGET
def test_shared_memory_is_seen(known, target):
    assert known["reduction"][target]["shared_bytes"] >= 4 * 256 // TARGETS[target].warp_size
    assert known["reduction"][target]["spills"] == 0


@EVERY_TARGET
def test_a_kernel_that_spills_is_reported_as_spilling(known, target):
    """256 (AMD: 512) float32 values a thread must outlive a reduction; that is every register there is, or more."""
    found = known["reduction that cannot stay in registers"][target]
    assert found["spills"] >= 8 and found["stack_bytes"] >= 32


def test_widths_of_amd_instructions():
    metadata = "".join(
        f"  .{name}: {value}\n"
        for name, value in {
            "vgpr_count": 12,
            "vgpr_spill_count": 3,
            "sgpr_spill_count": 2,
            "private_segment_fixed_size": 16,
            "group_segment_fixed_size": 64,
        }.items()
    )
    code = "\tglobal_load_dwordx4 v[0:3], v0\n\tbuffer_load_ushort v1\n\tbuffer_load_dword v1\n\tglobal_store_dwordx2 v0\n"
    found = read_amdgcn(code + metadata)
    assert (found.loads, found.stores) == ({128: 1, 16: 1, 32: 1}, {64: 1})
    assert (found.registers, found.spills, found.scalar_spills, found.stack_bytes, found.shared_bytes) == (12, 3, 2, 16, 64)
    assert found.wide_load_share == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="load_gizmo"):
        read_amdgcn("\tglobal_load_gizmo v0\n" + metadata)


# ------------------------------------------------------------------------------------------------- the kernels of the loss

COMPILE = """
import json, sys
from rplib.bench.ahead_of_time import Point, report
print(json.dumps([[row.__dict__ for row in report(Point(**case))] for case in json.loads(sys.argv[1])]))
"""


def reported(target):
    """Points of the matrix in the committed report."""
    return matrix(targets=[target], variants=VARIANTS)


def cases_of(target):
    """Each (C, F), dtype, layout and variant at least once; RPLIB_FULL_MATRIX=1: every point."""
    everything = reported(target)
    if os.environ.get("RPLIB_FULL_MATRIX"):
        return everything
    wanted = {
        (2, "float32", "contiguous", "loss"),
        (2, "float32", "contiguous", "odd"),
        (2, "bfloat16", "contiguous", "objective"),
        (4, "bfloat16", "contiguous", "loss"),
        (4, "float32", "channels_last", "masked"),
        (14, "float32", "contiguous", "loss"),
        (14, "bfloat16", "channels_last", "objective"),
        (2, "float32", "channels_last", "cross_entropy"),
        (2, "bfloat16", "contiguous", "reported"),
    }
    return [case for case in everything if (case.classes, case.dtype, case.layout, case.variant) in wanted]


def ceilings():
    """The committed report: (point of the matrix, kernel) -> its row."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["target"], row["variant"], int(row["classes"]), row["dtype"], row["layout"], row["kernel"]): row for row in rows}


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=LONG)], ids=["to 4 classes", "more"])
@pytest.mark.parametrize("target", [target if target == "sm_90" else pytest.param(target, marks=LONG) for target in TARGETS])
def test_kernels_of_the_loss_need_no_more_than_they_did(target, many):
    """Spills, registers, shared memory and width of loads as in the committed report, for the compiler that made it.

    To make the report: python -m rplib.bench.ahead_of_time --csv bench/results/ahead-of-time.csv
    """
    cases = [case for case in cases_of(target) if (case.classes > 4) == many]
    done = without_interpreter("-c", COMPILE, json.dumps([vars(case) for case in cases]))
    assert done.returncode == 0, done.stderr[-3000:]
    before = ceilings()
    for case, rows in zip(cases, json.loads(done.stdout), strict=True):
        assert {"statistics_kernel", "weighting_kernel", "gradient_kernel"} <= {row["kernel"] for row in rows}
        for row in rows:
            most = before[target, case.variant, case.classes, case.dtype, case.layout, row["kernel"]]
            assert row["spills"] <= int(most["spills"]), f"{row['kernel']} spills {row['spills']} times: {case}"
            assert row["registers"] > 0 and row["loads"] > 0
            if most["triton"] != version("triton"):
                continue
            assert row["registers"] <= int(most["registers"]), (case, row, most)
            assert row["shared_bytes"] <= int(most["shared_bytes"]), (case, row, most)
            assert row["scalar_spills"] <= int(most["scalar_spills"]), (case, row, most)
            if most["wide_loads_percent"]:
                assert row["wide_loads_percent"] >= float(most["wide_loads_percent"]), (case, row, most)


@LONG
@pytest.mark.timeout(3600)
def test_every_pair_of_options_compiles_without_spills():
    """The compiler may reject what the interpreter accepts; the report above has only the default options."""
    done = without_interpreter(str(ROOT / "tests" / "compiled_options.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["bad"] == [] and found["left out"] == []
    assert set(found["compiled"]) == {f"{name}_kernel" for name in ("statistics", "prototypes", "weighting", "loss", "gradient")}
    assert min(found["compiled"].values()) >= 10


SPILLING = {"sm_80": 0, "sm_90": 0, "sm_100": 0, "gfx942": 0}  # kernels; never to be raised


def test_the_committed_report_is_complete_and_spills_no_more_than_it_did():
    rows = ceilings()
    points = {key[:-1] for key in rows}
    wanted = [c for target in TARGETS for c in reported(target)]
    assert points >= {(c.target, c.variant, c.classes, c.dtype, c.layout) for c in wanted}
    assert len(rows) == 5 * len(points)
    assert {target: sum(key[0] == target and row["spills"] != "0" for key, row in rows.items()) for target in TARGETS} == SPILLING


def readme_table(rows):
    """The table of bench/README.md, from the rows of the report: registers and load widths of the loss alone on sm_90."""
    lines = []
    for classes, features in ((2, 16), (4, 16), (14, 32)):
        for dtype in ("float32", "bfloat16"):
            for layout in ("contiguous", "channels_last"):
                of = {
                    row["kernel"]: f"{row['registers']}: {row['load_widths']}"
                    for row in rows
                    if (row["target"], row["variant"], row["classes"], row["dtype"], row["layout"])
                    == ("sm_90", "loss", str(classes), dtype, layout)
                }
                passes = [of[f"{name}_kernel"] for name in ("statistics", "weighting", "gradient")]
                lines.append(f"| {classes}, {features} | {dtype} | {layout.replace('_', ' ')} | {' | '.join(passes)} |")
    return "\n".join(lines)


def test_the_table_of_the_page_is_that_of_the_report():
    assert readme_table(ceilings().values()) in (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


def test_the_matrix_is_the_stated_one():
    cases = matrix()
    assert len(set(cases)) == 48
    assert {(c.classes, c.features) for c in cases} == {(2, 16), (4, 16), (14, 32)}
    assert {c.dtype for c in cases} == {"float32", "bfloat16"}
    assert {c.layout for c in cases} == {"contiguous", "channels_last"}
    assert {c.target for c in cases} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for target in TARGETS:
        covered = cases_of(target)
        for name in ("classes", "dtype", "layout", "variant"):
            assert {getattr(c, name) for c in covered} == {getattr(c, name) for c in reported(target)}


# ------------------------------------------------------------------------------------------------------- command line


def test_table_and_csv(tmp_path):
    """One small point of the matrix through the functions that the command calls."""
    code = (
        "from pathlib import Path\n"
        "from rplib.bench.ahead_of_time import matrix, report_all, table, write_csv\n"
        "rows = report_all(matrix([(2, 16)], ['float32'], ['contiguous'], ['sm_90']))\n"
        f"write_csv(rows, Path({str(tmp_path / 'report.csv')!r}))\n"
        "print(table(rows))\n"
    )
    done = without_interpreter("-c", code)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert done.stdout.splitlines()[0].split()[:5] == ["target", "variant", "C", "F", "dtype"]
    assert len(done.stdout.splitlines()) == 1 + len(rows)
    statistics = next(row for row in rows if row["kernel"] == "statistics_kernel")
    assert statistics["target"] == "sm_90" and int(statistics["registers"]) > 16 and statistics["triton"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "sm_75"], "unknown target 'sm_75'; expected one or more of sm_80, sm_90, sm_100, gfx942"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--csv", "/no/such/folder/report.csv"], "there is no folder /no/such/folder"),
    ],
)
def test_mistakes_of_the_user_are_one_line(arguments, said):
    done = without_interpreter("-m", "rplib.bench.ahead_of_time", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("rplib: error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_refused_where_the_interpreter_is_switched_on():
    done = without_interpreter("-m", "rplib.bench.ahead_of_time", "--targets", "sm_90", "--jobs", "1", interpret="1")
    assert done.returncode == 2
    assert done.stderr.startswith("rplib: error: TRITON_INTERPRET is set") and done.stderr.count("\n") == 1


def test_the_folder_answers_to_one_name():
    """From the repository root `import bench` would find it under a name that is not the project's."""
    done = subprocess.run([sys.executable, "-c", "import bench"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is the package rplib.bench but was imported as 'bench'" in done.stderr
