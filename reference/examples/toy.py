"""The toy task of the examples: a bright disc in noise, with a soft edge and a different brightness in every image."""

import torch
from torch import Tensor, nn


def discs(number: int, seed: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """Images (number, 1, size, size) float32 and labels (number, size, size) in {0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    centre = size * (0.3 + 0.4 * torch.rand(number, 2, 1, 1, generator=generator))
    radius = size * (0.12 + 0.12 * torch.rand(number, 1, 1, generator=generator))
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    inside = radius - ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2).sqrt()  # (number, size, size)
    bright = 1 + torch.rand(number, 1, 1, generator=generator)
    images = bright * torch.sigmoid(inside) + 0.4 * torch.randn(number, size, size, generator=generator)
    return images[:, None], (inside > 0).long()


@torch.no_grad()
def dice(network: nn.Module, seed: int = 99) -> float:
    """Dice of the disc on 16 new images; the network returns logits (B, 2, H, W)."""
    images, labels = discs(16, seed)
    network.eval()
    found = network(images).argmax(1)
    return float(2 * (found * labels).sum() / (found.sum() + labels.sum()))
