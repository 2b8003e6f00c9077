"""Profile of a training step and a validation on this machine: `rplib train --profile`."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rplib
from rplib.memory import peak_memory
from rplib.reference.checkpoint import build_network
from rplib.reference.config import Config
from rplib.reference.devices import find_device, numerics
from rplib.reference.inference.windows import labels
from rplib.reference.training.distributed import Ranks
from rplib.reference.training.step import PARTS, training_step
from rplib.reference.training.trainer import Training

_WARM_UP = 3  # steps, for allocations and cuDNN's benchmarking


class Profile(NamedTuple):
    """Measured times, memory and work.

    Attributes:
        parts: name -> seconds per step, synchronised after each part. ``data`` is the time spent waiting for a batch.
        step: seconds of a step without synchronisation.
        cut: seconds to cut one batch, done by a thread while a step runs.
        window: seconds per validation window as in training: batched, decoder 1 only, summed on the device.
        window_alone: seconds per window one at a time, with both decoders, summed in RAM.
        memory: peak bytes of tensors in a step: weights, momentum, gradients, a batch, activations. Excludes cached
            volumes and memory allocated outside torch.
        flop: floating-point operations of a step's convolutions, forward and backward. window_flop: of a validation window.
        device: name of the device.
    """

    parts: dict[str, float]
    step: float
    cut: float
    window: float
    window_alone: float
    memory: int
    flop: float
    window_flop: float
    device: str

    def table(self) -> str:
        """The report as text."""
        whole = sum(self.parts.values())
        rows = [f"{'part of a step':24}{'ms':>10}{'share':>9}"]
        rows += [f"{name:24}{1e3 * s:10.2f}{100 * s / whole:8.1f} %" for name, s in self.parts.items()]
        rows.append(f"{'sum':24}{1e3 * whole:10.2f}{100:8.1f} %")
        small = self.parts["data"] + self.parts["loss"] + self.parts["loss backward"]
        rows += [
            "",
            f"data and loss together: {100 * small / whole:.1f} % of a step",
            f"whole step, not synchronised: {1e3 * self.step:.2f} ms; cutting its batch, in a thread: {1e3 * self.cut:.2f} ms",
            f"validation window: {1e3 * self.window:.2f} ms in batches; {1e3 * self.window_alone:.2f} ms one at a time with "
            f"both decoders and sums in RAM ({self.window_alone / self.window:.1f} times)",
            f"work per step: {1e-12 * self.flop:.3f} TFLOP, {1e-12 * self.flop / self.step:.3f} TFLOP/s; per window: "
            f"{1e-12 * self.window_flop:.3f} TFLOP, {1e-12 * self.window_flop / self.window:.3f} TFLOP/s",
            f"peak memory of tensors in a step: {self.memory / 2**30:.2f} GiB; device: {self.device}",
        ]
        return "\n".join(rows) + "\n"


def profile(config: Config, data: Path, device: str | None = None, steps: int = 10, deterministic: bool = False) -> Profile:
    """Train for a few steps on real batches, in a temporary folder, and time each part.

    Raises:
        UserError: as `rplib.reference.training.trainer.train`.
    """
    where = find_device(device)
    with tempfile.TemporaryDirectory() as folder, numerics(where, deterministic, config.tf32):
        # Validation cases are not needed, and under `paper` they are the test list.
        training = Training(
            config.replace(protocol="held-out", validation=0), data, Path(folder), where, deterministic, False, Ranks()
        )
        training.log.close()  # type: ignore[union-attr]
        try:
            return _measured(training, config, where, steps)
        finally:
            training.feed.close()


def _measured(training: Training, config: Config, device: torch.device, steps: int) -> Profile:
    autocast = torch.bfloat16 if config.amp == "bfloat16" else None
    weight = config.consistency * rplib.ramp(config.ramp_length * config.ramp_every, config.ramp_length, config.ramp_every)
    parts = dict.fromkeys(("data", *PARTS), 0.0)
    since = [0.0]

    def mark(part: str) -> None:
        _synchronise(device)
        now = time.perf_counter()
        parts[part] += now - since[0]
        since[0] = now

    def step(mark: Callable[[str], None] | None) -> None:
        batch = training.feed.next()
        if mark is not None:
            mark("data")
        training_step(training.model, training.objective, training.optimiser, batch.images, batch.labels, weight, autocast, mark)

    training.model.train()
    for _ in range(_WARM_UP):
        step(None)
    alone = _seconds(lambda: step(None), steps, device)
    _synchronise(device)
    since[0] = time.perf_counter()
    for _ in range(steps):
        step(mark)
    memory = _memory(training, weight, device, autocast)
    plan = training.batches.draw()
    cut = _seconds(lambda: training.batches.cut(plan), steps, device)

    training.network.eval()
    window, window_alone = _windows(training.network, config, device, autocast)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    seconds = {part: s / steps for part, s in parts.items()}
    return Profile(seconds, alone, cut, window, window_alone, memory, *work(config), name)


def work(config: Config) -> tuple[float, float]:
    """Floating-point operations of the convolutions in a training step and in a validation window (decoder 1 only).

    >>> from rplib.reference.config import load_recipe
    >>> f"{work(load_recipe('la-8'))[0]:.3e}"
    '2.104e+12'
    """
    with torch.device("meta"):
        network = build_network(config)
        images = torch.empty(config.batch_size, config.in_channels, *config.patch)
    with FlopCounterMode(display=False) as step:
        logits, _ = network.train()(images)
        torch.stack([x.sum() for x in logits]).sum().backward()
    with FlopCounterMode(display=False) as window, torch.inference_mode():
        network.eval().first_logits(images[:1])
    return float(step.get_total_flops()), float(window.get_total_flops())


def _memory(training: Training, weight: float, device: torch.device, autocast: torch.dtype | None) -> int:
    """Bytes of `Profile.memory`."""
    batch = training.feed.next()
    training.optimiser.zero_grad(set_to_none=True)
    momentum = [x for state in training.optimiser.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    held = [*training.network.parameters(), *training.network.buffers(), *momentum, batch.images, batch.labels]

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits, features = training.model(batch.images)
        return training.objective(logits, features, batch.labels, weight).total

    return sum(tensor.nbytes for tensor in held) + peak_memory(loss, device).peak


def _windows(network: nn.Module, config: Config, device: torch.device, autocast: torch.dtype | None) -> tuple[float, float]:
    """Seconds per window: batched on the device, and one at a time with sums in RAM."""
    number = 2 * config.window_batch
    shape = (*config.patch[:-1], config.patch[-1] + config.stride[-1] * (number - 1))
    image = np.random.default_rng(0).standard_normal((config.in_channels, *shape)).astype(np.float32)

    def batched() -> None:
        labels(network, image, config.patch, config.stride, config.window_batch, device, autocast)

    @torch.inference_mode()
    def one_by_one() -> None:
        total = np.zeros((config.classes, *shape), np.float32)
        for k in range(number):
            part = slice(k * config.stride[-1], k * config.stride[-1] + config.patch[-1])
            window = torch.from_numpy(np.ascontiguousarray(image[..., part]))[None].to(device)
            total[..., part] += network(window)[0][0].softmax(1)[0].cpu().numpy()

    return tuple(_seconds(run, 2, device) / number for run in (batched, one_by_one) if run() is None)  # type: ignore[return-value]


def _seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    _synchronise(device)
    return (time.perf_counter() - began) / times


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(config: Config, data: Path, device: str | None, steps: int, deterministic: bool) -> None:
    """`rplib train --profile`: measures and prints the profile."""
    print(f"{config.name}: {steps} steps on real batches, nothing is saved", file=sys.stderr)
    batch = f"{config.batch_size} patches of {' x '.join(map(str, config.patch))}"
    print(f"{config.name}: {batch}, {config.filters} filters, amp={config.amp}, tf32={str(config.tf32).lower()}")
    print(profile(config, data, device, steps, deterministic).table(), end="")
