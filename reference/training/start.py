"""`rplib train` from its options to the training: settings, data, and what may change on resumption."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rplib.errors import Terminated, UserError, is_out_of_memory
from rplib.reference.checkpoint import CONFIG, LAST
from rplib.reference.config import Config, differences, load_config, load_recipe, parse
from rplib.reference.devices import find_device
from rplib.reference.reporting.run_log import read_sessions
from rplib.reference.training.beside_labels import beside_labelled_only
from rplib.reference.training.distributed import joined, own_device, started_by_torchrun
from rplib.reference.training.trainer import train

# Settings that may change on resumption: they do not affect the results of an iteration.
FREE_ON_RESUME = {"iterations", "checkpoint_every", "log_every", "cache"}


def start(
    recipe: str | None,
    data: Path | None,
    out: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
    deterministic: bool = False,
) -> None:
    """`rplib train`: resolves settings, data, device and, under torchrun, the other ranks, then trains.

    Raises:
        UserError: invalid settings, data or folder.
    """
    where = find_device(own_device(device))
    with joined(where) as ranks:
        found = None
        with ranks.together():
            if ranks.first:
                found = _settings(recipe, data, out, overrides, resume)
        settings = ranks.from_first(found)
        assert settings is not None
        config, data, was_deterministic = settings
        try:
            train(config, data, out, resume=resume, device=where, deterministic=deterministic or was_deterministic, ranks=ranks)
            if ranks.first and (message := beside_labelled_only(config, out, data, recipe)):
                print(message)
        except KeyboardInterrupt as error:
            if ranks.first:
                kept = f" after {error}, saved in {out / LAST}" if isinstance(error, Terminated) and error.args else ""
                print(f"stopped{kept}; resume with: rplib train --resume --out {out}", file=sys.stderr)
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error):
                raise UserError(
                    f"{where} is out of memory with batch_size={config.batch_size}, patch={list(config.patch)}, "
                    f"filters={config.filters}; lower one of them{', set cache=ram or amp=bfloat16' * (where.type == 'cuda')}."
                ) from error
            # For example a missing compiler; matched by name to avoid importing the modules.
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = " ".join(str(error).partition("\n\n")[0].split())[:200]
            raise UserError(f"compile=true does not work on this machine ({reason}); set compile=false.") from error


def start_profile(
    recipe: str | None, data: Path | None, overrides: Sequence[str], device: str | None, steps: int, deterministic: bool
) -> None:
    """`rplib train --profile`: settings as for training; nothing is written.

    Raises:
        UserError: invalid settings, data or folder.
    """
    from rplib.reference.training.profiling import report

    if recipe is None or data is None or steps < 1:
        raise UserError("--profile needs --recipe, --data and at least 1 step: rplib train --recipe la-8 --data DIR --profile.")
    if started_by_torchrun():
        raise UserError("--profile runs in one process; start it without torchrun.")
    report(load_recipe(recipe, overrides), data, device, steps, deterministic)


def _settings(
    recipe: str | None, data: Path | None, out: Path, overrides: Sequence[str], resume: bool
) -> tuple[Config, Path, bool]:
    """All settings, the data folder, and whether the resumed run was deterministic."""
    saved = load_config(out / CONFIG) if resume and (out / CONFIG).is_file() else None
    if recipe is None and saved is None:
        missing = f"{out} has no run to resume" if resume else "--recipe is missing"
        raise UserError(f"{missing}; name a recipe, for example: rplib train --recipe la-8 --data DIR --out {out}.")
    if recipe is not None:
        config = load_recipe(recipe, overrides)
    else:
        assert saved is not None
        config = parse(saved.to_toml(), str(out / CONFIG), overrides)
    if saved is not None:
        _check_resumable(saved, config, out)
    sessions = read_sessions(out) if resume else []
    if data is None:
        if not sessions:
            raise UserError("--data is missing: give the folder of the data set.")
        data = Path(sessions[-1]["data"])
    return config, data, bool(sessions and sessions[-1].get("deterministic"))


def _check_resumable(saved: Config, wanted: Config, out: Path) -> None:
    free = FREE_ON_RESUME if saved.schedule == "constant" else FREE_ON_RESUME - {"iterations"}
    changed = [key for key in differences(saved, wanted) if key not in free]
    if changed:
        shown = ", ".join(f"{key} {getattr(saved, key)} -> {getattr(wanted, key)}" for key in changed[:3])
        raise UserError(
            f"--resume would change settings of {out}: {shown}; omit --recipe and --set (only "
            f"{', '.join(sorted(free))} may change), or train in a new folder."
        )
