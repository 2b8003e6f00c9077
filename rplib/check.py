"""`rplib check`: compare the implementations on this machine with the naive form in float64.

Loss, gradient and masks are compared over dtypes, shapes, strides and options. Masks may differ where both networks are
equally confident (near-ties). Such voxels are counted, and the reference is evaluated with the implementation's mask there.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rplib import dispatch, naive
from rplib.functional import reliability, reliable_mutual_loss
from rplib.options import Implementation, Options

# (classes, feature channels, spatial sizes): binary as in the paper, odd sizes, several classes, 2-D, 1-D, one voxel
_SHAPES = [
    (2, 16, (16, 16, 16)),
    (2, 16, (7, 9, 5)),
    (4, 5, (13, 11)),
    (14, 32, (6, 5, 7)),
    (3, 8, (1031,)),
    (2, 1, (1,)),
]
_LIMIT = {torch.float32: 1e-6, torch.float64: 1e-10}  # of relative errors; half precision: see _half_is_as_good


@dataclass(frozen=True)
class Result:
    """One comparison: relative errors of loss and gradient, voxels whose mask differs, near-ties, and the verdict."""

    name: str
    loss_error: float
    gradient_error: float
    wrong_masks: int
    near_ties: int
    passed: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--device", help="check this device only, for example cpu or cuda:0 (default: all available)")
    parser.add_argument("--quiet", action="store_true", help="print only the verdict")


def run(args: argparse.Namespace) -> int:
    """Print a table and a verdict; returns 0 if every comparison passed, else 1."""
    devices = [torch.device(args.device)] if args.device else _devices()
    if all(d.type == "cpu" for d in devices) and dispatch.triton_installed():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, so that kernels can run on a CPU
    failures = comparisons = 0
    for device in devices:
        for impl in ("torch", "triton"):
            obstacle = dispatch.device_obstacle(device, explicit=True) if impl == "triton" else None
            if obstacle:
                print(f"{device} {impl}: not checked, {obstacle}")
                continue
            label = f"{device} {impl}" + (" (interpreter)" if impl == "triton" and device.type == "cpu" else "")
            if not args.quiet:
                print(f"{label}\n  {'case':44} {'loss':>9} {'gradient':>9} {'masks':>6} {'near-ties':>9}")
            for result in check(impl, device):
                comparisons += 1
                failures += not result.passed
                if not args.quiet or not result.passed:
                    print(
                        f"  {result.name:44} {result.loss_error:9.1e} {result.gradient_error:9.1e} "
                        f"{result.wrong_masks:6d} {result.near_ties:9d}{'' if result.passed else '  WRONG'}",
                        flush=True,
                    )
    if failures:
        print(f"WRONG: {failures} of {comparisons} comparisons with the naive form in float64 failed.")
        return 1
    print(f"OK: {comparisons} comparisons with the naive form in float64 passed.")
    return 0


def check(impl: Implementation, device: torch.device) -> Iterator[Result]:
    """Compare one implementation on one device, case by case."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    if impl != "triton" and device.type != "mps":
        dtypes.append(torch.float64)
    for n, (classes, channels, spatial) in enumerate(_SHAPES):
        for dtype in dtypes if n < 3 else dtypes[:1]:
            logits, features = _inputs(classes, channels, spatial, dtype, device, seed=n)
            name = f"{_name(dtype)} C={classes} F={channels} {'x'.join(map(str, spatial))}"
            yield compare(name, Options(impl=impl), logits, features)
    logits, features = _inputs(2, 16, (9, 10, 11), torch.float32, device, seed=7)
    channels_last = [t.to(memory_format=torch.channels_last_3d) for t in (*logits, *features)]
    yield compare("float32 channels_last_3d", Options(impl=impl), channels_last[:2], channels_last[2:])
    sliced = [t[..., 1:-1, ::2, :] for t in (*logits, *features)]
    yield compare("float32 strided slices", Options(impl=impl), sliced[:2], sliced[2:])
    for options in (
        Options(confidence="max_probability", impl=impl),
        Options(confidence=None, impl=impl),
        Options(weighting=None, impl=impl),
        Options(cross_entropy_on="probabilities", impl=impl),
    ):
        changed = {k: v for k, v in vars(options).items() if v != getattr(Options(impl=impl), k)}
        yield compare("float32 " + ", ".join(f"{k}={v!r}" for k, v in changed.items()), options, logits, features)


