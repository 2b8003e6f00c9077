"""GPU checks of the kernels: reproducible results, tensors with more than 2^31 elements, memory errors.

    python -m rplib.bench.gpu_checks identical     200 runs of loss and gradient, compared bitwise
    python -m rplib.bench.gpu_checks large         features with more than 2^31 elements against a repeated small volume
    python -m rplib.bench.gpu_checks once          every variant once on small odd volumes: for compute-sanitizer
    python -m rplib.bench.gpu_checks paper         one forward and backward pass at the paper's shape: for ncu

Exit code 1 if a check fails.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import rplib
from rplib.bench.command import main
from rplib.errors import UserError

RUNS = 200
# 16 channels of 2^27 + 2^25 voxels are 2.7 * 10^9 elements.
SMALL_SPATIAL, REPEATS = (64, 64, 64), 640


def networks(
    batch: int, classes: int, features: int, spatial: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, which require a gradient, and features of two networks."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensors(channels: int, scale: float) -> list[Tensor]:
        shape = (batch, channels, *spatial)
        return [(scale * torch.randn(shape, generator=generator, device=device)).to(dtype) for _ in range(2)]

    return [z.requires_grad_() for z in tensors(classes, 2.0)], tensors(features, 1.0)


def losses(
    batch: int, classes: int, spatial: tuple[int, ...], device: torch.device
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The loss with each of its options, and the objective, as functions of logits and features."""
    keywords: list[dict[str, str | None]] = [
        {}, {"confidence": "max_probability"}, {"confidence": None}, {"weighting": None}, {"cross_entropy_on": "probabilities"}
    ]  # fmt: skip
    for chosen in keywords:
        yield str(chosen or "loss"), rplib.ReliableMutualLoss(impl="triton", **chosen)  # type: ignore[arg-type]
    objective = rplib.MutualObjective(impl="triton")
    target = torch.randint(0, classes, (batch // 2, *spatial), generator=torch.Generator().manual_seed(1)).to(device)
    yield "objective", lambda z, f: objective(z, f, target, 0.3).total


def variants(
    channels: Sequence[tuple[int, int]], spatial: tuple[int, ...], device: torch.device
) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """(name, one forward and backward pass) for each dtype, number of classes and features, and option."""
    for dtype in (torch.float32, torch.bfloat16):
        for classes, features in channels:
            logits, values = networks(2, classes, features, spatial, dtype, device)
            for name, call in losses(2, classes, spatial, device):
                yield f"{dtype} C={classes} F={features} {name}", partial(gradients, call, logits, values)


def gradients(call: Callable[..., Tensor], logits: list[Tensor], features: list[Tensor]) -> list[Tensor]:
    """The loss and the gradients of the logits."""
    loss = call(logits, features)
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


def identical(
    device: torch.device,
    runs: int = RUNS,
    spatial: tuple[int, ...] = (96, 96, 81),
    channels: tuple[tuple[int, int], ...] = ((2, 16), (4, 16), (14, 32)),
) -> bool:
    """Check that the same inputs give bitwise equal results on every run."""
    good = True
    for name, evaluate in variants(channels, spatial, device):
        first = evaluate()
        different = 0
        for _ in range(runs - 1):
            different += any(not torch.equal(a, b) for a, b in zip(first, evaluate(), strict=True))
        print(f"{name}: {different} of {runs} runs differ", flush=True)
        good = good and different == 0
    return good


def large(device: torch.device, spatial: tuple[int, ...] = SMALL_SPATIAL, repeats: int = REPEATS) -> bool:
    """Check that a repeated volume has the loss of the volume, and its gradient divided by the number of repeats."""
    good = True
    for channels_last in (False, True):
        logits, features = networks(1, 2, 16, spatial, torch.bfloat16, device)
        loss_fn = rplib.ReliableMutualLoss(impl="triton")
        loss, *small = gradients(loss_fn, logits, features)

        def repeated(t: Tensor, last: bool = channels_last) -> Tensor:
            flat = t.detach().flatten(2)
            if not last:
                return flat.repeat(1, 1, repeats)
            return flat.transpose(1, 2).repeat(1, repeats, 1).transpose(1, 2)

        many = [repeated(z).requires_grad_() for z in logits]
        long = [repeated(f) for f in features]
        total, *grads = gradients(loss_fn, many, long)
        voxels = small[0][0, 0].numel()
        error = 0.0
        for g, whole in zip(small, grads, strict=True):
            expected = g.flatten(2).float()
            for part in (whole[..., :voxels], whole[..., -voxels:]):
                error = max(error, float((part.float() * repeats - expected).norm() / expected.norm()))
        value = abs(float(total) - float(loss)) / abs(float(loss))
        layout = "channels last" if channels_last else "contiguous"
        print(f"{long[0].numel():,} elements, {layout}: loss off by {value:.1e}, gradients by {error:.1e}", flush=True)
        good = good and value < 1e-4 and error < 2.0**-7
    return good


def once(
    device: torch.device,
    spatial: tuple[int, ...] = (13, 11, 9),
    channels: tuple[tuple[int, int], ...] = ((2, 16), (3, 5), (4, 16), (14, 32)),
) -> bool:
    """Run every variant on a volume that no block size divides; check that results are finite."""
    good = True
    for name, evaluate in variants(channels, spatial, device):
        finite = all(bool(t.isfinite().all()) for t in evaluate())
        print(f"{name}: {'finite' if finite else 'NOT finite'}", flush=True)
        good = good and finite
    return good


def paper(device: torch.device, spatial: tuple[int, ...] = (112, 112, 80)) -> bool:
    """One pass, after a warm-up pass that compiles."""
    logits, values = networks(4, 2, 16, spatial, torch.float32, device)
    loss_fn = rplib.ReliableMutualLoss(impl="triton")
    return all(all(bool(t.isfinite().all()) for t in gradients(loss_fn, logits, values)) for _ in range(2))


CHECKS: dict[str, Callable[[torch.device], bool]] = {"identical": identical, "large": large, "once": once, "paper": paper}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The check to run."""
    parser.add_argument("check", choices=CHECKS)


def run(args: argparse.Namespace) -> int:
    """Returns 1 if the check fails."""
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU, and these checks need one.")
    return 0 if CHECKS[args.check](torch.device("cuda")) else 1


if __name__ == "__main__":
    sys.exit(main("gpu_checks", __doc__, add_arguments, run))
