"""No access outside the tensors, shown with unreadable pages flush against them; each case in a process that may die of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loss_cases import DEVICE, TRITON

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="guard pages are the CPU's; on a GPU compute-sanitizer looks for this"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are made with Linux's mmap"),
]


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-X", "faulthandler", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT / "tests", capture_output=True, text=True)


def test_the_guard_bites():
    """One element past the end, or before the start, ends the process."""
    code = (
        "import torch, ctypes, sys\n"
        "from guarded_memory import guarded\n"
        "x = guarded(torch.ones(37), sys.argv[1])\n"
        "assert x.sum() == 37\n"
        "print('inside', flush=True)\n"
        "ctypes.c_float.from_address(x.data_ptr() + int(sys.argv[2])).value\n"
        "print('outside', flush=True)\n"
    )
    for side, offset in (("end", 37 * 4), ("start", -4)):
        done = run("-c", code, side, offset)
        assert done.returncode < 0 and done.stdout == "inside\n", done.stderr


@pytest.mark.slow_cases(
    "triton-float32-14-33-37-contiguous-end", "triton-float32-2-5-517-contiguous-start", "triton-float16-3-3-67-channels_last-end"
)
@pytest.mark.parametrize(
    ("dtype", "classes", "features", "voxels", "layout", "side"),
    [
        ("float32", 2, 16, 1, "contiguous", "end"),
        ("float32", 2, 5, 517, "contiguous", "end"),
        ("float32", 2, 5, 517, "contiguous", "start"),
        ("bfloat16", 2, 16, 131, "contiguous", "end"),
        ("float16", 3, 3, 67, "channels_last", "end"),
        ("float32", 5, 7, 67, "channels_last", "end"),
        ("float32", 14, 33, 37, "contiguous", "end"),
    ],
)
@pytest.mark.parametrize("impl", [TRITON])
def test_nothing_outside_the_tensors_is_touched(impl, dtype, classes, features, voxels, layout, side):
    done = run("guarded_memory.py", impl, dtype, classes, features, voxels, layout, side)
    assert done.returncode == 0 and done.stdout == "survived\n", done.stderr[-2000:]
