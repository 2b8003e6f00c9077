"""The kernels must not move more bytes unnoticed: limits on bytes per voxel and launches of one forward and backward pass.

python tests/test_bench_guard.py        prints the table CEILINGS as it is now (PYTHONPATH=. TRITON_INTERPRET=1)
"""

import itertools
import math
import os

import pytest
import torch

import rplib
from rplib.bench.eager_traffic import eager_traffic
from rplib.bench.traffic import kernel_traffic

pytest.importorskip("triton")
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel meter needs the interpreter; run with TRITON_INTERPRET=1"
)
THOROUGH = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "thorough", reason="HYPOTHESIS_PROFILE=thorough; a minute")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}

# Bytes per voxel (by lane, by 32-byte sector) of one sample, the teacher changing every 16 voxels of a row. Channels last, two
# loads of 16 bytes share a sector of features, which counts twice although a GPU's L1 serves the second. The volumes are small
# for the interpreter's sake, so partial sums weigh more than in a training (2 B at C = 4, 28 B at C = 14).
SMALL = (8, 8, 32)
SMALLER = (4, 8, 32)  # for C = 14
CEILINGS = {
    (2, 16, "float32", "contiguous"): (249.84, 250.54),
    (2, 16, "float32", "channels_last_3d"): (251.34, 318.04),
    (2, 16, "bfloat16", "contiguous"): (129.55, 130.16),
    (2, 16, "bfloat16", "channels_last_3d"): (131.34, 164.04),
    (4, 16, "float32", "contiguous"): (317.53, 318.41),
    (4, 16, "float32", "channels_last_3d"): (320.53, 389.41),
    (4, 16, "bfloat16", "contiguous"): (165.00, 165.79),
    (4, 16, "bfloat16", "channels_last_3d"): (168.53, 201.41),
    (14, 32, "float32", "contiguous"): (846.67, 879.07),
    (14, 32, "float32", "channels_last_3d"): (846.71, 1007.44),
    (14, 32, "bfloat16", "contiguous"): (458.67, 491.07),
    (14, 32, "bfloat16", "channels_last_3d"): (458.71, 527.44),
}
LAUNCHES = 5


def floor(classes, features, size):
    """Lower bound of bytes per voxel: logits and features read, logits and the teacher's features read, gradients written."""
    return (2 * (classes + features) + 2 * classes + features + 2 * classes) * size


