"""The training loop, with checkpoints and resumption."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rplib
from rplib.errors import Terminated, UserError, reading
from rplib.reference import checkpoint
from rplib.reference.checkpoint import BEST, CONFIG, LAST
from rplib.reference.config import Config
from rplib.reference.datasets.layouts import LAYOUTS, Case, load_cases, open_for, split_training
from rplib.reference.devices import find_device, numerics
from rplib.reference.files import write_text_atomically
from rplib.reference.network import MutualVNet
from rplib.reference.progress import Progress
from rplib.reference.reporting.curves import write_curves
from rplib.reference.reporting.run_log import METRICS_FILE, LogRow, RunLog, read_metrics, record_session
from rplib.reference.training import run_folder
from rplib.reference.training.batches import TwoStreamBatches
from rplib.reference.training.distributed import Ranks, distributed, synchronise_batch_norm
from rplib.reference.training.feeding import Feed
from rplib.reference.training.methods import build_objective
from rplib.reference.training.monitor import Monitor
from rplib.reference.training.packed import pack
from rplib.reference.training.step import training_step
from rplib.reference.training.validation import case_dice

__all__ = ["find_device", "train"]

PAPER_WARNING = (
    "protocol 'paper': weights are selected on the {} list, as in the published results. "
    "Scores of this run are optimistic; compare them only with scores selected in the same way."
)
_AWAIT_EVERY = 50  # iterations between checks whether every class is predicted, under await_classes
_AVERAGE_EVERY = 10  # iterations between updates of the averaged weights, with the decay of as many iterations
_DEVICE_SHARE = 0.2  # fraction of GPU memory for volumes under cache=auto


def train(
    config: Config,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    device: str | torch.device | None = None,
    deterministic: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Train one network and write its run folder.

    Args:
        config: all settings.
        data: folder of the data set.
        out: run folder; new or empty unless ``resume``.
        resume: continue from ``out/last.pt`` (or from the start if there is no checkpoint yet). Results are bitwise equal to
            those of an uninterrupted run on a CPU with the same number of threads, and on a GPU with
            ``deterministic``.
        device: training device; None is cuda if available, else cpu.
        deterministic: use deterministic algorithms on the GPU too.
        ranks: this process in a distributed training (`rplib.reference.training.distributed.joined`); None: single process.

    Returns:
        Path of best.pt, the final weights under the protocol.

    Raises:
        UserError: an invalid folder, list, case, checkpoint or setting, a full disk, or a non-finite
            loss.
    """
    ranks = ranks or Ranks()
    device = find_device(device)
    if device.type == "cpu" and config.amp != "off":
        # Seen with torch 2.13 on x86-64: the weight gradient of a 3x3x3 convolution over 2x2x2 voxels (the deepest block
        # of a 32-voxel patch) contains uninitialised memory, sometimes NaN.
        raise UserError(
            f"amp={config.amp} on a CPU: PyTorch's bfloat16 convolutions give wrong gradients on small volumes there; "
            "set amp=off."
        )
    with contextlib.ExitStack() as held:
        with ranks.together():
            run_folder.check_memory(config, device)
            if ranks.first:
                held.enter_context(run_folder.prepared(out, resume, config))
        held.enter_context(numerics(device, deterministic, config.tf32))
        trainer = Training(config, data, out, device, deterministic, resume, ranks)
        return trainer.run()


