"""Sliding-window segmentation of whole images, as in the paper's evaluation.

MONAI extracts and averages the windows; this module sets the paper's window positions, converts logits to probabilities
per window, and applies the paper's decision rule.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rplib.errors import UserError
from rplib.reference.devices import numerics
from rplib.reference.network import MutualVNet

DECODER_1 = "decoder 1"
MEAN = "mean of both"
OUTPUTS = (DECODER_1, MEAN)
LAST_WEIGHTS = "decoder 1, last weights"  # in addition to averaged ones


class Segmentation(NamedTuple):
    """The segmentation of one image by one output of the network."""

    label: NDArray[np.uint8]  # (*spatial): class of every voxel
    score: NDArray[np.float32]  # (*spatial): foreground probability, averaged over the windows


def segment(
    network: nn.Module,
    image: NDArray[np.float32],
    patch: Sequence[int],
    stride: Sequence[int],
    batch: int = 4,
    device: str | torch.device = "cpu",
    output: str = DECODER_1,
) -> Segmentation:
    """Segment one image with one output of a two-decoder network.

    Args:
        network: in eval mode; maps (N, channels, *patch) to a pair (logits, features), a list of two tensors each.
        image: (*spatial) or (channels, *spatial), normalised as in training. Axes shorter than the patch are padded
            with zeros on both sides (an odd voxel at the end) and the result is cropped back.
        patch: voxels of a window per axis.
        stride: voxels between windows per axis; the last window is shifted to end with the image.
        batch: windows per forward pass; affects time and memory, not the result (up to rounding).
        device: where the windows are computed and the averages are summed.
        output: ``"decoder 1"``, as reported in the paper, or ``"mean of both"`` decoders' probabilities.

    Returns:
        (label, score): ``label`` (*spatial) uint8 is 1 where the mean foreground probability is above 0.5, with more
        than two classes the class of the largest mean probability; ``score`` (*spatial) float32 is 1 - p(background).

    Raises:
        UserError: a stride below 1 or above the patch, or mismatched axes.

    Source: Su et al. 2024, doi 10.1016/j.media.2024.103111, evaluation of the authors' code.
    """
    return segment_outputs(network, image, patch, stride, batch, device, (output,))[output]


@torch.inference_mode()
def segment_outputs(
    network: nn.Module,
    image: NDArray[np.float32],
    patch: Sequence[int],
    stride: Sequence[int],
    batch: int = 4,
    device: str | torch.device = "cpu",
    outputs: Sequence[str] = OUTPUTS,
) -> dict[str, Segmentation]:
    """As `segment`, for several outputs from the same forward passes; the network must be on `device`."""
    # Full float32 and deterministic algorithms: batched windows give the same labels as single windows.
    with numerics(torch.device(device), search=False):
        averages = _averages(network, image, patch, stride, batch, device, outputs)
    decided = {output: _decide(average) for output, average in averages.items()}
    return {output: Segmentation(label.cpu().numpy(), score.float().cpu().numpy()) for output, (label, score) in decided.items()}


@torch.inference_mode()
def labels(
    network: nn.Module,
    image: NDArray[np.float32],
    patch: Sequence[int],
    stride: Sequence[int],
    batch: int,
    device: str | torch.device,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Labels of decoder 1, (*spatial) uint8, on the device; does not synchronise it.

    Args:
        autocast_dtype: autocast dtype of the network; probabilities are averaged in float32. None: that of the weights,
            with TensorFloat-32 as set in PyTorch.
    """
    averages = _averages(network, image, patch, stride, batch, device, (DECODER_1,), autocast_dtype)
    return _decide(averages[DECODER_1])[0]


def _averages(
    network: nn.Module,
    image: NDArray[np.float32],
    patch: Sequence[int],
    stride: Sequence[int],
    batch: int,
    device: str | torch.device,
    outputs: Sequence[str],
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Each output's probabilities (C, *spatial), averaged over the windows, on the device."""
    from monai.inferers import sliding_window_inference  # slow import, not needed for training without validation

    patch = tuple(int(size) for size in patch)
    overlap = window_overlap(patch, stride)
    unknown = [output for output in outputs if output not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be of {OUTPUTS}, got {unknown}")

    volume = torch.as_tensor(np.ascontiguousarray(image))
    if volume.ndim == len(patch):
        volume = volume[None]
    if volume.ndim != len(patch) + 1:
        raise UserError(f"the image has shape {tuple(image.shape)}, the patch {patch}; the patch needs one size per axis.")
    volume = volume[None].to(device, next(network.parameters()).dtype)  # (1, channels, *spatial)
    # Decoder 2 costs as much as decoder 1, so it runs only if needed.
    alone = network.first_logits if isinstance(network, MutualVNet) and MEAN not in outputs else None

    def probabilities(windows: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(volume.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            logits = network(windows)[0] if alone is None else [alone(windows)]
        p = [(z.float() if autocast_dtype is not None else z).softmax(1) for z in logits]  # (N, C, *patch)
        found = {DECODER_1: p[0]}
        if MEAN in outputs:
            found[MEAN] = torch.stack(p).mean(0)
        return tuple(found[output] for output in outputs)

    averages = sliding_window_inference(
        volume, roi_size=patch, sw_batch_size=batch, predictor=probabilities, overlap=overlap, mode="constant", cval=0.0
    )
    if isinstance(averages, Tensor):  # MONAI returns a single output without a tuple
        averages = (averages,)
    return {output: average[0] for output, average in zip(outputs, averages, strict=True)}


def window_overlap(patch: Sequence[int], stride: Sequence[int]) -> tuple[float, ...]:
    """The overlap for which MONAI steps by exactly `stride` voxels.

    MONAI steps by int(patch * (1 - overlap)); the half voxel guards against rounding.

    >>> [int(96 * (1 - share)) for share in window_overlap((96, 96), (16, 96))]
    [16, 96]
    """
    patch, stride = tuple(patch), tuple(stride)
    if len(patch) != len(stride) or not all(1 <= step <= size for step, size in zip(stride, patch, strict=True)):
        raise UserError(f"the stride {stride} does not fit the patch {patch}; each axis needs 1 up to the patch size.")
    # At stride = patch, the half voxel would give a negative overlap, and is not needed.
    return tuple(max(0.0, 1 - (step + 0.5) / size) for size, step in zip(patch, stride, strict=True))


def _decide(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Class (uint8) and foreground score from averaged probabilities (C, *spatial)."""
    classes = probability.shape[0]
    if classes == 2:
        # The foreground itself, not 1 - background, as in the paper's threshold.
        score = probability[1]
        label = score > 0.5
    else:
        score = 1 - probability[0]
        label = probability.argmax(0)
    return label.to(torch.uint8), score
