"""The machine on Triton kernels: small ones with known answers and planted faults, and the loss itself, as compiled.

All of it runs in processes of its own, without Triton's interpreter, which replaces the compiler in this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_paths import golden_dir
from loss_cases import HAS_TRITON

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.timeout(1500),  # a cold compiler on a busy machine
]


def without_interpreter(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


def passes(program, *arguments):
    done = without_interpreter(ROOT / "tests" / program, *arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout and "FAILED" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow), 100])
def test_small_kernels(architecture):
    """Values, counts worked out by hand, planted faults (tests/machine_kernels.py)."""
    assert passes("machine_kernels.py", architecture).count("passed") >= 20


QUICK = ["ones", "quick"]
SLOW = ["reported", "masked", "golden", "objective", "maps", "odd", "many"]


@pytest.mark.parametrize("group", [*QUICK, *(pytest.param(group, marks=pytest.mark.slow) for group in SLOW)])
def test_the_loss_as_compiled(group):
    """Golden vectors and odd cases against float64, forward and gradient; no finding (tests/machine_loss.py)."""
    if group in ("golden", "objective", "maps", "quick"):
        golden_dir()
    passes("machine_loss.py", 90, group)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 100])
def test_the_loss_on_other_architectures(architecture):
    golden_dir()
    passes("machine_loss.py", architecture, "few")


# ----------------------------------------------------------------------------------------------------------- the report

CHECK = """
import sys
from rplib.bench.machine import report
import triton

classes, features, dtype, layout = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
ceilings = {(row.case, row.kernel): row for row, version in report.read_csv().items() if version == triton.__version__}
for row in report.measure(classes, features, dtype, layout):
    most = ceilings.get((row.case, row.kernel))
    for name in ("sass", "barriers", "shared_passes", "sector_bytes", "bytes"):
        if most is not None and getattr(row, name) > 1.001 * getattr(most, name):
            sys.exit(f"{row.kernel}: {name} is {getattr(row, name)}, at most {getattr(most, name)} before")
print("passed", len(ceilings))
"""
HELD = [(2, 16, "float32", "contiguous"), (2, 16, "bfloat16", "contiguous")]
ALSO_HELD = [(4, 16, "float32", "contiguous"), (4, 16, "bfloat16", "channels_last"), (14, 32, "float32", "contiguous")]


@pytest.mark.slow_cases("case1")
@pytest.mark.parametrize("case", [*HELD, *(pytest.param(case, marks=pytest.mark.slow) for case in ALSO_HELD)])
def test_the_kernels_do_no_more_than_they_did(case):
    """Instructions, barriers, shared-memory passes and bytes per voxel, as in the committed table.

    The table is renewed by: python -m rplib.bench.machine --csv bench/results/machine.csv
    """
    done = without_interpreter("-c", CHECK, *case)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith("passed")


PARTS = """
from rplib.bench.machine import parts, report
from rplib.bench.machine.sass import executed, machine_code

for ran in report.launches_of(2, 16, "float32", "contiguous"):
    found = parts.parts(ran, 90)
    counted = sum(n for of in found.values() for kind, n in of.items() if kind != parts.PASSES)
    assert counted == sum(executed(machine_code(ran.ptx, ran.cubin, 90), ran).values())
    assert sum(of[parts.PASSES] for of in found.values()) == ran.counts.shared_passes
    if ran.name == "weighting_kernel":
        assert found["_teachers_products"]["float"] > found["opinion"]["float"] > 0 == found["opinion"]["global"]
print("passed")
"""


@pytest.mark.slow
def test_the_parts_of_a_kernel_add_up_to_all_of_it():
    done = without_interpreter("-c", PARTS)
    assert done.returncode == 0 and done.stdout == "passed\n", (done.stdout + done.stderr)[-3000:]


def test_a_step_is_what_the_loop_over_blocks_calls(tmp_path):
    from collections import Counter

    from rplib.bench.machine import parts

    source = tmp_path / "kernel.py"
    source.write_text("def deep():\n    pass\ndef step():\n    pass\ndef _block():\n    pass\ndef a_kernel():\n    pass\n")
    ptx = f"""\t.loc\t1 7 0 // kernel.py:7:0
