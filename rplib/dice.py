"""The supervised term of the training objective."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rplib import ranks
from rplib.inputs import valid_only

_SMOOTH = 1e-8


def dice_loss(
    logits: Tensor,
    target: Tensor,
    classes: Sequence[int] | None = None,
    process_group: ranks.Group = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Soft Dice loss of one network over all samples together, mean over classes.

        Dice = 1 - (2 sum_v p(c,v) g(c,v) + 1e-8) / (sum_v p(c,v) + sum_v g(c,v) + 1e-8)

    Args:
        logits: (B, C, *spatial), any floating dtype; computed in float32 or better.
        target: (B, *spatial) or (B, 1, *spatial), class indices as integer, bool or float.
        classes: the classes in the mean; None is 1..C-1.
        process_group: the sums include the samples of all its ranks; gradients are multiplied by the number of ranks.
        valid: (B, *spatial) bool, the voxels that count; None: all.

    Returns:
        0-dim, float32 (float64 for float64 logits); 0 (connected to the graph) for B = 0.

    Source: Su et al., Medical Image Analysis 94 (2024) 103111, and its code (class 1 only there).

    Example:
        >>> import torch
        >>> from rplib.dice import dice_loss
        >>> target = torch.tensor([[0, 1, 1]])
        >>> logits = torch.tensor([[[20.0, -20.0, -20.0], [-20.0, 20.0, 20.0]]])
        >>> abs(round(dice_loss(logits, target).item(), 6))
        0.0
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if target.ndim == logits.ndim:
        target = target.squeeze(1)
    z = valid_only(logits.to(dtype), None if valid is None else valid.unsqueeze(1))
    p = torch.softmax(z, dim=1).flatten(2)  # (B, C, V)
    truth = target.flatten(1)  # (B, V)
    keep = None if valid is None else valid.flatten(1)
    if keep is not None:
        p = p * keep.unsqueeze(1)
    rows = []
    for c in range(1, logits.shape[1]) if classes is None else classes:
        g = (truth == c if keep is None else (truth == c) & keep).to(dtype)
        rows.append(torch.stack([(p[:, c] * g).sum(), p[:, c].sum() + g.sum()]))
    local = torch.stack(rows, dim=1)  # (2, classes): overlap, size
    overlap, size = ranks.as_one_process(local, ranks.detached_sum(local, process_group), process_group)
    terms: Tensor = 1 - (2 * overlap + _SMOOTH) / (size + _SMOOTH)
    return terms.mean()
