"""The hooks of `rplib.FeatureTap`: they find the layer that produces a network's logits and record its input.

Every hook is a method of an object with all of its state. Copying or pickling a network copies or pickles the hooks with it,
so a copy never writes into the original's features.
"""

import difflib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from rplib.inputs import plain

_INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}


class _Layer(NamedTuple):
    """The name of a layer, and the index of one of its calls in a forward pass."""

    name: str
    call: int


class _Call(NamedTuple):
    """One call of a convolution in a network's first forward pass."""

    layer: _Layer
    input: Tensor
    output: Tensor


class Recorder:
    """The state of one network's hooks."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.layers: list[_Layer] | None = None
        self.checked = False  # whether the number of channels was checked
        self.clear()

    def clear(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.calls: list[_Call] = []
        self.size: tuple[int, ...] | None = None
        self.complete = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        copied = Recorder(self.index)  # without the features: they belong to the original's forward pass
        copied.layers, copied.checked = self.layers, self.checked
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "layers": self.layers, "checked": self.checked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.index, self.layers, self.checked = state["index"], state["layers"], state["checked"]
        self.clear()

    def attach(self, network: nn.Module, names: list[str] | None) -> None:
        network.register_forward_pre_hook(self.begin)
        network.register_forward_hook(self.end)
        if names is None:
            for name, module in network.named_modules():
                if _is_convolution(module):
                    module.register_forward_hook(_Reader(self, name).watch)
            return
        known = dict(network.named_modules())
        for name in names:
            if name not in known or name == "":
                close = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
                raise ValueError(
                    f"layer {name!r} is not a layer of networks[{self.index}] ({type(network).__name__}); similar names: "
                    f"{', '.join(map(repr, close)) or 'none'}."
                )
            known[name].register_forward_pre_hook(_Reader(self, name).read)
        self.layers = [_Layer(name, 0) for name in names]

    def begin(self, network: nn.Module, args: Any) -> None:
        if not _in_backward():
            self.clear()

    def end(self, network: nn.Module, args: Any, output: Any) -> None:
        if _in_backward():
            return
        returned = [plain(t) for t in _tensors(output)]
        if self.layers is None:
            self.layers, returned = self.found(returned)
            self.watch_no_longer(network)
        if not returned:
            raise RuntimeError(f"networks[{self.index}] returned no tensor (B, C, *spatial), alone or in a list, tuple or dict.")
        finest = max(returned, key=_voxels)
        self.size = tuple(finest.shape)
        self.complete = True
        if not self.checked and not torch.compiler.is_compiling():
            self.checked = True
            self.warn_of_few_channels(finest.shape[1])

    def found(self, returned: list[Tensor]) -> tuple[list[_Layer], list[Tensor]]:
        """The calls that made the returned tensors of full resolution, and these tensors."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"FeatureTap has not found the layer of networks[{self.index}] that produces the logits, and cannot find it in a "
                "compiled network: run one forward pass before torch.compile, call tap.find(images), or pass layer=."
            )
        made = [(call, t) for t in returned for call in reversed(self.calls) if _same_memory(call.output, t)]
        if not made:
            raise RuntimeError(self.candidates())
        full = max(_voxels(t) for _, t in made)
        chosen: dict[_Layer, Tensor] = {}
        for call, t in made:
            if _voxels(t) == full:
                chosen.setdefault(call.layer, t)
        return list(chosen), list(chosen.values())

    def watch_no_longer(self, network: nn.Module) -> None:
        """Stop watching all convolutions: the layers are known. Keep their inputs, and record only these from now on."""
        assert self.layers is not None
        names = {layer.name for layer in self.layers}
        for call in self.calls:
            if call.layer.name in names:
                self.inputs.setdefault(call.layer.name, []).append(call.input)
        self.calls = []
        for name, module in network.named_modules():
            _drop(module._forward_hooks, lambda owner: isinstance(owner, _Reader) and owner.recorder is self)
            if name in names:
                module.register_forward_pre_hook(_Reader(self, name).read)

    def warn_of_few_channels(self, classes: int) -> None:
        for layer in self.layers or []:
            read = self.inputs.get(layer.name, [])
            if layer.call < len(read) and read[layer.call].shape[1] <= classes:
                warnings.warn(
                    f"the input of layer {layer.name!r} of networks[{self.index}] has F = {read[layer.call].shape[1]} channels "
                    f"for C = {classes} classes: too few for prototypes to add information to the logits; consider passing the "
                    "layer before it as layer=.",
                    stacklevel=2,
                )

    def candidates(self) -> str:
        lines = [
            f"  layer={call.layer.name!r}: input {tuple(call.input.shape)}, output {tuple(call.output.shape)}"
            for call in self.calls[-6:]
        ]
        return (
            f"no layer of networks[{self.index}] produces its output directly: it is computed from the outputs of layers (a sum, "
            "an interpolation, a stack, a softmax). Pass layer= with the name of a layer whose input should be the features; the "
            "last convolutions that ran:\n" + ("\n".join(lines) or "  none")
        )

    def take(self, resize: bool) -> list[Tensor]:
        if not self.complete or self.layers is None:
            raise RuntimeError(
                f"networks[{self.index}] has not run since its features were last read; call every network before features(). "
                "(A network compiled before it was tapped never records them: tap it first, then call torch.compile.)"
            )
        result = []
        for layer in self.layers:
            calls = self.inputs.get(layer.name, [])
            if layer.call >= len(calls):
                raise RuntimeError(
                    f"layer {layer.name!r} of networks[{self.index}] was not called in the last forward pass; pass layer= with "
                    "one that always is."
                )
            f = calls[layer.call]
            size = (self.size or ())[-(f.ndim - 2) :]
            if tuple(f.shape[2:]) != size:
                if not resize:
                    raise ValueError(
                        f"the input of layer {layer.name!r} of networks[{self.index}] is {tuple(f.shape)} but the network "
                        f"returns {self.size}; pass resize=True to interpolate the features, or layer= with a full-resolution "
                        "layer."
                    )
                f = F.interpolate(f, size=size, mode=_INTERPOLATION[f.ndim], align_corners=False)
            result.append(f)
        self.clear()
        return result


