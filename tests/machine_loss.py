"""The loss as compiled for an NVIDIA GPU, on the machine, in a process without Triton's interpreter.

python tests/machine_loss.py ARCHITECTURE GROUP        prints a line per case; exit code 1 if one failed
"""

import sys
import traceback

import torch
from loss_cases import channel_slice, channels_last, networks, offset_storage, spatial_slice, transposed
from test_loss_golden import COMPARABLE, Golden, relative
from truth import compare, evaluate, truth

import rplib
from rplib.bench.machine.library import compiled_library

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}  # of the gradient, which is rounded to its dtype at the end


def golden(name):
    """Loss and gradient straight against the stored numbers."""

    def run():
        case = Golden(name, F32)
        loss, gradients = evaluate("triton", case.logits, case.features)
        assert relative(loss, case.loss) <= 1e-6
        for ours, expected in zip(gradients, case.gradients, strict=True):
            assert relative(ours, expected) <= 1e-6, relative(ours, expected)

    return run


def golden_objective(name):
    """The stored Dice term beside the mutual one: loss and gradient of the whole objective."""

    def run():
        case = Golden(name, F32)
        z = [t.clone().requires_grad_() for t in case.logits]
        target = case.stored["labels"][: int(case.stored["labeled_batch"])]
        out = rplib.MutualObjective(dice_weight=0.5, dice_classes=(1,), impl="triton")(
            z, case.features, target, torch.tensor(0.7)
        )
        out.total.backward()
        assert relative(out.total, 0.5 * case.stored["dice_loss"] + 0.7 * case.loss) <= 2e-6
        for k, t in enumerate(z):
            expected = 0.5 * case.stored[f"grad_dice_{k}"] + 0.7 * case.gradients[k]
            assert relative(t.grad, expected) <= 2e-6, relative(t.grad, expected)

    return run


def reported(classes, dtype, layout=None, *, spatial=(5, 7, 9), masked=False):
    """Both supervised terms and the statistics, against the naive form in float64.

    masked: with a mask, NaN where it is False, and an ignore label.
    """

    def run():
        generator = torch.Generator().manual_seed(1)
        z, f = networks(spatial, classes, 16, batch=3, dtype=dtype, seed=1)
        target = torch.randint(0, classes, (2, *spatial), generator=generator)
        mask = None
        if masked:
            mask = torch.rand(3, *spatial, generator=generator) < 0.7
            z, f = [[t.masked_fill(~mask[:, None], float("nan")) for t in ts] for ts in (z, f)]
            target[torch.rand(target.shape, generator=generator) < 0.4] = 255
        if layout is not None:
            z, f = [layout(t) for t in z], [layout(t) for t in f]
        keywords = {"supervised": "dice+cross_entropy", "statistics": True, "ignore_index": 255 if masked else None}
        found = []
        for impl, tensors in (("triton", (z, f)), ("naive", ([t.double() for t in z], [t.double() for t in f]))):
            leaves = [t.detach().requires_grad_() for t in tensors[0]]
            terms = rplib.MutualObjective(impl=impl, **keywords)(leaves, tensors[1], target, 0.3, mask=mask)
            terms.total.backward()
            found.append(([*terms[:3], *terms.statistics], [t.grad for t in leaves]))
        (ours, gradients), (exact, expected) = found
        for a, b in zip(ours, exact, strict=True):
            assert (a.double() - b).norm() <= 5e-6 * max(b.norm(), 0.1), (a, b)
        for g, h in zip(gradients, expected, strict=True):
            assert relative(g, h) <= 3 * TOLERANCE[dtype], relative(g, h)
            assert mask is None or (g.movedim(1, -1)[~mask] == 0).all()

    return run


def maps(name):
    """Masks, weights, prototypes and similarities of a golden vector."""

    def run():
        case = Golden(name, F32)
        compare("triton", case.logits, case.features).check_maps(2e-6)

    return run


def made(spatial, classes=2, features=16, *, dtype=F32, layout=None, batch=2, feature_dtype=None, **keywords):
    """Loss and gradient against the truth in float64; an upstream gradient that is not 1."""

    def run():
        z, f = networks(spatial, classes, features, batch=batch, dtype=dtype, feature_dtype=feature_dtype, seed=1)
        if layout is not None:
            z, f = [layout(t) for t in z], [layout(t) for t in f]
        used = None if keywords.get("weighting", "similarity") is None else f
        loss, gradients = evaluate("triton", z, used, 3.0, **keywords)
        exact = truth(z, used, **keywords)
        assert abs(loss.double() - exact.loss) <= 1e-6 * exact.magnitude
        for ours, expected in zip(gradients, exact.gradients, strict=True):
            assert relative(ours, 3.0 * expected) <= TOLERANCE[dtype], relative(ours, 3.0 * expected)

    return run


