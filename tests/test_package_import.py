"""The core needs torch alone, imports quickly, and resolves for type checkers in a plain checkout."""

import json
import os
import subprocess
import sys

import pytest
from package_tools import LOSS_CALL, PYPROJECT, ROOT, output_of, run_python

import rplib
from rplib.cli import EXTRAS

NOT_TORCHS = [module for module in EXTRAS["reference"] if module != "numpy"]

USES = """
import torch
import rplib
import rplib.kernels
import rplib.reference
import rplib.bench

x = [torch.zeros(1, 2, 3)] * 2
loss_fn: rplib.ReliableMutualLoss = rplib.ReliableMutualLoss()
maps: list[rplib.Reliability] = rplib.reliability(x, x)
value: float = rplib.ramp(1)
wrong: str = rplib.ramp(1)
"""


@pytest.mark.parametrize("blocked", [["triton"], ["numpy"], NOT_TORCHS, ["triton", *EXTRAS["reference"]]], ids=str)
def test_loss_works_without(blocked, tmp_path):
    output = output_of(run_python(LOSS_CALL, cwd=tmp_path, path=[ROOT], blocked=blocked))
    assert output.startswith("loss ")


def test_triton_form_says_what_is_missing(tmp_path):
    code = LOSS_CALL.replace("ReliableMutualLoss()", 'ReliableMutualLoss(impl="triton")')
    done = run_python(code, cwd=tmp_path, path=[ROOT], blocked=["triton"])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "rplib[triton]" in last
    assert 'impl="torch"' in last or "impl='torch'" in last


def test_import_brings_torch_and_nothing_else(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import rplib
print(*sorted(set(sys.modules) - before))
"""
    new = output_of(run_python(code, cwd=tmp_path, path=[ROOT])).split()
    foreign = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert foreign == {"rplib"}
    assert len(new) < 40  # quick beside the second or more of torch; counted, because a busy machine has no seconds to compare
    assert not [name for name in new if name.startswith(("rplib.kernels", "rplib.reference", "rplib.bench"))]


def test_import_has_no_side_effect_on_torch(tmp_path):
    code = """
import torch
def state():
    random = (torch.initial_seed(), torch.get_rng_state().sum().item())
    modes = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(), *random, *modes)
before = state()
import rplib
assert state() == before, (before, state())
"""
    output_of(run_python(code, cwd=tmp_path, path=[ROOT]))


def test_public_names():
    named = {"ReliableMutualLoss", "MutualObjective", "functional", "reliability", "Reliability", "ramp", "__version__"}
    assert named <= set(rplib.__all__)
    assert all(getattr(rplib, name, None) is not None for name in rplib.__all__)


@pytest.mark.parametrize(
    "checker",
    [
        ["mypy", "--strict", "--cache-dir={tmp}/cache", "--follow-imports=silent", "uses.py"],
        ["pyright", "--pythonpath", sys.executable, "uses.py"],
    ],
    ids=["mypy", "pyright"],
)
@pytest.mark.slow_cases("pyright")
def test_type_checkers_resolve_a_checkout(checker, tmp_path):
    """One line of the file is wrong: a checker that does not find rplib takes everything for Any and stays silent."""
    (tmp_path / "uses.py").write_text(USES)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # torch alone takes 20 s
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}))
    done = subprocess.run(
        [sys.executable, "-m", *(word.format(tmp=tmp_path) for word in checker)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )
    complaints = [line for line in done.stdout.splitlines() if "error" in line and "uses.py:" in line]
    assert len(complaints) == 1, done.stdout + done.stderr
    assert f"uses.py:{USES.splitlines().index('wrong: str = rplib.ramp(1)') + 1}:" in complaints[0]


def test_examples_in_docstrings_are_collected():
    assert "rplib" in PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]
    assert "--doctest-modules" in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"]