add.u32 %r1, %r1, 1;
\t.loc\t1 2 0 // kernel.py:2:0 @[ kernel.py:4:0 @[ kernel.py:6:0 @[ kernel.py:8:0 ] ] ]
add.f32 %f1, %f1, %f1;
\t.loc\t1 6 0 // kernel.py:6:0 @[ kernel.py:8:0 ]
bar.sync 0;
\t.file\t1 "{source}"
"""
    found = parts.steps(ptx)
    assert [found[line] for line in (2, 4, 6)] == ["loop", "step", "loop"]
    lines = parts.table({"loop": Counter(rest=2), "step": Counter({"float": 4, parts.PASSES: 1})}, 2).splitlines()
    assert [line.split() for line in lines] == [
        ["step", "float", "rest", "all", "passes"],
        ["step", "2.00", "0.00", "2.00", "0.50"],
        ["loop", "0.00", "1.00", "1.00", "0.00"],
        ["all", "2.00", "1.00", "3.00", "0.50"],
    ]


RIVAL = """
from rplib.bench.machine.inductor import rival
launches = rival(2, 16, "float32", "contiguous")
assert len(launches) >= 10 and all(needs.bytes > 0 for _, needs in launches)
assert sum(needs.bytes for _, needs in launches) > 240, "fewer bytes than the floor"
print("passed")
"""


@pytest.mark.slow
def test_inductors_kernels_run_here_and_are_right():
    """`rival` compares loss and gradient with eager PyTorch before it counts anything."""
    done = without_interpreter("-c", RIVAL)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), (done.stdout + done.stderr)[-3000:]


def test_the_committed_table_is_complete():
    from itertools import product

    from rplib.bench.machine import report

    rows = list(report.read_csv())
    assert {row.case for row in rows} == {
        (c, f, dtype, layout) for (c, f), dtype, layout in product(report.SHAPES, report.DTYPES, report.LAYOUTS)
    }
    assert len({(row.case, row.kernel) for row in rows}) == len(rows) and min(row.sass for row in rows) > 0


# Warp instructions per voxel (classes -> kernel -> most), the targets of kernels/README.md; shared-memory passes for C = 2 and 4.
MOST_INSTRUCTIONS = {
    2: {"statistics_kernel": 7.5, "weighting_kernel": 9.0},
    4: {"statistics_kernel": 14.0, "weighting_kernel": 16.0},
    14: {"statistics_kernel": 60.0, "weighting_kernel": 60.0, "gradient_kernel": 30.0},
}
MOST_PASSES = {"statistics_kernel": 2.0, "weighting_kernel": 0.5}


def test_the_committed_table_meets_the_targets():
    from rplib.bench.machine import report

    checked = 0
    for row in report.read_csv():
        classes, _, dtype, _ = row.case
        if row.kernel in MOST_INSTRUCTIONS[classes]:
            half = dtype == "bfloat16" and (classes, row.kernel) == (2, "weighting_kernel")
            most = MOST_INSTRUCTIONS[classes][row.kernel] + half  # one more to widen bfloat16
            assert row.sass <= most, (row.case, row.kernel, row.sass, most)
            checked += 1
        if classes <= 4 and row.kernel in MOST_PASSES:
            assert row.shared_passes <= MOST_PASSES[row.kernel], (row.case, row.kernel, row.shared_passes)
            checked += 1
    assert checked == 4 * (2 + 2 + 3) + 8 * 2


def test_the_table_shows_every_kernel_and_what_binds_it():
    from rplib.bench.machine import report

    rows = [
        report.Row("sm_90", 2, 16, "float32", "contiguous", "first_kernel", 4, 5.0, 6.0, 0.0, 0.0, 144.0, 144.0, 1000),
        report.Row("sm_90", 2, 16, "float32", "contiguous", "second_kernel", 4, 9.0, 8.0, 7.0, 100.0, 80.0, 64.0, 1000),
    ]
    lines = report.table(rows).splitlines()
    assert lines[0].startswith("C = 2, F = 16, float32, contiguous, sm_90")
    # 144 B at 4.8 TB/s are 30 ps; 100 passes at 132 multiprocessors x 1.7 GHz are 445.6 ps
    assert lines[2].split()[-3:] == ["43.0", "30.0", "memory"] and lines[3].split()[-3:] == ["445.6", "445.6", "shared"]
    assert lines[4].split()[:3] == ["all", "14.00", "14.00"] and lines[5].endswith("H200 10.98")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "sm_75"], "unknown target 'sm_75'"),
        (["--shapes", "2"], "expected classes x features"),
        (["--dtypes", "float64"], "--dtypes: unknown 'float64'"),
        (["--csv", "/no/such/folder/table.csv"], "there is no folder /no/such/folder"),
        (["--passes", "third"], "--passes: unknown 'third'"),
    ],
)
def test_mistakes_of_the_user_are_one_line(arguments, said, capsys, monkeypatch):
    from rplib.bench.command import main
    from rplib.bench.machine import parts, report

    program = parts if "--passes" in arguments else report
    monkeypatch.setattr(sys, "argv", ["machine", *arguments])
    assert main("machine", program.__doc__, program.add_arguments, program.run) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="only where Triton interprets")
def test_refused_where_triton_interprets():
    from rplib.bench.machine import compiled
    from rplib.errors import UserError

    with pytest.raises(UserError, match="TRITON_INTERPRET is set"), compiled(90):
        pass
    with pytest.raises(UserError, match="architecture is 75; expected one of 80, 90, 100"), compiled(75):
        pass


# ------------------------------------------------------------------------------------------------------ beside a GPU


def a_row(kernel, sass, passes, moved):
    from rplib.bench.machine import report

    return report.Row("sm_90", 2, 16, "float32", "contiguous", kernel, 4, sass, sass, 0.0, passes, moved, moved, 16384)


def test_measured_times_beside_predicted_ones():
    from rplib.bench.machine.beside_gpu import HEADS, beside
    from rplib.bench.machine.prediction import GPUS
    from rplib.bench.shapes import SHAPES, Case

    # 4,014,080 voxels of 144 B at 3.35 TB/s take 172.5 us, of 9 instructions by 4 x 132 x 1.7 GHz 40.2 us
    rows = [a_row("first_kernel", 9.0, 0.0, 144.0), a_row("second_kernel", 9.0, 0.0, 1.0)]
    measured = {"first_kernel": 345.1e-6, "second_kernel": 40.2e-6, "third_kernel": 1e-6}
    lines = beside(Case(SHAPES["left-atrium"]), measured, rows, GPUS["H100"])
    assert [len(line) for line in lines] == [len(HEADS)] * 4
    assert lines[0][3:] == ["first_kernel", "345.1", "172.5", "2.00", "memory"]
    assert lines[1][3:] == ["second_kernel", "40.2", "40.2", "1.00", "issue"]
    assert lines[2][3:] == ["third_kernel", "1.0", "-", "-", "not in the table"]
    assert lines[3][3:] == ["all", "385.3", "212.8", "1.81", ""]


def test_the_profilers_figures_beside_the_machines(capsys):
    """What `make gpu` prints after its part ncu."""
    from rplib.bench import gpu

    log = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    log += '"0","gradient_kernel","dram__bytes_read.sum","byte","80,281,600"\n'
    log += '"0","gradient_kernel","gpu__time_duration.sum","us","30.0"\n'
    gpu._print_bytes(log, "NVIDIA H100 80GB HBM3")
    said = capsys.readouterr().out
    assert "gradient_kernel: 20.00 B/voxel of DRAM traffic, 30.0 us (the machine: " in said and said.rstrip().endswith(" us)")
    gpu._print_bytes(log, "another GPU")
    assert "B/voxel)" in capsys.readouterr().out


@pytest.mark.gpu
def test_kernel_times_on_a_gpu():
    import torch

    from rplib.bench.machine.beside_gpu import kernel_seconds
    from rplib.bench.shapes import SHAPES, Case

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    found = kernel_seconds(Case(SHAPES["small"]), torch.device("cuda"))
    assert len(found) >= 3 and all(0 < seconds < 1 for seconds in found.values())
