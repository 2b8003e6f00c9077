"""The training loop, its checkpoints and its resumption."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import rplib
from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.batches import TwoStreamBatches
from rplib.reference.checkpoint import BEST, CONFIG, LAST
from rplib.reference.config import Config
from rplib.reference.datasets import LAYOUTS, Case, load_cases, open_for, split_training
from rplib.reference.runlog import Row, RunLog, read_sessions, record_session, write_curves
from rplib.reference.step import training_step

PAPER_WARNING = (
    "protocol 'paper': the weights are chosen on the {} list, as the published numbers were. "
    "Scores of this run are optimistic; compare them only with numbers chosen in the same way."
)


def train(
    config: Config,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    device: str | torch.device | None = None,
    deterministic: bool = False,
) -> Path:
    """Train one network and fill its run folder.

    Args:
        config: all settings.
        data: folder of the data set.
        out: run folder; new or empty unless ``resume``.
        resume: go on from ``out/last.pt`` (from the beginning where no checkpoint was written yet). On a CPU with the
            same number of threads every number is the same, to the last bit, as without the interruption.
        device: where to train; None is cuda where there is one, else cpu.
        deterministic: deterministic algorithms on the GPU too.

    Returns:
        Path of best.pt: the weights that the protocol declares final.

    Raises:
        UserError: a folder, list, case, checkpoint or setting that does not fit, or a loss that is not finite.
    """
    device = find_device(device)
    if device.type == "cpu" and config.amp != "off":
        # Seen with torch 2.13 on x86-64: the weight gradient of a 3x3x3 convolution over 2x2x2 voxels (the deepest block
        # of a 32-voxel patch) holds uninitialised memory, now and then NaN.
        raise UserError(
            f"amp={config.amp} on a CPU: PyTorch's bfloat16 convolutions give wrong gradients on small volumes there; "
            "set amp=off."
        )
    _prepare_folder(out, resume)
    with _numerics(device, deterministic):
        trainer = _Trainer(config, data, out, device, deterministic, resume)
        return trainer.run()


def find_device(device: str | torch.device | None) -> torch.device:
    """A device that works on this machine; None is cuda where there is one, else cpu.

    Raises:
        UserError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except Exception as error:  # torch raises RuntimeError, AssertionError, NotImplementedError, by device and build
        reason = str(error).strip().splitlines()[0][:120]
        raise UserError(f"--device {device} does not work on this machine ({reason}); use cpu, or leave it out.") from error
    return found