def teachers(spatial, cube):
    """(*spatial): which network teaches, alternating from cube to cube; at random without one."""
    if cube is None:
        return torch.randint(0, 2, spatial)
    axes = torch.meshgrid(*(torch.arange(n) // cube for n in spatial), indexing="ij")
    return sum(axes) % 2


def networks(classes, features, dtype, memory_format, spatial, cube=16):
    """One sample of two networks, of which the teacher is far more confident; everything requires a gradient."""
    torch.manual_seed(7)
    teacher = teachers(spatial, cube)
    logits, feats = [], []
    for k in range(2):
        z = 0.1 * torch.randn(1, classes, *spatial)
        winner = torch.randint(0, classes, (1, 1, *spatial))
        z.scatter_add_(1, winner, torch.where(teacher == k, 5.0, 0.0)[None, None])
        logits.append(z)
        feats.append(torch.randn(1, features, *spatial))
    return tuple(
        [t.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for t in tensors] for tensors in (logits, feats)
    )


def measure(classes, features, dtype, memory_format, spatial, cube=16):
    logits, feats = networks(classes, features, DTYPES[dtype], FORMATS[memory_format], spatial, cube)
    loss_fn = rplib.ReliableMutualLoss(impl="triton")
    with kernel_traffic(tensors={"logits": logits, "features": feats}) as traffic:
        loss_fn(logits, feats).backward()
    assert all(z.grad is not None and z.grad.stride() == z.stride() for z in logits)
    return traffic, math.prod(spatial)


def per_voxel(traffic, voxels):
    return traffic.lane_bytes / voxels, traffic.sector_bytes / voxels


@pytest.mark.slow_cases("4-16-bfloat16-channels_last_3d", "14-32-float32-contiguous")
@INTERPRETED
@pytest.mark.parametrize(
    ("classes", "features", "dtype", "memory_format"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[0] == 14 and case[2:] != ("float32", "contiguous") else [])
        for case in CEILINGS
    ],
)
def test_bytes_per_voxel(classes, features, dtype, memory_format):
    traffic, voxels = measure(classes, features, dtype, memory_format, SMALL if classes <= 4 else SMALLER)
    lanes, sectors = per_voxel(traffic, voxels)
    assert lanes >= floor(classes, features, DTYPES[dtype].itemsize), "less than must be read: has the meter missed something?"
    most_lanes, most_sectors = CEILINGS[classes, features, dtype, memory_format]
    assert lanes <= most_lanes and sectors <= most_sectors
    assert traffic.launches <= LAUNCHES


@INTERPRETED
def test_the_targets_at_two_classes():
    """Half of the cubes each: 1.10 of the floor by lane, 1.15 by sector."""
    traffic, voxels = measure(2, 16, "float32", "contiguous", (16, 32, 32))
    lanes, sectors = per_voxel(traffic, voxels)
    assert 240 <= lanes <= 1.10 * 240 and 240 <= sectors <= 1.15 * 240
    features = traffic.by_tensor["features"]
    assert features.load_sector_bytes == voxels * 4 * (32 + 16), "all features once, then the teacher's alone"
    assert features.store_lane_bytes == traffic.by_tensor["logits"].store_lane_bytes == 0, "no input is written to"


@INTERPRETED
@pytest.mark.parametrize("cube", [4, 16])
@pytest.mark.parametrize("features", [(8, 8), (8, 5)])
@pytest.mark.parametrize("memory_format", list(FORMATS))
def test_the_second_pass_reads_the_features_of_the_teacher_alone(memory_format, features, cube):
    """Channels last: voxel by voxel. Contiguous: whole sectors of eight voxels; cubes of four need both networks' features."""
    spatial = (8, 4, 32)
    logits, feats = networks(2, 8, torch.float32, FORMATS[memory_format], spatial, cube)
    of_b = feats[1].detach()[:, : features[1]].contiguous(memory_format=FORMATS[memory_format])
    with kernel_traffic(tensors={"features": [feats[0], of_b]}) as traffic:
        rplib.ReliableMutualLoss(impl="triton")(logits, [feats[0], of_b]).backward()
    both = 4 * sum(features) * math.prod(spatial)
    taught = both if memory_format == "contiguous" and cube == 4 else both / 2
    read = traffic.by_tensor["features"]
    assert read.load_lane_bytes == both + taught
    assert read.load_sector_bytes >= both + taught


@INTERPRETED
@THOROUGH
@pytest.mark.parametrize("memory_format", list(FORMATS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_targets_at_two_classes_on_the_large_volume(dtype, memory_format):
    traffic, voxels = measure(2, 16, dtype, memory_format, (64, 64, 64))
    lanes, sectors = per_voxel(traffic, voxels)
    least = floor(2, 16, DTYPES[dtype].itemsize)
    assert lanes <= 1.10 * least and sectors <= 1.15 * least


def batch_of_two(classes, features):
    samples = [networks(classes, features, torch.float32, torch.contiguous_format, SMALL) for _ in range(2)]
    return tuple(
        [torch.cat([sample[which][k].detach() for sample in samples]).requires_grad_() for k in range(2)] for which in range(2)
    )


@pytest.mark.slow_cases("4")
@INTERPRETED
@pytest.mark.parametrize("classes", [2, 4])
def test_dice_reads_no_more(classes):
    """Features and logits are read as in the mutual loss alone; what comes on top is the target, twice where there is one.

    C > 2: the backward pass of the mutual loss reads the student's logits; Dice needs both networks' in labelled samples.
    """
    target = torch.randint(0, classes, (1, *SMALL), dtype=torch.uint8)  # of the first of two samples
    voxels = 2 * math.prod(SMALL)
    read = {}
    for name in ("mutual", "objective"):
        logits, feats = batch_of_two(classes, 16)
        with kernel_traffic(tensors={"logits": logits, "features": feats, "target": target}) as traffic:
            if name == "mutual":
                rplib.ReliableMutualLoss(impl="triton")(logits, feats).backward()
            else:
                rplib.MutualObjective(impl="triton")(logits, feats, target, 0.1).total.backward()
        assert traffic.launches <= LAUNCHES
        read[name] = {tensor: figures.load_sector_bytes / voxels for tensor, figures in traffic.by_tensor.items()}
    once = 2 * classes * 4
    if classes == 2:
        assert read["objective"]["logits"] == read["mutual"]["logits"] == 2 * once
    else:
        assert read["mutual"]["logits"] == 2.5 * once and read["objective"]["logits"] <= 2.75 * once
    assert read["objective"]["features"] == read["mutual"]["features"] == 4 * (32 + 16)
    passes = 2 if classes == 2 else 3
    assert read["mutual"]["target"] == 0 < read["objective"]["target"] <= passes / 2


@pytest.mark.slow_cases("4")
@INTERPRETED
@pytest.mark.parametrize("classes", [2, 4])
def test_a_mask_is_read_once_in_each_pass_and_nothing_else_is_read_again(classes):
    """C > 2: a third time at labelled voxels, where the backward pass reads both networks' logits."""
    target = torch.randint(0, classes, (1, *SMALL), dtype=torch.uint8)
    mask = torch.ones(2, *SMALL, dtype=torch.bool)
    read, voxels = {}, mask.numel()
    for name, given in (("without", None), ("with", mask)):
        logits, feats = batch_of_two(classes, 16)
        with kernel_traffic(tensors={"logits": logits, "features": feats, "target": target, "mask": mask}) as traffic:
            rplib.MutualObjective(impl="triton", ignore_index=255)(logits, feats, target, 0.1, mask=given).total.backward()
        assert traffic.launches <= LAUNCHES
        read[name] = {tensor: figures.load_sector_bytes / voxels for tensor, figures in traffic.by_tensor.items()}
    assert read["without"].pop("mask") == 0
    assert read["with"].pop("mask") == (2 if classes == 2 else 2.5)
    assert read["with"] == read["without"]


@INTERPRETED
@pytest.mark.parametrize("objective", [False, True])
def test_nothing_beside_the_kernels(objective):
    """PyTorch itself touches scalars at most, and the labels, which it checks: bytes and bools, two a step."""
    logits, feats = networks(2, 16, torch.float32, torch.contiguous_format, SMALL)
    target = torch.zeros(1, *SMALL, dtype=torch.uint8)
    with eager_traffic() as traffic:
        if objective:
            rplib.MutualObjective(impl="triton")(logits, feats, target, 0.1).total.backward()
        else:
            rplib.ReliableMutualLoss(impl="triton")(logits, feats).backward()
    assert traffic.custom_operators
    beside = {name: op for name, op in traffic.by_operation.items() if name not in traffic.custom_operators}
    checked = 12 * target.numel() if objective else 0  # t >= 0, t < C, and, not, any
    assert sum(op.bytes for op in beside.values()) <= 64 + checked, beside


def test_the_naive_form_is_a_fair_baseline():
    """The authors' mutual loss takes 428 operations and 4,633 bytes per voxel at C = 2, F = 16 and a batch of 4."""
    logits = [torch.randn(4, 2, 16, 16, 16, requires_grad=True) for _ in range(2)]
    features = [torch.randn(4, 16, 16, 16, 16, requires_grad=True) for _ in range(2)]
    loss_fn = rplib.ReliableMutualLoss(impl="naive")
    with eager_traffic() as traffic:
        loss_fn(logits, features).backward()
    assert traffic.operations == pytest.approx(428, rel=0.1)
    assert traffic.bytes / (4 * 16**3) == pytest.approx(4633, rel=0.1)


def _print_ceilings():
    for (classes, features), dtype, memory_format in itertools.product([(2, 16), (4, 16), (14, 32)], DTYPES, FORMATS):
        traffic, voxels = measure(classes, features, dtype, memory_format, SMALL if classes <= 4 else SMALLER)
        lanes, sectors = (math.ceil(100 * x) / 100 for x in per_voxel(traffic, voxels))
        print(f'    ({classes}, {features}, "{dtype}", "{memory_format}"): ({lanes:.2f}, {sectors:.2f}),', flush=True)
    print(f"LAUNCHES = {traffic.launches}")


if __name__ == "__main__":
    _print_ceilings()
