"""The V-Net of the paper: one encoder, two decoders that differ only in how they upsample.

V-Net: Milletari et al., 3DV 2016, here without residual sums. Two decoders: Su et al., Medical Image Analysis 94 (2024)
103111. Module names are those of the authors' `mine3d_v1`, so that their checkpoints load.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

_ENCODER = (("one", 1), ("two", 2), ("three", 3), ("four", 3), ("five", 3))  # block and its convolutions, downwards
_DECODER = (
    ("six", "five", 3),
    ("seven", "six", 3),
    ("eight", "seven", 2),
    ("nine", "eight", 1),
)  # block, upsampled from


class MutualVNet(nn.Module):
    """One encoder, decoder 1 with transposed convolutions, decoder 2 with nearest upsampling and 3x3x3 convolutions.

    Args:
        in_channels: channels of the image.
        classes: C, background included.
        filters: channels at full resolution; they double at each of the four halvings.
        dropout: probability of Dropout3d after the deepest block and before each output convolution, in training mode.
        dims: 3, or 2 for the same network with two-dimensional layers, which processes volumes as slices across the last axis.
        norm: "batch" (the paper's) or "instance" normalisation, with which the images of a batch share no statistics.

    Shapes:
        image (B, in_channels, X, Y, Z), each axis a multiple of 16, to a pair of lists with one entry per decoder:
        logits (B, C, X, Y, Z) and features (B, filters, X, Y, Z); (X, Y) for two dims. The features are the
        input of the last 1x1x1 convolution, after dropout.

    Example:
        >>> import torch
        >>> from rplib.reference.network import MutualVNet
        >>> logits, features = MutualVNet(filters=2)(torch.zeros(2, 1, 32, 16, 16))
        >>> [tuple(z.shape) for z in logits], tuple(features[0].shape)
        ([(2, 2, 32, 16, 16), (2, 2, 32, 16, 16)], (2, 2, 32, 16, 16))
    """

    def __init__(
        self, in_channels: int = 1, classes: int = 2, filters: int = 16, dropout: float = 0.5, dims: int = 3, norm: str = "batch"
    ) -> None:
        super().__init__()
        layers = _layers(dims, norm)
        self.dims = dims
        self.encoder = _Encoder(in_channels, filters, dropout, layers)
        self.decoder1 = _Decoder(classes, filters, dropout, layers, _transposed)
        self.decoder2 = _Decoder(classes, filters, dropout, layers, _nearest)

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scales = self.encoder(self._as_slices(image))
        (logits1, features1), (logits2, features2) = self.decoder1(scales), self.decoder2(scales)
        logits, features = [logits1, logits2], [features1, features2]
        return [self._as_volume(z, image) for z in logits], [self._as_volume(f, image) for f in features]

    def first_logits(self, image: Tensor) -> Tensor:
        """Logits of decoder 1, (B, C, X, Y, Z), without computing decoder 2."""
        logits: Tensor = self.decoder1(self.encoder(self._as_slices(image)))[0]
        return self._as_volume(logits, image)

    def _as_slices(self, image: Tensor) -> Tensor:
        """(B, channels, X, Y, Z) as (B Z, channels, X, Y) if the layers are two-dimensional; other images unchanged."""
        return image.movedim(-1, 1).flatten(0, 1) if image.ndim == self.dims + 3 else image

    def _as_volume(self, found: Tensor, image: Tensor) -> Tensor:
        """The inverse of `_as_slices`."""
        return found.unflatten(0, (image.shape[0], -1)).movedim(1, -1) if image.ndim == self.dims + 3 else found


class _Layers(NamedTuple):
    """The layer types for 2-D or 3-D images."""

    convolution: type[nn.Conv2d] | type[nn.Conv3d]
    transposed: type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]
    dropout: type[nn.Dropout2d] | type[nn.Dropout3d]
    norm: Callable[[int], nn.Module]  # of the number of channels


def _layers(dims: int, norm: str) -> _Layers:
    if dims not in (2, 3):
        raise ValueError(f"dims is {dims!r}; expected 2 or 3.")
    three = dims == 3
    if norm == "batch":
        norms: Callable[[int], nn.Module] = nn.BatchNorm3d if three else nn.BatchNorm2d
    elif norm == "instance":  # with a learnt scale and offset per channel, as batch normalisation has
        norms = partial(nn.InstanceNorm3d if three else nn.InstanceNorm2d, affine=True)
    else:
        raise ValueError(f"norm is {norm!r}; expected 'batch' or 'instance'.")
    if three:
        return _Layers(nn.Conv3d, nn.ConvTranspose3d, nn.Dropout3d, norms)
    return _Layers(nn.Conv2d, nn.ConvTranspose2d, nn.Dropout2d, norms)


class _Encoder(nn.Module):
    def __init__(self, in_channels: int, filters: int, dropout: float, layers: _Layers) -> None:
        super().__init__()
        width = filters
        for name, convolutions in _ENCODER:
            self.add_module(f"block_{name}", _Block(*_convolutions(layers, in_channels, width, convolutions)))
            if name != "five":
                halved = layers.convolution(width, 2 * width, 2, stride=2)
                self.add_module(f"block_{name}_dw", _Block(*_normalised(layers, halved)))
                width *= 2
            in_channels = width
        self.dropout = layers.dropout(dropout)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five tensors, full resolution first: (B, filters * 2^s, X / 2^s, ...)."""
        scales = []
        for name, _ in _ENCODER:
            x = getattr(self, f"block_{name}")(x)
            scales.append(x)
            if name != "five":
                x = getattr(self, f"block_{name}_dw")(x)
        scales[-1] = self.dropout(scales[-1])
        return scales


class _Decoder(nn.Module):
    def __init__(self, classes: int, filters: int, dropout: float, layers: _Layers, upsampling: "_Upsampling") -> None:
        super().__init__()
        width = 16 * filters
        for name, below, convolutions in _DECODER:
            self.add_module(f"block_{below}_up", _Block(*upsampling(layers, width, width // 2)))
            width //= 2
            self.add_module(f"block_{name}", _Block(*_convolutions(layers, width, width, convolutions)))
        self.dropout = layers.dropout(dropout)
        self.out_conv = layers.convolution(filters, classes, 1)

    def forward(self, scales: list[Tensor]) -> tuple[Tensor, Tensor]:
        *skips, x = scales
        for name, below, _ in _DECODER:
            x = getattr(self, f"block_{below}_up")(x) + skips.pop()
            x = getattr(self, f"block_{name}")(x)
        features = self.dropout(x)
        return self.out_conv(features), features


_Upsampling = Callable[[_Layers, int, int], list[nn.Module]]


class _Block(nn.Module):
    """Sequential layers named `conv`, as in the authors' checkpoints."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


_Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


def _normalised(layers: _Layers, convolution: _Convolution) -> list[nn.Module]:
    return [convolution, layers.norm(convolution.out_channels), nn.ReLU(inplace=True)]


def _convolutions(layers: _Layers, channels: int, width: int, number: int) -> list[nn.Module]:
    widths = [channels] + [width] * number
    kernels = [layers.convolution(widths[i], width, 3, padding=1) for i in range(number)]
    return [layer for kernel in kernels for layer in _normalised(layers, kernel)]


def _transposed(layers: _Layers, channels: int, width: int) -> list[nn.Module]:
    return _normalised(layers, layers.transposed(channels, width, 2, stride=2))


def _nearest(layers: _Layers, channels: int, width: int) -> list[nn.Module]:
    kernel = layers.convolution(channels, width, 3, padding=1)
    return [nn.Upsample(scale_factor=2, mode="nearest"), *_normalised(layers, kernel)]
