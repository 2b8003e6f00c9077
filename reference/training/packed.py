"""The network's narrow convolutions, computed on fewer positions with more channels: the same sums in another order.

With 8 channels, a 3x3x3 convolution on a CPU uses only half of the vector lanes. Here two neighbours along the first axis
become one position with twice the channels. A kernel of 3 taps over voxels becomes a kernel of 3 taps over pairs, half of
whose weights are 0. Nearest upsampling by 2 followed by a kernel of 3 taps becomes a kernel of 3 taps on the small grid, with
2 outputs per position and axis. Parameters, their names and the meaning of their gradients do not change.
"""

import itertools

import torch
from torch import Tensor, nn

NARROW = 8  # pairs of voxels are faster up to this number of output channels


def pack(network: nn.Module) -> nn.Module:
    """Replace the forward of all narrow 3-tap convolutions of a network, in place.

    Example:
        >>> from rplib.reference.network import MutualVNet
        >>> _ = torch.manual_seed(0)
        >>> network = MutualVNet(filters=2).double().eval()
        >>> image = torch.randn(1, 1, 16, 16, 16).double()
        >>> before = network(image)[0]
        >>> torch.allclose(pack(network)(image)[0][1], before[1])
        True
    """
    for sequence in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        layers = list(sequence)
        for k, layer in enumerate(layers):
            if not isinstance(layer, nn.Conv2d | nn.Conv3d) or not _fits(layer):
                continue
            if k and isinstance(layers[k - 1], nn.Upsample):
                layers[k - 1].forward = _identity
                layer.forward = _Upsampled(layer)  # type: ignore[assignment]
            else:
                layer.forward = _Paired(layer)  # type: ignore[assignment]
    return network


def _fits(layer: nn.Conv2d | nn.Conv3d) -> bool:
    """A narrow kernel of 3 taps along each axis."""
    taps = set(layer.kernel_size) == {3} and set(layer.padding) == {1} and set(layer.stride) == {1}
    return taps and layer.out_channels <= NARROW


def _identity(x: Tensor) -> Tensor:
    return x


class _Paired:
    """A convolution over pairs along the first axis."""

    def __init__(self, layer: nn.Conv3d | nn.Conv2d) -> None:
        self.layer = layer
        # Output voxel 2n + p sees input voxel 2n + p + d, d = -1, 0, 1, which is voxel q of pair n + e.
        taps = torch.zeros(2, 2, 3, 3)  # (p, q, e + 1, d + 1)
        for p, d in itertools.product((0, 1), (-1, 0, 1)):
            e, q = divmod(p + d, 2)
            taps[p, q, e + 1, d + 1] = 1
        self.taps = taps

    def __call__(self, x: Tensor) -> Tensor:
        layer, (b, c, size, *rest) = self.layer, x.shape
        if size % 2:
            return layer._conv_forward(x, layer.weight, layer.bias)
        pairs = x.reshape(b, c, size // 2, 2, *rest).transpose(2, 3).reshape(b, 2 * c, size // 2, *rest)
        taps = self.taps.to(layer.weight)
        out = layer.out_channels
        weight = torch.einsum("oid...,pqed->opiqe...", layer.weight, taps).reshape(2 * out, 2 * c, 3, *layer.kernel_size[1:])
        bias = None if layer.bias is None else layer.bias.repeat_interleave(2)
        y = layer._conv_forward(pairs, weight, bias)
        return y.reshape(b, out, 2, size // 2, *rest).transpose(2, 3).reshape(b, out, size, *rest)


class _Upsampled:
    """Nearest upsampling by 2 and the following convolution, computed on the small grid."""

    def __init__(self, layer: nn.Conv3d | nn.Conv2d) -> None:
        self.layer = layer
        # Output voxel 2n + p sees upsampled voxel 2n + p + d, which is small voxel n + (p + d) // 2.
        taps = torch.zeros(2, 3, 3)  # (p, e + 1, d + 1)
        for p, d in itertools.product((0, 1), (-1, 0, 1)):
            taps[p, (p + d) // 2 + 1, d + 1] += 1
        self.taps = taps

    def __call__(self, x: Tensor) -> Tensor:
        layer, (b, c, *sizes) = self.layer, x.shape
        taps = self.taps.to(layer.weight)
        out, dims = layer.out_channels, len(sizes)
        if dims == 3:
            weight = torch.einsum("oidfg,ped,qhf,rkg->opqriehk", layer.weight, taps, taps, taps)
        else:
            weight = torch.einsum("oidf,ped,qhf->opqieh", layer.weight, taps, taps)
        weight = weight.reshape(out * 2**dims, c, *[3] * dims)
        bias = None if layer.bias is None else layer.bias.repeat_interleave(2**dims)
        y = layer._conv_forward(x, weight, bias).reshape(b, out, *[2] * dims, *sizes)
        order = [0, 1] + [k for axis in range(dims) for k in (2 + dims + axis, 2 + axis)]
        return y.permute(order).reshape(b, out, *[2 * size for size in sizes])
