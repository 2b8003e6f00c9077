"""Reliability maps of a trained network on whole images: which decoder is reliable, and how reliable it is.

`rplib.reliability` works on the samples of a batch, so it is applied per window, each a sample of the training's patch
size; overlapping windows are averaged. The maps are for visual inspection: no score depends on them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

import rplib
from rplib.reference.config import Config
from rplib.reference.devices import numerics
from rplib.reference.inference.windows import window_overlap


class ReliabilityMaps(NamedTuple):
    """Maps over one image, (*spatial) each."""

    which: NDArray[np.float32]  # fraction of windows in which decoder 1 is the teacher, minus that of decoder 2: -1..1
    how: NDArray[np.float32]  # weight of the pseudo-label, mean over windows; NaN where there is none
    taught: NDArray[np.uint8]  # the pseudo-label: class of the largest mean probability of the teachers
    labels: tuple[NDArray[np.uint8], NDArray[np.uint8]]  # prediction of each decoder


class Verdict(NamedTuple):
    """Agreement of the maps with the ground truth of one case; NaN where no voxel qualifies."""

    taught_dice: float  # of the pseudo-labels, mean over the foreground classes
    disagreement: int  # voxels where the decoders differ
    right_there: float  # fraction of those where the pseudo-label is correct
    weight_right: float  # mean weight of correct pseudo-labels, where truth or pseudo-label is foreground
    weight_wrong: float  # the same for wrong ones


def map_stride(config: Config, stride: Sequence[int]) -> tuple[int, ...]:
    """Stride of the map windows: half a patch, or the evaluation's stride if larger.

    >>> map_stride(Config(), (18, 18, 4))
    (56, 56, 40)
    """
    return tuple(max(step, size // 2) for step, size in zip(stride, config.patch, strict=True))


def questions(config: Config) -> dict[str, str]:
    """Options of the maps, which are drawn for every run, whatever its method."""
    return {"confidence": config.confidence, "weighting": "similarity"}


@torch.inference_mode()
def reliability_maps(
    network: nn.Module,
    image: NDArray[np.float32],
    config: Config,
    stride: Sequence[int],
    batch: int = 4,
    device: str | torch.device = "cpu",
) -> ReliabilityMaps:
    """Apply `rplib.reliability` window by window.

    Args:
        network: in eval mode on `device`, hence without dropout.
        image: (*spatial) or (channels, *spatial), normalised as in training.
        stride: voxels between windows per axis.
        batch: windows per forward pass.
    """
    classes, keywords = config.classes, questions(config)

    def ask(windows: Tensor) -> Tensor:
        logits, features = network(windows)
        # Teacher of each pair, in the order (student, teacher) = (0, 1), (1, 0): the second decoder first.
        second, first = rplib.reliability(logits, features, **keywords, impl=config.impl)  # type: ignore[arg-type]
        p = [z.softmax(1) for z in logits]  # (N, C, *patch) each
        masks = torch.stack([first.mask, second.mask], 1).to(p[0].dtype)
        weight = (first.weight + second.weight)[:, None].to(p[0].dtype)
        return torch.cat([masks, weight, masks[:, :1] * p[0] + masks[:, 1:] * p[1], *p], 1)

    dims = len(config.patch)
    volume = torch.as_tensor(np.ascontiguousarray(image))
    volume = volume[None] if volume.ndim == dims else volume
    volume = volume[None].to(device, next(network.parameters()).dtype)  # (1, channels, *spatial)
    overlap = window_overlap(config.patch, stride)
    with numerics(torch.device(device), search=False):
        found = sliding_window_inference(volume, config.patch, batch, ask, overlap=overlap, mode="constant", cval=0.0)
    assert isinstance(found, Tensor)
    first, second, weight, *rest = found[0].float()
    taught, of_first, of_second = (
        torch.stack(rest[k * classes : (k + 1) * classes]).argmax(0).to(torch.uint8).cpu().numpy() for k in range(3)
    )
    how = torch.where(first + second > 0, weight / (first + second), math.nan)
    return ReliabilityMaps((first - second).cpu().numpy(), how.cpu().numpy(), taught, (of_first, of_second))


def verdict(maps: ReliabilityMaps, truth: NDArray[np.uint8]) -> Verdict:
    """Compare the maps with the ground truth.

    >>> maps = ReliabilityMaps(np.ones(4), np.array([0.9, 0.7, 0.3, 0.9]), np.array([1, 1, 1, 0]),
    ...                        (np.array([1, 1, 1, 0]), np.array([1, 0, 0, 0])))
    >>> [round(float(x), 2) for x in verdict(maps, np.array([1, 1, 0, 0]))]
    [0.8, 2.0, 0.5, 0.8, 0.3]
    """
    from rplib.reference.evaluation.metrics import dice

    right = maps.taught == truth
    differ = maps.labels[0] != maps.labels[1]
    shown = (truth > 0) | (maps.taught > 0)
    scores = [dice(maps.taught == k, truth == k) for k in range(1, int(max(truth.max(), maps.taught.max())) + 1)]
    return Verdict(
        taught_dice=_mean(np.array(scores)),
        disagreement=int(differ.sum()),
        right_there=_mean(right[differ]),
        weight_right=_mean(maps.how[shown & right]),
        weight_wrong=_mean(maps.how[shown & ~right]),
    )


def _mean(values: NDArray) -> float:
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(values.mean()) if values.size else math.nan