class _Trainer:
    def __init__(self, config: Config, data: Path, out: Path, device: torch.device, deterministic: bool, resume: bool) -> None:
        self.config, self.out, self.device = config, out, device
        self.objective = rplib.MutualObjective(**config.loss_keywords)
        _try_objective(self.objective, config, device)
        saved = checkpoint.load(out / LAST) if resume and (out / LAST).is_file() else None
        labelled, unlabelled, self.validation = _read_cases(config, data)

        torch.manual_seed(config.seed)
        self.network = checkpoint.build_network(config)
        self.batches = TwoStreamBatches(labelled, unlabelled, config)
        self.case_names = [case.name for case in (*labelled, *unlabelled, *self.validation)]
        self.done, self.best_score, self.best_iteration = 0, 0.0, 0
        if saved is not None:
            _check_checkpoint(saved, self.case_names, config, out / LAST)
            checkpoint.load_weights(self.network, saved["network"], out / LAST)
        last = torch.channels_last_3d if len(config.patch) == 3 else torch.channels_last
        self.memory_format = last if config.channels_last else torch.contiguous_format
        self.network.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
        if saved is not None:
            self._restore(saved)

        if saved is not None:
            _warn_of_other_bits(out, device)
        checkpoint.write_text_atomically(out / CONFIG, config.to_toml())
        record_session(out, device, data, self.done, deterministic)
        self.log = RunLog(out, self.done)

    def run(self) -> Path:
        config, began = self.config, time.monotonic()
        if config.protocol == "paper":
            print(PAPER_WARNING.format(_paper_list(config).upper()), file=sys.stderr)
        pending: list[tuple[int, float, float, list[str], tuple[Tensor, Tensor, Tensor]]] = []
        autocast = torch.bfloat16 if config.amp == "bfloat16" else None
        self.network.train()
        window_began = time.monotonic()
        progress = tqdm(
            range(self.done + 1, config.iterations + 1),
            initial=self.done,
            total=config.iterations,
            unit="it",
            desc=config.name,
            mininterval=1.0,
            smoothing=0.05,
        )
        with progress, contextlib.closing(self.log):
            for t in progress:
                batch = self.batches.next()
                weight = config.consistency * rplib.ramp(t, config.ramp_length, config.ramp_every)
                rate = self._set_learning_rate(t)
                images = batch.images.to(self.device, memory_format=self.memory_format)
                terms = training_step(
                    self.network, self.objective, self.optimiser, images, batch.labels.to(self.device), weight, autocast
                )
                pending.append((t, weight, rate, batch.names, terms))

                validating, saving = self._validates_at(t), t % config.checkpoint_every == 0 or t == config.iterations
                if not (validating or saving or t % config.log_every == 0):
                    continue
                rows = self._look_at(pending, window_began)
                if validating:
                    rows[-1] = rows[-1]._replace(validation_dice=self._validate(t))
                self.log.add(rows)
                progress.set_postfix_str(f"dice {rows[-1].dice:.4f} mutual {rows[-1].mutual:.4f}", refresh=False)
                if saving:
                    self._save(t)
                pending.clear()
                window_began = time.monotonic()
        return self._finish(time.monotonic() - began)

    def _look_at(self, pending: list[Any], window_began: float) -> list[Row]:
        """The collected losses as rows: the one place where training waits for the device."""
        losses = torch.stack([torch.stack([x.double() for x in terms]) for *_, terms in pending]).tolist()
        seconds = (time.monotonic() - window_began) / len(pending)
        rows: list[Row] = []
        for (t, weight, rate, names, _), values in zip(pending, losses, strict=True):
            if not all(map(math.isfinite, values)):
                self.log.add(rows)
                kept = f"the last good checkpoint is {self.out / LAST}" if (self.out / LAST).is_file() else "no checkpoint yet"
                raise UserError(
                    f"the loss is not finite at iteration {t} (total {values[0]}, dice {values[1]}, mutual "
                    f"{values[2]}; cases {', '.join(names)}); {kept}; lower learning_rate, or look at the data "
                    "with `rplib data check`."
                )
            total, dice, mutual = values
            rows.append(Row(t, total, dice, mutual, weight, rate, seconds))
        return rows

    def _set_learning_rate(self, t: int) -> float:
        rate = self.config.learning_rate
        if self.config.schedule == "polynomial":
            rate *= (1 - (t - 1) / self.config.iterations) ** 0.9
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def _validates_at(self, t: int) -> bool:
        if not self.validation:
            return False
        on_schedule = t >= self.config.validate_from and t % self.config.validate_every == 0
        return on_schedule or (self.config.protocol == "held-out" and t == self.config.iterations)

    def _validate(self, t: int) -> float:
        """Mean decoder-1 Dice over the validation cases; keeps the weights if they are the best so far."""
        self.network.eval()
        mean = mean_dice(self.network, self.validation, self.config, self.device)
        self.network.train()
        if mean > self.best_score:
            self.best_score, self.best_iteration = mean, t
            on = self._validated_on()
            self._save_best(t, f"best mean decoder-1 Dice on {on}", mean)
        return mean

    def _validated_on(self) -> str:
        if self.config.protocol == "paper":
            return f"the {_paper_list(self.config)} list"
        return f"{len(self.validation)} validation cases"

    def _save(self, t: int) -> None:
        on_gpu = self.device.type == "cuda"
        checkpoint.save(
            self.out / LAST,
            {
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "batches": self.batches.state(),
                "torch_random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state(self.device) if on_gpu else None,
                "iteration": t,
                "best_score": self.best_score,
                "best_iteration": self.best_iteration,
                "cases": self.case_names,
                "config": self.config.to_toml(),
            },
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(saved["optimiser"])
        self.batches.restore(saved["batches"])
        torch.set_rng_state(saved["torch_random"])
        if self.device.type == "cuda" and saved["cuda_random"] is not None:
            torch.cuda.set_rng_state(saved["cuda_random"], self.device)
        self.done = saved["iteration"]
        self.best_score, self.best_iteration = saved["best_score"], saved["best_iteration"]

    def _save_best(self, t: int, chosen_by: str, score: float | None) -> None:
        content = {"network": self.network.state_dict(), "iteration": t, "chosen_by": chosen_by, "score": score}
        checkpoint.save(self.out / BEST, {**content, "config": self.config.to_toml()})

    def _finish(self, seconds: float) -> Path:
        t, config = self.config.iterations, self.config
        if not self.best_iteration:
            if self.validation:
                print("no validation gave a Dice above 0: best.pt holds the last weights", file=sys.stderr)
            self._save_best(t, "last iteration", None)
            final = f"best.pt: iteration {t}, the last"
        else:
            where = self._validated_on().replace("the test list", "the TEST list")
            final = f"best.pt: iteration {self.best_iteration}, Dice {self.best_score:.4f} on {where}"
        write_curves(self.out)
        print(
            f"{config.name}: {t - self.done} iterations in {seconds:.0f} s on {self.device}; {final}; "
            f"protocol '{config.protocol}'"
        )
        print(f"next: rplib evaluate {self.out} --data DIR")
        return self.out / BEST


def mean_dice(network: nn.Module, cases: Sequence[Case], config: Config, device: torch.device) -> float:
    """Mean over cases of the decoder-1 Dice (over the foreground classes, in turn); an empty prediction counts 0."""
    from rplib.reference.inference import segment

    scores = []
    for case in tqdm(cases, desc="validating", unit="case", leave=False):
        found = segment(network, case.image, config.patch, config.stride, batch=config.window_batch, device=device).label
        assert case.label is not None
        for c in range(1, config.classes):
            ours, truth = found == c, case.label == c
            overlap = np.count_nonzero(ours & truth)
            scores.append(2 * overlap / (np.count_nonzero(ours) + np.count_nonzero(truth)) if ours.any() else 0.0)
    return float(np.mean(scores))


def _read_cases(config: Config, data: Path) -> tuple[list[Case], list[Case], list[Case]]:
    """Labelled, unlabelled and validation cases, in memory. The test list is touched under `paper` only."""
    dataset = open_for(config, data)
    for remark in dataset.remarks():
        print(remark, file=sys.stderr)
    names = split_training(dataset, config)
    labelled = load_cases(dataset, names.labelled, True, "labelled cases")
    validation = load_cases(dataset, names.validation, True, "validation cases")
    # Their labels, where they have any, are dropped at once: nothing of the training can see them.
    found = load_cases(dataset, names.unlabelled, False, "unlabelled cases")
    unlabelled = [case._replace(label=None) for case in found]
    if config.protocol == "paper":
        validation = load_cases(dataset, dataset.names(dataset.paper_split), True, f"{dataset.paper_split} cases")
    return labelled, unlabelled, validation


def _paper_list(config: Config) -> str:
    """What the weights are chosen on under `paper`: ``"test"``, for BraTS ``"val"``."""
    return LAYOUTS[config.dataset].paper_split


def _try_objective(objective: rplib.MutualObjective, config: Config, device: torch.device) -> None:
    """Calls the loss on a few voxels, so that an impossible `impl` is told before the data is read."""
    dtype = torch.bfloat16 if config.amp == "bfloat16" else torch.float32
    size = [4] * len(config.patch)
    logits = [torch.zeros(1, config.classes, *size, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    features = [torch.zeros(1, config.filters, *size, device=device, dtype=dtype) for _ in range(2)]
    try:
        objective(logits, features, torch.zeros(1, *size, dtype=torch.uint8, device=device), 1.0)
    except (ValueError, TypeError) as error:
        raise UserError(f"impl={config.impl}: {error}") from error


def _prepare_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise UserError(f"--out {out} is not empty; choose another folder, or go on with its run by --resume.")
        if not (out / CONFIG).is_file() and not (out / LAST).is_file():
            strangers = [path.name for path in out.iterdir() if not path.name.startswith(".")]
            if strangers:
                raise UserError(f"{out} is no run folder (it lacks {CONFIG}); choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_leftovers(out)


def _check_checkpoint(saved: dict[str, Any], case_names: list[str], config: Config, path: Path) -> None:
    needed = {
        "network",
        "optimiser",
        "batches",
        "torch_random",
        "cuda_random",
        "iteration",
        "best_score",
        "best_iteration",
        "cases",
    }
    if not needed <= saved.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(needed - saved.keys()))}; it cannot be resumed from.")
    if saved["cases"] != case_names:
        raise UserError(f"{path} was trained on other cases than the lists name now; give --data of the original data set.")
    if saved["iteration"] > config.iterations:
        raise UserError(f"{path} is at iteration {saved['iteration']}, past iterations={config.iterations}; raise iterations.")


def _warn_of_other_bits(out: Path, device: torch.device) -> None:
    now = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    before = (read_sessions(out) or [now])[-1]
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"resumed under other conditions ({', '.join(changed)}): the last bits may differ", file=sys.stderr)


@contextlib.contextmanager
def _numerics(device: torch.device, deterministic: bool) -> Iterator[None]:
    """cuDNN's search for fast algorithms, or deterministic ones; put back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