ODD = {
    "two voxels": made((2,), batch=1),
    "prime": made((257,)),
    "one more than a block": made((513,), batch=1),
    "odd axes, channels last": made((5, 7, 9), layout=channels_last),
    "a slice of every axis": made((5, 3, 6), layout=spatial_slice),
    "a slice of the channels, four classes": made((4, 5, 6), 4, layout=channel_slice),
    "all axes reversed": made((4, 5, 6), 3, 10, layout=transposed),
    "bfloat16": made((8, 8, 8), dtype=BF16),
    "bfloat16, an odd volume": made((5, 7, 9), dtype=BF16, batch=1),
    "float16, not aligned": made((4, 8, 16), dtype=F16, layout=offset_storage, batch=1),
    "four classes, multiples of 16": made((4, 8, 16), 4),
    "bfloat16 logits, float32 features": made((4, 8, 8), dtype=BF16, feature_dtype=F32),
    "no confidence": made((3, 4, 5), confidence=None),
    "maximum probability, cross-entropy on probabilities": made(
        (3, 4, 5), confidence="max_probability", cross_entropy_on="probabilities"
    ),
    "no weighting": made((3, 4, 5), weighting=None),
}
MANY = {
    "fourteen classes": made((4, 4, 8), 14, 32, batch=1),
    "fourteen classes, bfloat16, channels last": made((3, 5, 7), 14, 32, dtype=BF16, layout=channels_last, batch=1),
    "thirty-two classes": made((4, 4, 4), 32, 256, batch=1),
    "features of different number": made((3, 4, 5), 2, (3, 40)),
}
ONES = {
    "one voxel": made((1, 1, 1), batch=1),
    "one voxel, three samples": made((1,), batch=3),
    "an axis of one": made((6, 5, 1), layout=spatial_slice),
    "two axes of one": made((1, 1, 7), batch=1),
    "one feature": made((3, 4, 5), 2, 1),
}
REPORTED = {
    "two classes": reported(2, F32),
    "four classes": reported(4, F32, channels_last),
    "two classes, bfloat16": reported(2, BF16),
}
MASKED = {
    "two classes": reported(2, F32, spatial=(4, 8, 16), masked=True),
    "two classes, channels last": reported(2, BF16, channels_last, masked=True),
    "four classes": reported(4, F32, masked=True),
    "four classes, channels last": reported(4, F32, channels_last, spatial=(4, 8, 8), masked=True),
}
GROUPS = {
    "masked": MASKED,
    "reported": REPORTED,
    "golden": {name: golden(name) for name in COMPARABLE},
    "objective": {name: golden_objective(name) for name in ("binary_f16", "odd_shape", "four_classes")},
    "maps": {name: maps(name) for name in ("odd_shape", "class_never_predicted")},
    "odd": ODD,
    "many": MANY,
    "ones": ONES,
    "quick": {
        "golden": golden("odd_shape"),
        "objective": golden_objective("binary_f16"),
        "maps": maps("class_never_predicted"),
        "odd axes, channels last": ODD["odd axes, channels last"],
        "a slice of every axis": ODD["a slice of every axis"],
        "bfloat16": ODD["bfloat16"],
        "float16, not aligned": ODD["float16, not aligned"],
        "four classes, multiples of 16": ODD["four classes, multiples of 16"],
    },
    "few": {
        "golden": golden("odd_shape"),
        "objective": golden_objective("binary_f16"),
        "bfloat16": ODD["bfloat16"],
        "four classes": ODD["four classes, multiples of 16"],
    },
}


def main(architecture, group):
    failed = 0
    for name, case in GROUPS[group].items():
        with compiled_library(architecture) as run:
            try:
                case()
                assert run.launches and run.findings == [], [str(finding) for finding in run.findings]
                print(f"passed {name}: {len(run.launches)} launches", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED {name}", flush=True)
                traceback.print_exc(file=sys.stdout)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
