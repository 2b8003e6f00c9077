"""Comparison of a semi-supervised training with labelled-only training at its end: the result, or the command to get it."""

from pathlib import Path

from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.checkpoint import BEST, CONFIG
from rplib.reference.config import Config, differences, load_config, load_recipe, recipe_names

# Settings in which a baseline may differ from its run: they act only on unlabelled samples, or do not affect results.
_MUTUAL = {"batch_size", "labelled_per_batch", "consistency", "warmup", "ramp_length", "ramp_every", "method", "confidence"}
_MUTUAL |= {"temperature", "cross_entropy_on"}
_SAME = {"name", "cache", "checkpoint_every", "log_every", "window_batch", "impl"}
_SUPERVISED = "-supervised"


def beside_labelled_only(config: Config, out: Path, data: Path, recipe: str | None = None) -> str:
    """One or two sentences for the end of a training; empty for labelled-only training.

    Args:
        recipe: the name given on the command line; None uses the name in the settings.
    """
    if config.labelled_only or not config.consistency:
        return ""
    baseline = find_baseline(config, out)
    if baseline is None:
        return (
            "To see whether the unlabelled images helped, compare with labelled-only training; start it with: "
            f"{_command(config, out, data, recipe or config.name)}"
        )
    ours, theirs = _score(out), _score(baseline)
    compare = f"rplib compare {baseline} {out}"
    if ours is None or theirs is None:
        return f"Labelled-only training is in {baseline}; evaluate both, then compare them with: {compare}"
    gap = 100 * (ours - theirs)
    verdict = (
        f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'} labelled-only"
        if abs(gap) >= 0.05
        else "level with labelled-only"
    )
    advice = "" if gap >= 0 else " Lower consistency, or use the labelled-only run."
    return (
        f"On {config.validation} validation case{'s' * (config.validation > 1)} its Dice of {100 * ours:.1f} % is {verdict} "
        f"({100 * theirs:.1f} %, {baseline}).{advice} On the test cases: {compare}"
    )


def find_baseline(config: Config, out: Path) -> Path | None:
    """The finished labelled-only run next to `out` with the same seed and settings, or None."""
    for path in sorted(out.resolve().parent.glob(f"*/{CONFIG}")):
        try:
            other = load_config(path)
        except UserError:
            continue  # not one of ours
        if not other.labelled_only or other.labelled_per_batch != config.labelled_per_batch or not (path.parent / BEST).is_file():
            continue
        if set(differences(config, other)) <= _MUTUAL | _SAME:
            return out.parent / path.parent.name
    return None


def _score(run: Path) -> float | None:
    """Best validation Dice; None without a validation."""
    score = checkpoint.load(run / BEST).get("score")
    return None if score is None else float(score)


def _command(config: Config, out: Path, data: Path, recipe: str) -> str:
    name = Path(recipe).stem
    arguments = ["rplib train --recipe"]
    if f"{name}{_SUPERVISED}" in recipe_names() and Path(recipe).suffix != ".toml":
        base = load_recipe(f"{name}{_SUPERVISED}")
        arguments.append(f"{name}{_SUPERVISED}")
        changed = [key for key in differences(base, config) if key not in _MUTUAL | {"name"}]
        if base.batch_size != config.labelled_per_batch:
            changed = [*changed, "batch_size", "labelled_per_batch"]
    else:
        arguments.append(f"{out / CONFIG}")
        changed = ["batch_size", "consistency"]
    settings = [f"{key}={_value(key, config)}" for key in changed]
    tail = f" --set {' '.join(settings)}" if settings else ""
    return f"{' '.join(arguments)} --data {data} --out {out}{_SUPERVISED}{tail}"


def _value(key: str, config: Config) -> str:
    if key in ("batch_size", "labelled_per_batch"):
        return str(config.labelled_per_batch)
    if key == "consistency":
        return "0"
    value = getattr(config, key)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
