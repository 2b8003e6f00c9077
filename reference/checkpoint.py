"""Checkpoints, written atomically, and the networks in them.

A checkpoint is a zip archive with a CRC-32 of every record, which PyTorch writes but does not verify; `load` does.
"""

import zipfile
from pathlib import Path
from typing import Any, Literal

import torch

from rplib.errors import UserError, brief_reason, is_out_of_memory, printable
from rplib.reference.config import Config, load_config, load_recipe, parse
from rplib.reference.files import naming, write_atomically
from rplib.reference.network import MutualVNet

LAST, BEST, CONFIG = "last.pt", "best.pt", "config.toml"
PREVIOUS = "last.previous.pt"  # the checkpoint before last.pt, kept in case last.pt is damaged


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically. It contains only tensors, numbers, text, lists and dicts.

    An existing last.pt becomes last.previous.pt.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        write_atomically(path, lambda file: torch.save(content, file), path.with_name(PREVIOUS) if path.name == LAST else None)
    except RuntimeError as error:
        # torch.save closes its archive even after a failed write; closing then fails too and hides the first error.
        if isinstance(error.__context__, OSError):
            with naming(path):
                raise error.__context__ from None
        raise


Weights = Literal["best", "last", "averaged"]


def load(path: Path) -> dict[str, Any]:
    """Verify the checksums of a checkpoint and read it onto the CPU, with ``weights_only=True``.

    Raises:
        UserError: the file is missing, truncated, damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        if is_out_of_memory(error):
            raise UserError(f"{path} does not fit into memory ({brief_reason(error)}).") from error
        raise UserError(f"{path} is not a readable checkpoint ({brief_reason(error)}); {_instead_of(path)}.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kind = "dict with keys other than text" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} contains a {kind}; expected a checkpoint of `rplib train` or a state dict.")
    return content


def _check_sums(path: Path) -> None:
    """Verify the checksums: torch.load would read a flipped bit without noticing."""
    if not zipfile.is_zipfile(path):
        return  # damaged, or written by PyTorch before 1.6 without checksums: torch.load reports it
    with zipfile.ZipFile(path) as archive:
        sizes = sum(entry.file_size for entry in archive.infolist())
        if sizes > path.stat().st_size:  # PyTorch compresses nothing
            raise ValueError(f"its records declare {sizes} bytes, more than the file has")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong: the file is damaged")


def _instead_of(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name == LAST and previous.is_file():
        return f"the previous checkpoint is kept: replace it with {previous}"
    if path.name == BEST and path.with_name(LAST).is_file():
        return "use the last one instead (--weights last), or train again"
    return "use another one or train again"


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
            raise UserError(f"{run} has no {path.name}; expected a run folder of `rplib train` with a saved checkpoint.")
    else:
        path = run
    content = load(path)
    if which == "averaged" and "averaged" not in content:
        raise UserError(f"{path} has no averaged weights; train with average=0.99, or use --weights best or last.")
    if "network" in content:
        weights, settings = content["averaged" if which == "averaged" else "network"], content.get("config")
        if not isinstance(weights, dict) or not (run.is_dir() or isinstance(settings, str)):
            missing = "settings ('config')" if isinstance(weights, dict) else "weights ('network')"
            raise UserError(f"{path} lacks its {missing}; expected a checkpoint of `rplib train`: {_instead_of(path)}.")
        config = load_config(run / CONFIG) if run.is_dir() else parse(str(settings), str(path))
    else:
        weights = {key.removeprefix("module."): value for key, value in content.items()}
        config = _config_of(weights, path)
    network = build_network(config)
    load_weights(network, weights, path)
    return network.eval(), config


def build_network(config: Config) -> MutualVNet:
    """The untrained network of a configuration; draws its weights from torch's global generator."""
    return MutualVNet(
        config.in_channels, config.classes, config.filters, config.dropout, dims=config.network_dims, norm=config.norm
    )


def load_weights(network: MutualVNet, weights: dict[str, Any], path: Path) -> None:
    """Load a state dict into a network.

    Raises:
        UserError: keys or shapes do not match.
    """
    try:
        network.load_state_dict(weights)
    except Exception as error:  # missing keys, other shapes, keys that are not text, values that are not tensors
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"the weights in {path} do not fit the network: {' '.join(lines[1:2] or lines[:1])[:200]}") from error
    bad = [key for key, value in network.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{path}: {len(bad)} weights are NaN or infinite (for example {bad[0]}); {_instead_of(path)}.")


def _config_of(weights: dict[str, Any], path: Path) -> Config:
    first, last = weights.get("encoder.block_one.conv.0.weight"), weights.get("decoder1.out_conv.weight")
    tensors = [value for value in (first, last) if isinstance(value, torch.Tensor)]
    if len(tensors) < 2 or min(tensor.ndim for tensor in tensors) < 4:
        raise UserError(f"{path} is neither a checkpoint of `rplib train` nor a state dict of the authors' mine3d_v1.")
    first, last = tensors
    recipe, dims = load_recipe("la-8"), first.ndim - 2
    return recipe.replace(
        name=printable(path.stem)[:100],
        filters=first.shape[0],
        in_channels=first.shape[1],
        classes=last.shape[0],
        norm="batch" if "encoder.block_one.conv.1.running_mean" in weights else "instance",
        patch=recipe.patch[:dims],
        stride=recipe.stride[:dims],
    )
