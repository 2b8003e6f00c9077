"""Checkpoints, written atomically, and the networks in them."""

from pathlib import Path
from typing import Any, Literal

import torch

from rplib.errors import UserError
from rplib.reference.config import Config, load_config, load_recipe, parse
from rplib.reference.files import write_atomically
from rplib.reference.network import MutualVNet

LAST, BEST, CONFIG = "last.pt", "best.pt", "config.toml"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically. It holds tensors, numbers, text, lists and dicts only.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError as error:
        # torch.save closes its archive even after a failed write, which fails in turn and hides the first error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


Weights = Literal["best", "last", "averaged"]


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with ``weights_only=True``.

    Raises:
        UserError: the file is missing, truncated, damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint ({reason}); use another checkpoint or train again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a checkpoint of `rplib train` or a state dict.")
    return content


def load_network(run: str | Path, which: Weights | None = None) -> tuple[MutualVNet, Config]:
    """The network of a run, in evaluation mode on the CPU, and its settings.

    Args:
        run: a run folder, one of its checkpoints, or a state dict of the authors' `mine3d_v1` (the network's
            size is then inferred from the weights; other settings are those of the recipe la-8).
        which: ``"best"``, ``"last"`` or ``"averaged"`` (in last.pt); None loads best.pt if it exists, else last.pt.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or weights that do not fit the network.
    """
    run = Path(run)
    if run.is_dir():
        by_default = BEST if (run / BEST).is_file() else LAST
        path = run / {"best": BEST, "last": LAST, "averaged": LAST, None: by_default}[which]
        if not path.is_file():
            raise UserError(f"{run} holds no {path.name}; expected a run folder of `rplib train` with a saved checkpoint.")
    else:
        path = run
    content = load(path)
    if which == "averaged" and "averaged" not in content:
        raise UserError(f"{path} holds no averaged weights; train with average=0.99, or take --weights best or last.")
    if "network" in content:
        weights = content["averaged" if which == "averaged" else "network"]
        config = load_config(run / CONFIG) if run.is_dir() else parse(content["config"], str(path))
    else:
        weights = {key.removeprefix("module."): value for key, value in content.items()}
        config = _config_of(weights, path)
    network = build_network(config)
    load_weights(network, weights, path)
    return network.eval(), config


def build_network(config: Config) -> MutualVNet:
    """The untrained network of a configuration; draws its weights from torch's global generator."""
    return MutualVNet(config.in_channels, config.classes, config.filters, config.dropout, len(config.patch))


def load_weights(network: MutualVNet, weights: dict[str, Any], path: Path) -> None:
    """Load a state dict into a network.

    Raises:
        UserError: keys or shapes do not match.
    """
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"the weights in {path} do not fit the network: {' '.join(lines[1:2])[:200]}") from error


def _config_of(weights: dict[str, Any], path: Path) -> Config:
    first, last = weights.get("encoder.block_one.conv.0.weight"), weights.get("decoder1.out_conv.weight")
    if not isinstance(first, torch.Tensor) or not isinstance(last, torch.Tensor):
        raise UserError(f"{path} is neither a checkpoint of `rplib train` nor a state dict of the authors' mine3d_v1.")
    recipe, dims = load_recipe("la-8"), first.ndim - 2
    return recipe.replace(
        name=path.stem,
        filters=first.shape[0],
        in_channels=first.shape[1],
        classes=last.shape[0],
        patch=recipe.patch[:dims],
        stride=recipe.stride[:dims],
    )
