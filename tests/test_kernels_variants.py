"""What Triton specialises: nothing of a size, so that any size compiles, and one variant serves all shapes of patches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rplib.kernels import signatures
from rplib.kernels.voxels import SIZES

ROOT = Path(__file__).resolve().parent.parent
# Patches that people train on; the last two have voxel counts that no multiple of 16 divides.
PATCHES = [
    *((112, 112, 80), (96, 96, 96), (64, 64, 64), (128, 128, 128), (160, 160, 80), (48, 160, 160), (32, 32, 32), (96, 96, 64)),
    *((49, 51, 53), (97, 97, 97)),
]


def variants(**options):
    """Kernel -> the distinct variants that ten patch sizes need."""
    found = {}
    for spatial in PATCHES:
        for spec in signatures.iter_specs(2, 16, torch.float32, spatial=spatial, **options):
            key = str((spec.signature, spec.constexprs, spec.attrs, spec.num_warps))
            found.setdefault(spec.name, set()).add(key)
    return {name: len(keys) for name, keys in found.items()}


@pytest.mark.parametrize("labelled", [0, 2])
def test_one_variant_per_kernel_serves_all_patch_sizes(labelled):
    """Contiguous tensors: a second one for rows that begin anywhere, where no load can be wide; channels last: one."""
    assert set(variants(channels_last=True, labelled=labelled).values()) == {1}
    counted = variants(channels_last=False, labelled=labelled)
    assert counted.pop("statistics_kernel") == counted.pop("weighting_kernel") == counted.pop("gradient_kernel") == 2
    assert set(counted.values()) == {1}


def test_every_integer_argument_is_left_unspecialised():
    for recorded in signatures.record_launches(2, 16, torch.float32, False, labelled=1):
        for name, value in zip(recorded.kernel.arg_names, recorded.arguments, strict=False):
            assert name in SIZES or not isinstance(value, int), name
    odd = next(iter(signatures.iter_specs(2, 16, torch.float32, False, batch=1, spatial=(1, 1, 1))))
    assert odd.signature["voxels"] == "i32", "a size of 1 is no constant"


COMPILE = """
import json, sys
import torch
from rplib.bench.compiled_code import TARGETS, compile_for
from rplib.kernels import signatures
failed = []
for spatial, batch, labelled in json.loads(sys.argv[1]):
    for spec in signatures.iter_specs(2, 3, torch.float32, False, batch=batch, spatial=tuple(spatial), labelled=labelled):
        try:
            compile_for(TARGETS["sm_90"], spec.fn, spec.signature, spec.constexprs, spec.attrs, num_warps=spec.num_warps)
        except Exception as error:
            failed.append([spec.name, spatial, str(error)[-300:]])
print(json.dumps(failed))
"""


@pytest.mark.slow
def test_sizes_of_one_compile():
    """Every size argument at 1 (one voxel, one sample, one labelled), at multiples of 16, and at neither."""
    cases = [((1, 1, 1), 1, 1), ((1,), 1, 0), ((16, 16, 16), 16, 16), ((5, 7, 1), 3, 2)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(cases)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