class _Reader:
    """The hooks of one layer."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not _in_backward():
            self.recorder.inputs.setdefault(self.name, []).append(plain(args[0]).detach())

    def watch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _in_backward() or not isinstance(output, Tensor):
            return
        calls = self.recorder.calls
        before = sum(call.layer.name == self.name for call in calls)
        calls.append(_Call(_Layer(self.name, before), plain(args[0]).detach(), plain(output)))


def remove_hooks(network: nn.Module) -> None:
    """Remove the hooks of the tap on this network itself, but not those of taps on its submodules."""
    owners = [getattr(hook, "__self__", None) for hook in network._forward_pre_hooks.values()]
    recorders = [owner for owner in owners if isinstance(owner, Recorder)]

    def is_ours(owner: Any) -> bool:
        return any((owner.recorder if isinstance(owner, _Reader) else owner) is recorder for recorder in recorders)

    for module in network.modules():
        _drop(module._forward_hooks, is_ours)
        _drop(module._forward_pre_hooks, is_ours)


def _drop(hooks: dict[int, Any], unwanted: Callable[[Any], bool]) -> None:
    for key, hook in list(hooks.items()):
        if unwanted(getattr(hook, "__self__", None)):
            del hooks[key]


def _voxels(t: Tensor) -> int:
    return t.shape[2:].numel()


def _is_convolution(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not any(True for _ in module.children()) and isinstance(weight, Tensor) and (weight.ndim >= 3 or _is_lazy(module))


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and "Conv" in type(module).__name__


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """The same tensor, or a view of the same values (an alias, a reshape)."""
    if a is b:
        return True
    return a.numel() == b.numel() and a.device == b.device and a.device.type != "meta" and a.data_ptr() == b.data_ptr() != 0


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a network's output, in their order."""
    if isinstance(output, Tensor):
        if output.ndim >= 3:
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _in_backward() -> bool:
    """True while activation checkpointing recomputes a forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