def compare(name: str, options: Options, logits: list[Tensor], features: list[Tensor]) -> Result:
    """Compare one call with the naive form in float64, with an upstream gradient other than 1."""
    keywords = {k: v for k, v in vars(options).items() if k != "impl"}
    upstream = 3.0
    ours = [z.detach().clone(memory_format=torch.preserve_format).requires_grad_() for z in logits]
    loss = reliable_mutual_loss(ours, features, impl=options.impl, **keywords)
    (loss * upstream).backward()

    exact = [z.detach().cpu().double().requires_grad_() for z in logits]
    exact_features = [f.detach().cpu().double() for f in features]
    own = [m.mask.cpu() for m in reliability(logits, features, impl=options.impl, **keywords)]
    true = [m.mask for m in naive.maps(exact, exact_features, options)]
    near = _near_ties(exact, options)
    wrong = sum(int(((a != b) & ~near).sum()) for a, b in zip(own, true, strict=True))
    masks = [torch.where(near, a, b) for a, b in zip(own, true, strict=True)]
    truth = naive.loss(exact, exact_features, options, masks)
    (truth * upstream).backward()

    loss_error = _relative(loss.detach().cpu().double(), truth.detach())
    gradient_error = max(_relative(_grad(a).cpu().double(), _grad(b)) for a, b in zip(ours, exact, strict=True))
    limit = _LIMIT.get(logits[0].dtype)
    if limit is None:
        good = loss_error <= _LIMIT[torch.float32] and _half_is_as_good(ours, exact, features, masks, options, upstream)
    else:
        good = loss_error <= limit and gradient_error <= limit
    return Result(name, loss_error, gradient_error, wrong, int(near.sum()), good and wrong == 0)


def _half_is_as_good(
    ours: list[Tensor],
    exact: list[Tensor],
    features: list[Tensor],
    masks: list[Tensor],
    options: Options,
    upstream: float,
) -> bool:
    """|ours - truth| <= |naive - truth| + 1 unit in the last place, elementwise."""
    plain = [z.detach().cpu().requires_grad_() for z in ours]
    (naive.loss(plain, [f.cpu() for f in features], options, masks) * upstream).backward()
    for a, b, c in zip(ours, exact, plain, strict=True):
        truth, mine, theirs = _grad(b), _grad(a).cpu().double(), _grad(c).double()
        kind = torch.finfo(a.dtype)
        exponent = torch.floor(torch.log2(truth.abs().clamp_min(kind.tiny)))
        unit = torch.exp2(exponent) * kind.eps
        if bool(((mine - truth).abs() > (theirs - truth).abs() + unit).any()):
            return False
    return True


def _near_ties(logits: list[Tensor], options: Options) -> Tensor:
    """(B, *spatial) bool: the two networks are equally confident to the rounding of float32."""
    p = [torch.softmax(z.detach(), dim=1) for z in logits]
    if options.confidence == "max_probability":
        uncertainty = [1 - q.amax(dim=1) for q in p]
    else:
        uncertainty = [-(q * torch.log(q + options.eps)).sum(dim=1) for q in p]
    tolerance = 1e-6 * torch.maximum(uncertainty[0].abs(), uncertainty[1].abs()) + 1e-12
    if logits[0].shape[1] > 2:
        tolerance = tolerance + 2e-6
    return (uncertainty[0] - uncertainty[1]).abs() <= tolerance


def _inputs(
    classes: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(2, classes, *spatial, generator=generator) for _ in range(2)]
    features = [torch.randn(2, channels, *spatial, generator=generator) + 0.5 for _ in range(2)]
    return [z.to(device, dtype) for z in logits], [f.to(device, dtype) for f in features]


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _relative(ours: Tensor, truth: Tensor) -> float:
    difference, size = float((ours - truth).norm()), float(truth.norm())
    return difference / size if size else difference


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return devices


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