class Training:
    """The state of a training, ready for its first step (or for the next one of a resumed run).

    Arguments as for `train`, which uses it; the profiler runs its parts separately.
    """

    def __init__(
        self, config: Config, data: Path, out: Path, device: torch.device, deterministic: bool, resume: bool, ranks: Ranks
    ) -> None:
        self.config, self.out, self.device, self.ranks = config, out, device, ranks
        self.done, self.best_score, self.best_iteration = 0, 0.0, 0
        saved = None
        with ranks.together():
            _try_objective(config, device)
            if ranks.first and resume and (out / LAST).is_file():
                saved = checkpoint.load(out / LAST)
        saved = ranks.from_first(saved)
        with ranks.together():
            labelled, unlabelled, self.validation = _read_cases(config, data, ranks)
            cache = _cache(config, [*labelled, *unlabelled], device)
            batches = TwoStreamBatches(labelled, unlabelled, config, ranks.rank, ranks.size, cache)
            self.case_names = [case.name for case in (*labelled, *unlabelled, *self.validation)]
            if saved is not None:
                run_folder.check_checkpoint(saved, self.case_names, config, out / LAST)

            torch.manual_seed(config.seed)
            self.network: nn.Module = checkpoint.build_network(config)
            if not ranks.first:  # same weights, different dropout
                torch.manual_seed(_seed(config.seed, ranks.rank))
            if saved is not None:
                checkpoint.load_weights(self.network, saved["network"], out / LAST)
        last = torch.channels_last_3d if config.network_dims == 3 else torch.channels_last
        memory_format = last if config.channels_last else torch.contiguous_format
        self.network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        if device.type == "cpu":
            pack(self.network)
        self.averaged: AveragedModel | None = None
        if config.average:  # every rank averages the same weights; for scoring, plain batch normalisation is enough
            update = get_ema_multi_avg_fn(config.average**_AVERAGE_EVERY)
            self.averaged = AveragedModel(self.network, multi_avg_fn=update, use_buffers=True)
        synchronise_batch_norm(self.network, ranks, device)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(),
            config.learning_rate,
            config.momentum,
            weight_decay=config.weight_decay,
            fused=True if device.type in ("cpu", "cuda") else None,
        )
        self.objective = build_objective(config, ranks.group)
        # Used by steps; checkpoints and validations use the network itself.
        stepped = cast(nn.Module, torch.compile(self.network)) if config.compile else self.network
        self.model = distributed(stepped, ranks, device)
        if saved is not None:
            with reading(out / LAST, "checkpoint", "use another one or train again"):
                self._restore(saved, batches)
        of_images = torch.contiguous_format if config.slices else memory_format  # slices have a third axis of one voxel
        self.batches, self.feed = batches, Feed(batches, device, of_images)

        if saved is None:  # the iteration from which the ramp-up counts; None: not started
            self.ramp_from: int | None = None if config.await_classes and config.consistency else config.warmup
        self.monitor = Monitor(_class_shares(labelled, config.classes), config.consistency, config.iterations)
        self.log: RunLog | None = None
        if ranks.first:
            if saved is not None:
                run_folder.warn_of_other_bits(out, device, ranks.size, deterministic)
            write_text_atomically(out / CONFIG, config.to_toml())
            record_session(out, device, data, self.done, deterministic, ranks.size)
            self.log = RunLog(out, self.done)
            self.monitor.look(read_metrics(out / METRICS_FILE))

    def run(self) -> Path:
        config, began = self.config, time.monotonic()
        if config.protocol == "paper" and self.ranks.first:
            print(PAPER_WARNING.format(_paper_list(config).upper()), file=sys.stderr)
        pending: list[tuple[int, float, float, list[str], tuple[Tensor, ...]]] = []
        autocast = torch.bfloat16 if config.amp == "bfloat16" else None
        self.model.train()
        window_began = time.monotonic()
        progress = Progress(
            range(self.done + 1, config.iterations + 1),
            initial=self.done,
            total=config.iterations,
            unit="it",
            desc=config.name,
            mininterval=1.0,
            smoothing=0.05,
        )
        with (
            progress,
            contextlib.closing(self.feed),
            contextlib.closing(self.log) if self.log else contextlib.nullcontext(),
            run_folder.termination() as terminated,
        ):
            for t in progress:
                batch = self.feed.next()
                weight = self._consistency_weight(t)
                rate = self._set_learning_rate(t)
                terms = training_step(self.model, self.objective, self.optimiser, batch.images, batch.labels, weight, autocast)
                if self.averaged is not None and t % _AVERAGE_EVERY == 0:
                    self.averaged.update_parameters(self.network)
                pending.append((t, weight, rate, batch.names, terms))

                validating, saving = self._validates_at(t), t % config.checkpoint_every == 0 or t == config.iterations
                stopping = self.ranks.size == 1 and terminated()
                deciding = self.ramp_from is None and t >= config.warmup and t % _AWAIT_EVERY == 0
                if not (validating or saving or stopping or deciding or t % config.log_every == 0):
                    continue
                if self.ranks.size > 1:  # ranks may receive the signal one step apart: stop them together
                    stopping = any(self.ranks.gather(terminated()))
                saving = saving or stopping
                rows = self._look_at(pending, window_began)
                if deciding and self.ranks.from_first(self.monitor.knows_every_class()):
                    self.ramp_from = t
                if validating or saving:
                    self._check_weights(t, batch.names)
                if validating:
                    rows[-1] = rows[-1]._replace(validation_dice=self._validate(t))
                self._write_rows(rows)
                progress.set_postfix_str(f"dice {rows[-1].dice:.4f} mutual {rows[-1].mutual:.4f}", refresh=False)
                if saving:
                    self._save(t)
                if stopping and t < config.iterations:
                    raise Terminated(f"iteration {t}")
                pending.clear()
                window_began = time.monotonic()
        return self._finish(time.monotonic() - began)

    def _look_at(self, pending: list[Any], window_began: float) -> list[LogRow]:
        """The collected losses as rows; the only place where training synchronises the device."""
        flat = [torch.cat([x.double().flatten() for x in terms]) for *_, terms in pending]
        losses = torch.stack(flat).tolist()
        seconds = (time.monotonic() - window_began) / len(pending)
        rows: list[LogRow] = []
        for (t, weight, rate, names, _), (total, dice, mutual, *statistics) in zip(pending, losses, strict=True):
            if not all(map(math.isfinite, (total, dice, mutual))):
                self._write_rows(rows)
                self._not_finite(f"the loss is not finite at iteration {t} (total {total}, dice {dice}, mutual {mutual}", names)
            row = LogRow(t, total, dice, mutual, weight, rate, seconds)
            rows.append(_with_statistics(row, statistics, self.config.classes) if statistics else row)
        for warning in self.monitor.look(rows):
            if self.ranks.first:
                Progress.write(f"warning: {warning}", file=sys.stderr)
        return rows

    def _check_weights(self, t: int, names: list[str]) -> None:
        """Check the weights, which can become non-finite while the loss is finite; such weights must not be saved."""
        state = {name: value for name, value in self.network.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
        bad = [name for name, good in zip(state, finite, strict=True) if not good]
        if bad:
            self._not_finite(f"{len(bad)} of {len(state)} weights are not finite after iteration {t} ({bad[0]}", names)

    def _not_finite(self, what: str, names: list[str]) -> NoReturn:
        """Raise an error, on every rank, since all have the same loss and weights."""
        if not self.ranks.first:
            raise SystemExit(2)
        kept = f"the last good checkpoint is {self.out / LAST}" if (self.out / LAST).is_file() else "no checkpoint yet"
        raise UserError(
            f"{what}; cases {', '.join(names)}); {kept}; lower learning_rate, or check the data with `rplib data check`."
        )

    def _consistency_weight(self, t: int) -> float:
        config = self.config
        if self.ramp_from is None or t <= self.ramp_from:
            return 0.0
        return config.consistency * rplib.ramp(t - self.ramp_from, config.ramp_length, config.ramp_every)

    @property
    def scored(self) -> nn.Module:
        """The network that is validated and saved as final: the averaged one if there is one."""
        return self.network if self.averaged is None else self.averaged.module

    def _set_learning_rate(self, t: int) -> float:
        rate, done = self.config.learning_rate, (t - 1) / self.config.iterations
        if self.config.schedule == "polynomial":
            rate *= (1 - done) ** 0.9
        elif self.config.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * done)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def _validates_at(self, t: int) -> bool:
        if not self.validation:
            return False
        on_schedule = t >= self.config.validate_from and t % self.config.validate_every == 0
        return on_schedule or (self.config.protocol == "held-out" and t == self.config.iterations)

    def _validate(self, t: int) -> float:
        """Mean decoder-1 Dice over the validation cases; saves the weights if they are the best so far."""
        network = self.scored.eval()
        mine = self.validation[self.ranks.rank :: self.ranks.size]
        found = self.ranks.gather(case_dice(network, mine, self.config, self.device))
        network.train()
        # Restore list order, so that the sum does not depend on the number of ranks.
        scores = [found[i % self.ranks.size][i // self.ranks.size] for i in range(len(self.validation))]
        there = [score for score in scores if not math.isnan(score)]
        mean = float(np.mean(there)) if there else math.nan  # NaN: no case contains a class
        if mean > self.best_score:
            self.best_score, self.best_iteration = mean, t
            self._save_best(t, f"best mean decoder-1 Dice on {self._validated_on()}", mean)
        return mean

    def _validated_on(self) -> str:
        if self.config.protocol == "paper":
            return f"the {_paper_list(self.config)} list"
        return f"{len(self.validation)} validation cases"

    def _save(self, t: int) -> None:
        random = self.ranks.gather(_random_state(self.device))
        content = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "batches": self.feed.state(),
            "torch_random": random[0][0],
            "cuda_random": random[0][1],
            "other_ranks_random": random[1:],
            "iteration": t,
            "best_score": self.best_score,
            "best_iteration": self.best_iteration,
            "ramp_from": self.ramp_from,
            "cases": self.case_names,
            "config": self.config.to_toml(),
        }
        if self.averaged is not None:
            content["averaged"] = self.averaged.module.state_dict()
            content["averaged_updates"] = int(self.averaged.n_averaged)
        self._write(LAST, content)

    def _restore(self, saved: dict[str, Any], batches: TwoStreamBatches) -> None:
        self.optimiser.load_state_dict(saved["optimiser"])
        if self.averaged is not None:
            checkpoint.load_weights(cast(MutualVNet, self.averaged.module), saved["averaged"], self.out / LAST)
            self.averaged.n_averaged.fill_(saved["averaged_updates"])
        batches.restore(saved["batches"])
        self.done = saved["iteration"]
        self.best_score, self.best_iteration = saved["best_score"], saved["best_iteration"]
        self.ramp_from = saved.get("ramp_from", self.config.warmup)
        others = saved.get("other_ranks_random", [])
        if self.ranks.rank > len(others):  # more ranks than before
            torch.manual_seed(_seed(self.config.seed, self.ranks.rank, self.done))
            return
        cpu, cuda = [(saved["torch_random"], saved["cuda_random"]), *others][self.ranks.rank]
        torch.set_rng_state(cpu)
        if self.device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)

    def _save_best(self, t: int, chosen_by: str, score: float | None) -> None:
        content = {"network": self.scored.state_dict(), "iteration": t, "chosen_by": chosen_by, "score": score}
        self._write(BEST, {**content, "config": self.config.to_toml()})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Save a checkpoint on rank 0; a write error ends all ranks."""
        with self.ranks.together():
            if self.ranks.first:
                with self._disk():
                    checkpoint.save(self.out / name, content)

    def _write_rows(self, rows: list[LogRow]) -> None:
        if self.log is not None:
            with self._disk():
                self.log.add(rows)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            last = self.out / LAST
            kept = f"iteration {checkpoint.load(last)['iteration']} is kept in {last}" if last.is_file() else "no checkpoint yet"
            raise UserError(
                f"the run folder {self.out} can no longer be written ({error.strerror or error}); {kept}; free space and "
                f"resume with: rplib train --resume --out {self.out}"
            ) from error

    def _finish(self, seconds: float) -> Path:
        t, config = self.config.iterations, self.config
        if not self.best_iteration:
            if self.validation and self.ranks.first:
                print("no validation gave a Dice above 0: best.pt contains the last weights", file=sys.stderr)
            averaged = "" if self.averaged is None else ", averaged weights"
            self._save_best(t, f"last iteration{averaged}", None)
            final = f"best.pt: iteration {t}, the last{averaged}"
        else:
            where = self._validated_on().replace("the test list", "the TEST list")
            final = f"best.pt: iteration {self.best_iteration}, Dice {self.best_score:.4f} on {where}"
        if not self.ranks.first:
            return self.out / BEST
        with self._disk():
            write_curves(self.out)
        where = str(self.device) if self.ranks.size == 1 else f"{self.ranks.size} processes ({self.device.type})"
        print(f"{config.name}: {t - self.done} iterations in {seconds:.0f} s on {where}; {final}; protocol '{config.protocol}'")
        print(f"next: rplib evaluate {self.out} --data DIR")
        return self.out / BEST


def _read_cases(config: Config, data: Path, ranks: Ranks) -> tuple[list[Case], list[Case], list[Case]]:
    """Labelled, unlabelled and validation cases, in memory. The test list is read only under `paper`."""
    dataset = open_for(config, data)
    for remark in dataset.remarks() if ranks.first else []:
        print(remark, file=sys.stderr)
    names = split_training(dataset, config)
    labelled = load_cases(dataset, names.labelled, True, "labelled cases")
    validation = load_cases(dataset, names.validation, True, "validation cases")
    # Any labels they have are dropped immediately, so that training cannot use them.
    found = load_cases(dataset, names.unlabelled, False, "unlabelled cases")
    unlabelled = [case._replace(label=None) for case in found]
    if config.protocol == "paper":
        validation = load_cases(dataset, dataset.names(dataset.paper_split), True, f"{dataset.paper_split} cases")
    return labelled, unlabelled, validation


def _class_shares(labelled: Sequence[Case], classes: int) -> list[float]:
    """Share of each class among the labelled voxels."""
    labels = [np.ravel(case.label).astype(np.int64) for case in labelled if case.label is not None]
    counts = np.sum([np.bincount(label, minlength=classes) for label in labels], axis=0)
    return [float(count) for count in counts / counts.sum()]


def _with_statistics(row: LogRow, statistics: list[float], classes: int) -> LogRow:
    """The fields of `rplib.ObjectiveStatistics` of two decoders, flattened; pairs are (student 1, teacher 2), (2, 1)."""
    by_2, by_1, weight_2, weight_1, _, _, *shares, disagreement = statistics
    taught = by_1 + by_2
    return row._replace(
        taught_by_1=by_1,
        taught_by_2=by_2,
        mean_weight=(by_1 * weight_1 + by_2 * weight_2) / taught if taught else 0.0,
        disagreement=disagreement,
        pseudo_labels=(tuple(shares[:classes]), tuple(shares[classes:])),
    )


def _paper_list(config: Config) -> str:
    """The list for weight selection under `paper`: ``"test"``, for BraTS ``"val"``."""
    return LAYOUTS[config.dataset].paper_split


def _cache(config: Config, cases: Sequence[Case], device: torch.device) -> torch.device | None:
    """Where volumes are stored and cropped: on the device, or in RAM (None)."""
    if config.cache != "auto":
        return device if config.cache == "device" else None
    if device.type != "cuda":
        return None
    size = sum(case.image.nbytes + (0 if case.label is None else case.label.nbytes) for case in cases)
    return device if size <= _DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory else None


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _seed(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 cannot shift a uint64 by an int


def _try_objective(config: Config, device: torch.device) -> None:
    """Call the loss on a few voxels, so that an unusable `impl` is reported before data is read."""
    dtype = torch.bfloat16 if config.amp == "bfloat16" else torch.float32
    size = [4] * len(config.patch)
    logits = [torch.zeros(1, config.classes, *size, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    features = [torch.zeros(1, config.filters, *size, device=device, dtype=dtype) for _ in range(2)]
    try:
        build_objective(config)(logits, features, torch.zeros(1, *size, dtype=torch.uint8, device=device), 1.0)
    except (ValueError, TypeError) as error:
        raise UserError(f"impl={config.impl}: {error}") from error
