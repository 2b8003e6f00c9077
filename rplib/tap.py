"""Features for the loss from unmodified networks: the input of the layer that produces the logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rplib.tap_hooks import Recorder, remove_hooks

Layers = str | Sequence[str] | Sequence[Sequence[str]]


class FeatureTap:
    """Records the features that networks compute from which they produce the logits.

    Without ``layer``, the first forward pass of each network shows which layer produces its logits: the convolution whose output
    the network returns. From then on, the input of this layer is kept until `features` reads it. A network that returns the
    logits of several decoders, in any nesting, gives one tensor per decoder, in the same order. With deep supervision, only the
    full-resolution outputs are considered.

    Args:
        networks: the networks in the order of the logits given to the loss, or a single network with several decoders.
        layer: name of the layer whose input to record, as in ``network.named_modules()``: one for all networks, or a sequence
            with one per network (per decoder for a single network). None: found as above.
        resize: interpolate features (linearly) if their resolution differs from that of the logits; otherwise this is an error.

    Raises:
        TypeError, ValueError: not a network, a network given twice or already compiled, or a name that does not exist.
        RuntimeError: in the first forward pass: no layer produces the logits (they are a sum, an interpolation, a softmax); the
            message lists the convolutions that ran last, as candidates for ``layer``.

    Works with ``torch.compile``, DistributedDataParallel, activation checkpointing, ``copy.deepcopy`` and ``torch.save``. To
    compile a network, first tap it, then run one forward pass (or `find`, or ``layer=``), then call ``torch.compile``; hooks set
    after a first compiled call would never run. A copied network keeps its hooks, but needs its own FeatureTap. A network has one
    tap at a time, and a new one replaces it.

    Source: the features f_j of Su et al., Medical Image Analysis 94 (2024) 103111.

    Example:
        >>> import torch
        >>> import rplib
        >>> networks = [torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1)) for _ in range(2)]
        >>> tap = rplib.FeatureTap(networks)
        >>> logits = [network(torch.zeros(4, 1, 16, 16)) for network in networks]
        >>> [tuple(f.shape) for f in tap.features()]
        [(4, 8, 16, 16), (4, 8, 16, 16)]
        >>> tap
        FeatureTap(networks[0]: '1', networks[1]: '1')
    """

    def __init__(self, networks: nn.Module | Sequence[nn.Module], layer: Layers | None = None, *, resize: bool = False) -> None:
        self.networks = _as_networks(networks)
        self.resize = resize
        names = _names_per_network(layer, len(self.networks))
        self._recorders = [Recorder(k) for k in range(len(self.networks))]
        for network in self.networks:
            remove_hooks(network)
        for network, recorder, chosen in zip(self.networks, self._recorders, names, strict=True):
            recorder.attach(network, chosen)

    @property
    def layers(self) -> list[list[str] | None]:
        """Per network, the names of the layers whose inputs are recorded; None before they are found in a forward pass."""
        return [None if r.layers is None else [layer.name for layer in r.layers] for r in self._recorders]

    def find(self, *inputs: Any) -> list[list[str] | None]:
        """Find the layers with a forward pass of every network in evaluation mode without gradients; returns `layers`."""
        for network in self.networks:
            modes = {module: module.training for module in network.modules()}
            network.eval()
            try:
                with torch.no_grad():
                    network(*inputs)
            finally:
                for module, training in modes.items():
                    module.training = training
        for recorder in self._recorders:
            recorder.clear()
        return self.layers

    def features(self) -> list[Tensor]:
        """Return and discard the features of the last forward pass: detached (B, F, *spatial) for each network (decoder).

        Raises:
            RuntimeError: a network has not run since the last call.
            ValueError: the resolution differs from that of the logits, without ``resize``.
        """
        return [f for recorder in self._recorders for f in recorder.take(self.resize)]

    def remove(self) -> None:
        """Remove the hooks."""
        for network in self.networks:
            remove_hooks(network)

    def __repr__(self) -> str:
        found = (
            f"networks[{k}]: " + ("not found yet" if names is None else ", ".join(map(repr, names)))
            for k, names in enumerate(self.layers)
        )
        return f"FeatureTap({', '.join(found)})"


def _as_networks(networks: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    found = [networks] if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList) else list(networks)
    if not found:
        raise ValueError("networks is empty; expected at least one torch.nn.Module.")
    for k, network in enumerate(found):
        if not isinstance(network, nn.Module):
            raise TypeError(f"networks[{k}] is a {type(network).__name__}; expected a torch.nn.Module.")
        if any(network is other for other in found[:k]):
            raise ValueError(f"networks[{k}] is given twice; a network that runs twice keeps only the features of its last pass.")
        if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"networks[{k}] is compiled already, so new hooks may never run; tap it first, then call torch.compile."
            )
    return found


def _names_per_network(layer: Layers | None, networks: int) -> list[list[str] | None]:
    if layer is None:
        return [None] * networks
    if isinstance(layer, str):
        return [[layer] for _ in range(networks)]
    entries = list(layer)
    if networks == 1 and entries and all(isinstance(entry, str) for entry in entries):
        return [[str(entry) for entry in entries]]
    if len(entries) != networks:
        raise ValueError(
            f"layer has {len(entries)} entries for {networks} networks; expected one name, or one entry per network."
        )
    return [[entry] if isinstance(entry, str) else list(entry) for entry in entries]
