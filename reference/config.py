"""Training settings: recipes, overrides, and the resolved `config.toml` of a run.

One flat table. The fields below are its keys. Their defaults are the paper's settings on the Left Atrium data, written out in
recipes/base.toml; a recipe names its base and what differs. Their comments appear in every config.toml and `--help-settings`.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from rplib.errors import UserError, brief_reason, is_out_of_memory, printable
from rplib.reference.files import has_control_characters

RECIPES = Path(__file__).resolve().parent / "recipes"
BASE = "base"  # recipes/base.toml: every key; also the key of a recipe file that names the recipe it builds on
DEPTH = 16  # the network halves each axis four times

# Far above useful values, and low enough that no number derived from a setting overflows.
_MOST_COUNT, _MOST_CHANNELS, _MOST_AXIS, _MOST_BATCH = 10**9, 4096, 4096, 4096
_MOST_NAME = 200  # characters

CACHES = ("auto", "device", "ram")
CONSISTENCY = "mutual-consistency"
# What each method leaves out of the paper's loss: which (the confidence), how (the weighting).
_LEAVES_OUT = {
    "both": (),
    "which-only": ("weighting",),
    "how-only": ("confidence",),
    "cross-pseudo-supervision": ("confidence", "weighting"),
    CONSISTENCY: ("confidence", "weighting"),
}
METHODS = tuple(_LEAVES_OUT)
# Settings of earlier versions: the value that can be ignored, and the replacement.
_RETIRED = {"weighting": ("similarity", "method=which-only for weight 1")}


def _key(
    default: Any,
    comment: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    section: str = "",
) -> Any:
    metadata = {
        "comment": comment,
        "least": least,
        "above": above,
        "most": most,
        "choices": choices,
        "section": section,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All settings of a run; checked on creation.

    Raises:
        UserError: a value of the wrong type, outside its range, or in conflict with another one.

    Example:
        >>> from rplib.reference.config import load_recipe
        >>> config = load_recipe("la-8", ["filters=4", "patch=32,32,32"])
        >>> config.labelled, config.filters, config.patch
        (8, 4, (32, 32, 32))
    """

    name: str = _key("la-8", "name of the recipe", section="recipe")

    dataset: str = _key(
        "left-atrium", "layout of the data set", choices=("left-atrium", "pancreas", "brats", "generic"), section="data"
    )
    normalisation: str = _key(
        "z-score",
        "'generic' only",
        choices=("z-score", "z-score-nonzero", "percentiles", "none"),
    )
    classes: int = _key(2, "background included", least=2, most=255)
    labelled: int = _key(
        8, "first N training cases; the rest are unlabelled. 0: every case that has a label", least=0, most=_MOST_COUNT
    )
    validation: int = _key(0, "last N labelled cases, held out for model selection", least=0, most=_MOST_COUNT)
    patch: tuple[int, ...] = _key(
        (112, 112, 80), "voxels; multiples of 16; two numbers for 2-D images; X,Y,1: slices of volumes", least=1, most=_MOST_AXIS
    )
    batch_size: int = _key(4, "labelled and unlabelled together", least=1, most=_MOST_BATCH)
    labelled_per_batch: int = _key(
        2, "equal to batch_size: labelled-only training; unlabelled cases are not read", least=1, most=_MOST_BATCH
    )
    augmentation: str = _key("mirror-rotate", "in the first two axes; 'none' crops only", choices=("mirror-rotate", "none"))
    crop_margin: int = _key(
        0, "voxels by which crops may extend beyond the image, where it is 0; for shifts if patch = image", least=0,
        most=_MOST_AXIS,
    )  # fmt: skip
    cache: str = _key("auto", "where volumes are kept; 'auto': on the GPU if they fit, else in RAM", choices=CACHES)

    in_channels: int = _key(1, "channels of the image", least=1, most=_MOST_CHANNELS, section="network")
    filters: int = _key(16, "channels at full resolution; 16 gives 12,347,716 parameters", least=1, most=_MOST_CHANNELS)
    dropout: float = _key(0.5, "after the deepest block and before each output convolution", least=0.0, most=0.99)
    norm: str = _key(
        "batch", "normalisation layers; 'instance': images of a batch share no statistics", choices=("batch", "instance")
    )

    dice_weight: float = _key(0.5, "factor of the sum of both decoders' supervised losses", least=0.0, section="objective")
    supervised: str = _key(
        "dice",
        "loss on the labels; 'dice+cross_entropy' is the mean of both",
        choices=("dice", "cross_entropy", "dice+cross_entropy"),
    )
    consistency: float = _key(1.0, "maximum weight of the mutual loss; 0: train on labels alone", least=0.0)
    warmup: int = _key(0, "iterations on labels alone before the ramp-up begins", least=0, most=_MOST_COUNT)
    await_classes: bool = _key(False, "the ramp-up begins only once both decoders predict every labelled class")
    ramp_length: int = _key(40, "steps of the ramp-up of that weight; 0: maximum from the start", least=0, most=_MOST_COUNT)
    ramp_every: int = _key(150, "iterations per step", least=1, most=_MOST_COUNT)
    method: str = _key("both", "the paper's loss, an ablation or an alternative; see training/README.md", choices=METHODS)
    confidence: str = _key("entropy", "how the networks' confidence is compared", choices=("entropy", "max_probability"))
    temperature: float = _key(0.1, "temperature of the sharpened probabilities; 'mutual-consistency' only", above=0.0)
    cross_entropy_on: str = _key(
        "logits", "'probabilities' is the authors' upload of January 2024", choices=("logits", "probabilities")
    )
    impl: str = _key("auto", "implementation of the loss", choices=("auto", "triton", "torch", "naive"))

    iterations: int = _key(15000, "optimiser steps", least=1, most=_MOST_COUNT, section="optimisation")
    learning_rate: float = _key(0.01, "of SGD", above=0.0)
    momentum: float = _key(0.9, "of SGD", least=0.0, most=0.9999)
    weight_decay: float = _key(0.0001, "of SGD", least=0.0)
    schedule: str = _key(
        "constant",
        "'polynomial': times (1 - t/iterations)^0.9; 'cosine': times (1 + cos(pi t/iterations))/2",
        choices=("constant", "polynomial", "cosine"),
    )
    average: float = _key(
        0.0, "decay of the weights' exponential moving average, which is then evaluated; 0: none", least=0.0, most=0.9999
    )
    seed: int = _key(1337, "for weights, dropout, order of cases, crops", least=0, most=2**63 - 1)
    amp: str = _key("off", "mixed precision of the network, on a GPU", choices=("off", "bfloat16"))
    tf32: bool = _key(True, "TensorFloat-32 convolutions on GPUs that support them (PyTorch's default)")
    channels_last: bool = _key(False, "memory layout; faster on most devices, results differ in the last bits")
    compile: bool = _key(False, "torch.compile the network; the first step takes about a minute")

    protocol: str = _key(
        "held-out",
        "'paper' selects weights on the TEST list, as the published numbers did",
        choices=("held-out", "paper"),
        section="evaluation",
    )
    validate_from: int = _key(800, "iteration of the first validation", least=1, most=_MOST_COUNT)
    validate_every: int = _key(200, "iterations", least=1, most=_MOST_COUNT)
    stride: tuple[int, ...] = _key((18, 18, 4), "of the sliding windows, voxels", least=1, most=_MOST_AXIS)
    window_batch: int = _key(4, "windows in one forward pass", least=1, most=_MOST_BATCH)

    checkpoint_every: int = _key(200, "iterations between writes of last.pt", least=1, most=_MOST_COUNT, section="run folder")
    log_every: int = _key(10, "iterations between logged losses (each synchronises the device once)", least=1, most=_MOST_COUNT)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        self._check_together()

    def _check_together(self) -> None:
        for axis in self.patch[:2] if self.slices else self.patch:
            if axis % DEPTH:
                raise UserError(
                    f"patch is {list(self.patch)}; each axis must be a multiple of {DEPTH}, or the last of three be 1 to train "
                    "on slices."
                )
        if len(self.stride) != len(self.patch):
            raise UserError(
                f"stride {list(self.stride)} and patch {list(self.patch)} have different numbers of axes; "
                "give both three numbers, or two for 2-D images."
            )
        if any(s > p for s, p in zip(self.stride, self.patch, strict=True)):
            raise UserError(
                f"stride {list(self.stride)} is larger than patch {list(self.patch)}; voxels between windows "
                "would be skipped; lower stride."
            )
        if self.labelled_per_batch > self.batch_size:
            raise UserError(
                f"labelled_per_batch={self.labelled_per_batch} exceeds batch_size={self.batch_size}; lower the former."
            )
        if self.validation >= self.labelled > 0:
            raise UserError(
                f"validation={self.validation} leaves none of the {self.labelled} labelled cases for training; "
                "lower validation or raise labelled."
            )
        if self.protocol == "paper" and self.validation:
            raise UserError(
                f"protocol 'paper' selects weights on the test list, so validation={self.validation} has no effect; "
                "set validation=0 or protocol=held-out."
            )
        if self.crop_margin and (self.protocol == "paper" or self.crop_margin >= min(axis for axis in self.patch if axis > 1)):
            raise UserError(
                f"crop_margin={self.crop_margin} with patch {list(self.patch)} and protocol {self.protocol!r}; expected fewer "
                "voxels than the patch has, and 0 under protocol 'paper', which pads as the authors do."
            )
        deepest = math.prod(max(1, axis // DEPTH) for axis in self.patch)  # voxels of a crop at the deepest level
        if self.norm == "instance" and deepest < 2:
            raise UserError(
                f"patch {list(self.patch)} leaves one value per channel at the deepest level, too few for instance "
                "normalisation; increase patch, or set norm=batch."
            )
        if self.batch_size * deepest < 2:
            raise UserError(
                f"batch_size {self.batch_size} with patch {list(self.patch)} leaves one value per channel at "
                "the deepest level, too few for batch normalisation; increase either."
            )

    @property
    def slices(self) -> bool:
        """Whether a network of 2-D layers sees slices of volumes, across the last axis."""
        return len(self.patch) == 3 and self.patch[2] == 1

    @property
    def network_dims(self) -> int:
        """Spatial axes of the network's layers."""
        return 2 if self.slices else len(self.patch)

    @property
    def labelled_only(self) -> bool:
        """Whether batches have no unlabelled samples."""
        return self.labelled_per_batch == self.batch_size

    @property
    def title(self) -> str:
        """The recipe's name, followed by the method if it is not the paper's."""
        return self.name if self.method == "both" else f"{self.name}, method {self.method}"

    @property
    def loss_keywords(self) -> dict[str, Any]:
        """Keywords for `rplib.MutualObjective`."""
        out = _LEAVES_OUT[self.method]
        return {
            "dice_weight": self.dice_weight,
            "supervised": self.supervised,
            "statistics": True,
            "confidence": None if "confidence" in out else self.confidence,
            "weighting": None if "weighting" in out else "similarity",
            "cross_entropy_on": self.cross_entropy_on,
            "impl": self.impl,
        }

    def replace(self, **changes: Any) -> "Config":
        """A checked copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def to_toml(self) -> str:
        """The complete file with comments; `parse` reads it back to an equal object."""
        document = tomlkit.document()
        for f in dataclasses.fields(self):
            if f.metadata["section"]:
                if document:
                    document.add(tomlkit.nl())
                document.add(tomlkit.comment(f"---- {f.metadata['section']}"))
            value = getattr(self, f.name)
            item = tomlkit.item(list(value) if isinstance(value, tuple) else value)
            item.comment(_comment(f))
            item.trivia.comment_ws = " " * max(2, 38 - len(f"{f.name} = {item.as_string()}"))
            document.add(f.name, item)
        return tomlkit.dumps(document)


KEYS = {f.name: f for f in dataclasses.fields(Config)}


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Settings from TOML text; missing keys take the values of its `base` recipe, or else the paper's.

    Args:
        source: name of the text in error messages.
        overrides: `key=value` options, as after `--set`.

    Raises:
        UserError: invalid TOML, an unknown key (the nearest known one is suggested), or an invalid value.
    """
    try:
        table = tomllib.loads(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: bad TOML, and integers of thousands of digits
        reported = "nested too deeply" if isinstance(error, RecursionError) else brief_reason(error)
        if is_out_of_memory(error):
            reported = "it does not fit into memory"
        raise UserError(f"{source} is not valid TOML: {reported}.") from error
    values = {**_base_of(table, source), **_known_keys(table, source), **parse_overrides(overrides)}
    try:
        return Config(**values)
    except UserError as error:
        if overrides:  # the option may be at fault as well as the file
            raise
        raise UserError(f"{source}: {error}") from error


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """`["filters=4", "patch=32,32,32"]` as a table.

    Values use TOML syntax; strings need no quotes and lists no brackets.

    Raises:
        UserError: no `=`, or an unknown key.
    """
    table: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key, text = key.strip(), text.strip()
        if not equals:
            raise UserError(f"--set {_brief(setting, str)}: expected key=value, for example --set filters=4.")
        _known(key, "--set")
        if KEYS[key].type is str:
            table[key] = text.strip("\"'")
            continue
        for written in (text, f"[{text}]"):
            try:
                value = tomllib.loads(f"v = {written}")["v"]
                break
            except (ValueError, RecursionError):  # no TOML, or an integer of thousands of digits
                value = text
        table[key] = value
    return table


def recipe_names() -> list[str]:
    """Names that `--recipe` accepts."""
    return sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != BASE)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a recipe by its name or from a TOML file.

    Raises:
        UserError: no such recipe or file, or invalid content.
    """
    path = Path(recipe)
    if path.suffix != ".toml":
        path = RECIPES / f"{recipe}.toml"
        if str(recipe) not in recipe_names():
            recipe = _brief(str(recipe), str)
            near = difflib.get_close_matches(str(recipe), recipe_names(), n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"no recipe named {recipe}; {hint}known: {', '.join(recipe_names())}; or give a FILE.toml.")
    return load_config(path, overrides)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Settings from a TOML file, such as the `config.toml` of a run.

    Raises:
        UserError: the file is missing, unreadable or invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(
            f"settings {path} cannot be read ({getattr(error, 'strerror', None) or error}); give a TOML file in UTF-8."
        ) from error
    return parse(text, str(path), overrides)


def describe_settings() -> str:
    """Every key with its type, default and meaning, by section: the text of `rplib train --help-settings`."""
    lines: list[str] = []
    for f in KEYS.values():
        if f.metadata["section"]:
            lines += ["", f.metadata["section"]]
        kind = {int: "integer", float: "number", bool: "true or false", str: "text"}.get(f.type, "integers")  # type: ignore[arg-type]
        lines.append(f"  {f.name} = {_toml(f.default)}  ({kind})")
        lines.append(f"      {_comment(f)}")
    return "\n".join(lines).strip() + "\n"


def differences(a: Config, b: Config) -> list[str]:
    """Keys in which two configurations differ.

    >>> differences(Config(), Config(seed=1, filters=4))
    ['filters', 'seed']
    """
    return [key for key in KEYS if getattr(a, key) != getattr(b, key)]


def _base_of(table: dict[str, Any], source: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys inherited through `base = "NAME"`, recursively; removes `base` from the table."""
    name = table.pop(BASE, None)
    if name is None:
        return {}
    if not isinstance(name, str) or name not in (BASE, *recipe_names()):
        raise UserError(f"{source}: base is {_brief(name)}; expected the name of a recipe: {BASE}, {', '.join(recipe_names())}.")
    if name in seen:
        raise UserError(f"{source}: base = {name!r} is circular, through {', '.join(seen)}.")
    below = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    return {**_base_of(below, name, (*seen, name)), **_known_keys(below, name)}


def _known_keys(table: dict[str, Any], source: str) -> dict[str, Any]:
    """The table without retired settings that have no effect.

    Raises:
        UserError: an unknown key, or a retired one with an effect.
    """
    known = {}
    for key, value in table.items():
        if key in _RETIRED:
            without_meaning, instead = _RETIRED[key]
            if value != without_meaning:
                raise UserError(f"{source}: {key} = {_brief(value)} is no longer a setting; use {instead}.")
            continue
        _known(key, source)
        known[key] = value
    return known


def _known(key: str, source: str) -> None:
    if key in KEYS:
        return
    if key in _RETIRED:
        raise UserError(f"{source}: {key} is no longer a setting; use {_RETIRED[key][1]}.")
    near = difflib.get_close_matches(key, KEYS, n=3, cutoff=0.5) or [k for k in KEYS if key in k]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(KEYS)}."
    raise UserError(f"{source}: unknown setting {_brief(key)}; {hint}")


def _checked(f: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value converted to its declared type; a UserError names the key."""
    if f.type == tuple[int, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (2, 3) or not all(map(_is_int, value)):
            raise UserError(
                f"{f.name} is {_brief(value)}; expected three whole numbers such as {f.name}=32,32,32, or two for 2-D images."
            )
        for axis in value:
            _check_range(f, axis, value)
        return tuple(int(axis) for axis in value)
    if f.type is float and _is_int(value):
        try:
            value = float(value)
        except OverflowError as error:
            raise UserError(f"{f.name} is {_brief(value)}; expected a number below 1.8e308.") from error
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[f.type]  # type: ignore[index]
    fits = _is_int(value) if f.type is int else isinstance(value, f.type)  # type: ignore[arg-type]
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{f.name} is {_brief(value)}; expected {expected}, such as {f.name}={_toml(f.default)}.")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{f.name} is {_brief(value)}; expected one of: {', '.join(choices)}{hint}.")
    if isinstance(value, str) and (has_control_characters(value) or not 0 < len(value) <= _MOST_NAME):
        raise UserError(f"{f.name} is {_brief(value)}; expected 1 to {_MOST_NAME} printable characters on one line.")
    if not isinstance(value, (str, bool)):
        _check_range(f, value, value)
    return value


def _check_range(f: "dataclasses.Field[Any]", number: float, shown: Any) -> None:
    least, above, most = f.metadata["least"], f.metadata["above"], f.metadata["most"]
    if least is not None and number < least:
        raise UserError(f"{f.name} is {_brief(shown, str)}; expected at least {least}.")
    if above is not None and number <= above:
        raise UserError(f"{f.name} is {_brief(shown, str)}; expected more than {above}.")
    if most is not None and number > most:
        raise UserError(f"{f.name} is {_brief(shown, str)}; expected at most {most}.")


def _brief(value: Any, show: Callable[[Any], str] = repr) -> str:
    """A value for a message, shortened if it is long."""
    try:
        text = printable(show(value))
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _comment(f: "dataclasses.Field[Any]") -> str:
    choices = f.metadata["choices"]
    return f.metadata["comment"] + (f" ({' | '.join(choices)})" if len(choices) > 1 else "")


def _toml(value: Any) -> str:
    return tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()
