"""The kernels as an ahead-of-time compiler needs them, taken from the launches themselves.

The launchers run on meta tensors (shapes and strides without values); every launch is recorded and none is run, so what is
compiled is what a GPU would get.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rplib.kernels import launch, passes
from rplib.kernels.rules import rules_of
from rplib.kernels.voxels import SIZES
from rplib.options import Confidence, Options
from rplib.supervision import Supervised, Supervision

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")


class KernelSpec(NamedTuple):
    """Arguments of ``triton.compiler.ASTSource`` for one launch.

    name: of the kernel; fn: its JITFunction; signature: argument -> type, "constexpr" for constants; constexprs: argument ->
    value; attrs: (position,) -> [["tt.divisibility", 16]]; num_warps: of the launch.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    num_warps: int


def iter_specs(
    classes: int,
    features: int,
    dtype: torch.dtype,
    channels_last: bool,
    *,
    batch: int = 4,
    spatial: tuple[int, ...] = (112, 112, 80),
    confidence: Confidence | None = "entropy",
    weighted: bool = True,
    on_logits: bool = True,
    labelled: int = 0,
    statistics: bool = False,
    supervised: Supervised = "dice",
    masked: bool = False,
    ignore_index: int | None = None,
    architecture: int | str = 90,
) -> Iterator[KernelSpec]:
    """Every kernel of one forward and backward pass, in the order of the launches.

    Args:
        classes: C. features: F of both networks. dtype: of logits and features. channels_last: their memory format.
        batch: B. spatial: sizes of 1 to 3 spatial axes (the paper's Left Atrium patch).
        confidence, weighted, on_logits: the loss's keywords.
        labelled: samples with a target (uint8): 0 is the loss alone, more the whole objective.
        statistics, supervised, ignore_index: the objective's keywords. masked: with a mask.
        architecture: whose tiles, see `launch.tiles_for`.
    """
    for recorded in record_launches(
        classes, features, dtype, channels_last,
        batch=batch, spatial=spatial, confidence=confidence, weighted=weighted, on_logits=on_logits, labelled=labelled,
        statistics=statistics, supervised=supervised, masked=masked, ignore_index=ignore_index, architecture=architecture,
    ):  # fmt: skip
        yield spec(recorded)


def record_launches(
    classes: int,
    features: int,
    dtype: torch.dtype,
    channels_last: bool,
    *,
    batch: int = 4,
    spatial: tuple[int, ...] = (112, 112, 80),
    confidence: Confidence | None = "entropy",
    weighted: bool = True,
    on_logits: bool = True,
    labelled: int = 0,
    statistics: bool = False,
    supervised: Supervised = "dice",
    masked: bool = False,
    ignore_index: int | None = None,
    architecture: int | str = 90,
) -> list[launch.Launch]:
    """The launches themselves, arguments on the meta device; keywords as `iter_specs`."""
    launches: list[launch.Launch] = []

    def record(launched: launch.Launch) -> bool:
        launches.append(launched)
        return False

    def tensors(channels: int) -> list[Tensor]:
        shape = (batch, channels, *spatial)
        made = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(2)]
        if channels_last:
            made = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in made]
        return made

    target = torch.empty((labelled, *spatial), dtype=torch.uint8, device="meta") if labelled else None
    mask = torch.empty((batch, *spatial), dtype=torch.bool, device="meta") if masked else None
    given = passes.Batch(tensors(classes), tensors(features) if weighted else None, target, mask)
    options = Options(confidence=confidence, cross_entropy_on="logits" if on_logits else "probabilities")
    supervision = Supervision(supervised=supervised, statistics=statistics, ignore_index=ignore_index) if labelled else None
    rules = rules_of(options, supervision, classes, masked=masked)
    with launch.observed(record), launch.tiles_for(architecture):
        known = passes.statistics(given, rules)
        _, _, kept = passes.weighting(given, known, rules, passes.Weights(0.5), with_record=True)
        upstream = torch.empty((), dtype=torch.float32, device="meta")
        passes.gradient(upstream, known.sums, kept, given, rules, 0.5)
    return launches


def spec(recorded: launch.Launch) -> KernelSpec:
    kernel = recorded.kernel
    names = list(kernel.arg_names)
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for position, (name, value) in enumerate(zip(names, recorded.arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attrs[(position,)] = [["tt.divisibility", 16]]  # allocators align to 256 bytes or more
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:  # no integer is specialised, see voxels.SIZES
            assert name in SIZES, f"{kernel.fn.__name__}: {name} is not in voxels.SIZES"
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
    for name, value in recorded.constants.items():
        if name not in _OPTIONS:
            signature[name] = "constexpr"
            constexprs[name] = value
    return KernelSpec(
        name=kernel.fn.__name__,
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs=constexprs,
        attrs=attrs,
        num_warps=recorded.constants["num_warps"],
    )
