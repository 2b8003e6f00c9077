"""The functions that users call: check, choose the implementation, compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rplib import dispatch, inputs, lean, naive
from rplib.dice import dice_loss
from rplib.maps import Reliability
from rplib.options import Confidence, CrossEntropyOn, Implementation, Options, Weighting
from rplib.ranks import Group


def reliable_mutual_loss(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    *,
    confidence: Confidence | None = "entropy",
    weighting: Weighting | None = "similarity",
    cross_entropy_on: CrossEntropyOn = "logits",
    eps: float = 1e-6,
    impl: Implementation = "auto",
    check_finite: bool = False,
    process_group: Group = None,
) -> Tensor:
    """Mutual learning with reliable pseudo-labels: at each voxel the more confident network teaches the other.

    Args:
        logits: K >= 2 tensors (B, C, *spatial), C >= 2, 1 to 3 spatial axes, raw network outputs; float16, bfloat16,
            float32 or float64; any strides.
        features: K tensors (B, F, *spatial), what the last 1x1x1 convolution reads; F may differ between networks.
            Needed for ``weighting="similarity"``. They get no gradient.
        confidence: which voxels are taught. ``"entropy"``: where the teacher's entropy is strictly lower;
            ``"max_probability"``: where its largest probability is strictly higher; ``None``: everywhere.
        weighting: how much. ``"similarity"``: by how much the voxel's feature resembles its class prototypes; ``None``: 1.
            Both None is cross pseudo supervision.
        cross_entropy_on: ``"logits"``, or ``"probabilities"`` for the double softmax of the authors' upload of January 2024.
        eps: in the entropy, the prototype count and the normaliser.
        impl: ``"auto"`` (Triton on a GPU that it supports, the lean PyTorch form elsewhere), ``"triton"``, ``"torch"``,
            ``"naive"`` (the paper line by line).
        check_finite: look for NaN and infinities first; synchronises with the device.
        process_group: a torch.distributed group whose ranks hold parts of one batch. Mask counts and loss numerators are
            summed over it: every rank returns the loss of the whole batch, and its gradients are multiplied by the number of
            ranks, so that DistributedDataParallel's average equals the gradient of a single process. None: this process alone.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 input): the sum over ordered pairs of networks, each normalised by
        the number of voxels taught. Computed in float32 or better whatever the input's dtype. A non-finite logit or
        feature gives a non-finite loss.

    Raises:
        TypeError: not a list of tensors, or an integer dtype.
        ValueError: shapes, numbers, devices or keywords that do not fit; an ``impl`` that cannot be had;
            with ``check_finite``, a non-finite value.

    Source: Su et al., Medical Image Analysis 94 (2024) 103111.

    Example:
        >>> import torch
        >>> import rplib
        >>> _ = torch.manual_seed(0)
        >>> logits = [torch.randn(2, 2, 8, 8, 8, requires_grad=True) for _ in range(2)]
        >>> features = [torch.randn(2, 16, 8, 8, 8) for _ in range(2)]
        >>> loss = rplib.functional.reliable_mutual_loss(logits, features)
        >>> loss.backward()
        >>> loss.shape, logits[0].grad.shape
        (torch.Size([]), torch.Size([2, 2, 8, 8, 8]))
    """
    options = Options(confidence, weighting, cross_entropy_on, eps, impl, check_finite, process_group)
    return loss_with(options, logits, features)


def loss_with(options: Options, logits: Sequence[Tensor], features: Sequence[Tensor] | None) -> Tensor:
    """`reliable_mutual_loss` with keywords that were checked before: for modules that keep them."""
    logits, features = _checked(logits, features, options)
    form = dispatch.choose(options.impl, logits, features)
    if form == "triton":
        from rplib.kernels.operators import loss as triton_loss  # here: Triton need not be installed

        return triton_loss(logits, features, options)
    return _loss_in_pytorch(form, logits, features, options)


def objective_with(
    options: Options,
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    target: Tensor,
    dice_weight: float,
    dice_classes: Sequence[int] | None,
    consistency_weight: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rplib.MutualObjective` computes: total, and its terms Dice and mutual, detached."""
    logits, features = _checked(logits, features, options)
    labelled = inputs.check_target(target, logits[0])
    inputs.check_dice_classes(dice_classes, logits[0])
    form = dispatch.choose(options.impl, logits, features)
    if form == "triton":  # Dice inside the kernels' own passes
        from rplib.kernels.operators import objective

        classes = range(1, logits[0].shape[1]) if dice_classes is None else dice_classes
        return objective(logits, features, options, target, dice_weight, classes, consistency_weight)
    mutual = _loss_in_pytorch(form, logits, features, options)
    group = options.process_group
    dice = torch.stack([dice_loss(z[:labelled], target, dice_classes, group) for z in logits]).sum()
    return dice_weight * dice + consistency_weight * mutual, dice.detach(), mutual.detach()


def _loss_in_pytorch(form: dispatch.Form, logits: list[Tensor], features: list[Tensor] | None, options: Options) -> Tensor:
    return naive.loss(logits, features, options) if form == "naive" else lean.loss(logits, features, options)


def reliability(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    *,
    confidence: Confidence | None = "entropy",
    weighting: Weighting | None = "similarity",
    cross_entropy_on: CrossEntropyOn = "logits",
    eps: float = 1e-6,
    impl: Implementation = "auto",
    check_finite: bool = False,
    process_group: Group = None,
) -> list[Reliability]:
    """Which voxels each teacher is reliable at, and how reliable: for people who want to look.

    Takes what `reliable_mutual_loss` takes; with ``impl="triton"`` mask and weight come from the loss's own kernels.

    Returns:
        One `Reliability` per ordered pair, in the order (student, teacher) = (0, 1), (0, 2) .. (1, 0) ..; nothing in it
        carries a gradient. With ``weighting=None`` the weight is the mask, prototypes and similarity are None.

    Raises:
        TypeError, ValueError: as `reliable_mutual_loss`.

    Source: Su et al., Medical Image Analysis 94 (2024) 103111.

    Example:
        >>> import torch
        >>> import rplib
        >>> logits = [torch.randn(1, 2, 4, 4, 4) for _ in range(2)]
        >>> features = [torch.randn(1, 8, 4, 4, 4) for _ in range(2)]
        >>> first, second = rplib.reliability(logits, features)
        >>> (first.student, first.teacher), first.mask.dtype, first.weight.shape
        ((0, 1), torch.bool, torch.Size([1, 4, 4, 4]))
        >>> bool((first.mask & second.mask).any())  # at most one of two networks teaches
        False
    """
    options = Options(confidence, weighting, cross_entropy_on, eps, impl, check_finite, process_group)
    logits, features = _checked(logits, features, options)
    logits = [z.detach() for z in logits]
    features = None if features is None else [f.detach() for f in features]
    form = dispatch.choose(impl, logits, features)
    if form == "naive":
        return naive.maps(logits, features, options)
    if form == "torch":
        return lean.maps(logits, features, options)
    from rplib.kernels.operators import maps as triton_maps

    return triton_maps(logits, features, options)


def _checked(
    logits: Sequence[Tensor], features: Sequence[Tensor] | None, options: Options
) -> tuple[list[Tensor], list[Tensor] | None]:
    needed = options.weighting is not None
    checked_logits, checked_features = inputs.check_tensors(logits, features, features_needed=needed)
    if not needed:
        checked_features = None
    if options.check_finite:
        inputs.check_finite(checked_logits, checked_features)
    return checked_logits, checked_features
