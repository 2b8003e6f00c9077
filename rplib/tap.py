"""Features for the loss from networks as they are: what the layer that makes the logits reads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rplib.tap_hooks import Recorder, remove_hooks

Layers = str | Sequence[str] | Sequence[Sequence[str]]


class FeatureTap:
    """Reads the features that networks compute on their way to the logits.

    With no ``layer`` the first forward pass of each network shows which layer makes its logits: the convolution whose output the
    network returns. From then on its input is kept until `features` reads it. A network that returns logits of several
    decoders, in whatever nesting, gives one tensor per decoder, in their order; of deep supervision outputs those at the
    full resolution count.

    Args:
        networks: the networks in the order of the logits given to the loss, or a single network with several decoders.
        layer: name of the layer to read the input of, as in ``network.named_modules()``: one for all networks, or a sequence
            with one per network (per decoder for a single network). None: found as above.
        resize: interpolate features of another resolution than the logits (linearly); without it they are an error.

    Raises:
        TypeError, ValueError: what is no network, a network given twice or already compiled, a name that does not exist.
        RuntimeError: in the first forward pass: no layer makes the logits (a sum of two, an interpolation, a softmax does); the
            message lists the convolutions that ran last, to choose ``layer`` from.

    Works under ``torch.compile``, DistributedDataParallel, activation checkpointing, ``copy.deepcopy`` and ``torch.save``. Order
    for compiling: tap, one forward pass (or `find`, or ``layer=``), then ``torch.compile``; hooks set after a first compiled call
    would never run. A copied network keeps its hooks, and needs a FeatureTap of its own to be read; a network has one tap, and a
    new one replaces it.

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
        """Per network the names of the layers that are read; None where no forward pass has shown them yet."""
        return [None if r.layers is None else [layer.name for layer in r.layers] for r in self._recorders]

    def find(self, *inputs: Any) -> list[list[str] | None]:
        """Find the layers now, by a forward pass of every network in evaluation mode without gradients; returns `layers`."""
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
        """(B, F, *spatial) for each network (decoder) from its last forward pass, detached; forgets them.

        Raises:
            RuntimeError: a network has not run since the last call.
            ValueError: features of another resolution than the logits, without ``resize``.
        """
        return [f for recorder in self._recorders for f in recorder.take(self.resize)]

    def remove(self) -> None:
        """Take the hooks away."""
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
            raise ValueError(
                f"networks[{k}] is given twice; one network that runs twice keeps the features of its last pass alone."
            )
        if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"networks[{k}] is compiled already, where new hooks may never run; tap it first, then torch.compile."
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
            f"layer holds {len(entries)} entries for {networks} networks; expected one name, or one entry per network."
        )
    return [[entry] if isinstance(entry, str) else list(entry) for entry in entries]
