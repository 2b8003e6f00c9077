"""Dice of a network on validation cases during training."""

from collections.abc import Sequence

import torch
from torch import nn

from rplib.reference.config import Config
from rplib.reference.datasets.cases import Case
from rplib.reference.inference.windows import labels
from rplib.reference.progress import progress


def case_dice(network: nn.Module, cases: Sequence[Case], config: Config, device: torch.device) -> list[float]:
    """Decoder-1 Dice of each case, mean over the foreground classes; an empty prediction of a class that is present counts 0.

    A class in neither truth nor prediction has no Dice and is excluded; a case with only such classes (a slice of background)
    gives NaN. Protocol `paper` counts 0 for both, as the authors do.
    Windows, averages, decision and counts stay on the device, which is synchronised once per case. The precision is
    that of the training (`amp`, `tf32`).
    """
    found = []
    autocast = torch.bfloat16 if config.amp == "bfloat16" else None
    for case in progress(cases, "validating"):
        ours = labels(network, case.image, config.patch, config.stride, config.window_batch, device, autocast)
        truth = torch.as_tensor(case.label).to(device)
        counts = torch.stack(
            [
                torch.stack([(mine & true).sum(), mine.sum(), true.sum()])
                for mine, true in ((ours == c, truth == c) for c in range(1, config.classes))
            ]
        ).tolist()
        counted = counts if config.protocol == "paper" else [one for one in counts if one[1] or one[2]]
        scores = [2 * both / (mine + true) if mine else 0.0 for both, mine, true in counted]
        found.append(sum(scores) / len(scores) if scores else float("nan"))
    return found
