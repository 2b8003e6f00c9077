"""The functional interface: check the arguments, choose the implementation, compute."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rplib import dispatch, inputs, lean, naive, per_voxel
from rplib.averages import Extras, PrototypeAverages
from rplib.maps import Reliability
from rplib.options import Confidence, CrossEntropyOn, Implementation, Options, Prototypes, Reduction, Weighting
from rplib.ranks import Group


def reliable_mutual_loss(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    sample_weights: Tensor | Sequence[float] | None = None,
    *,
    confidence: Confidence | None = "entropy",
    weighting: Weighting | None = "similarity",
    cross_entropy_on: CrossEntropyOn = "logits",
    eps: float = 1e-6,
    impl: Implementation = "auto",
    check_finite: bool = False,
    process_group: Group = None,
    students: tuple[int, ...] | None = None,
    minimum_confidence: float | None = None,
    temperature: float = 1.0,
    class_weights: tuple[float, ...] | None = None,
    prototypes: Prototypes = "sample",
    reduction: Reduction = "mean",
) -> Tensor:
    """Mutual learning with reliable pseudo-labels: at each voxel the more confident network teaches the other.

    Args:
        logits: K >= 2 tensors (B, C, *spatial), C >= 2, 1 to 3 spatial axes, raw network outputs; float16, bfloat16,
            float32 or float64; any strides.
        features: K tensors (B, F, *spatial), the input of the last 1x1x1 convolution; F may differ between networks.
            Required for ``weighting="similarity"``. They get no gradient.
        mask: (B, *spatial) bool, True where a voxel counts; None: everywhere. Other voxels neither teach, learn nor count:
            loss and gradients are those of the problem without them, whatever their values (NaN too).
        sample_weights: (B,) non-negative numbers. They multiply the weights of a sample's voxels, but not the number of voxels
            taught. None: 1 for all.
        confidence: which voxels are taught. ``"entropy"``: where the teacher's entropy is strictly lower;
            ``"max_probability"``: where its largest probability is strictly higher; ``None``: everywhere.
        weighting: how much they count. ``"similarity"``: by the similarity of the voxel's feature to its class prototypes;
            ``None``: 1. Both None is cross pseudo supervision.
        cross_entropy_on: ``"logits"``, or ``"probabilities"`` for the double softmax of the authors' upload of January 2024.
        eps: small constant in the entropy, the prototype count and the normaliser.
        impl: ``"auto"`` (Triton on a GPU that it supports, the lean PyTorch form elsewhere), ``"triton"``, ``"torch"``,
            ``"naive"`` (the paper line by line).
        check_finite: look for NaN and infinities first; synchronises with the device.
        process_group: a torch.distributed group whose ranks hold parts of one batch. Mask counts and loss numerators are
            summed over it. Every rank returns the loss of the whole batch, and its gradients are multiplied by the number of
            ranks, so that DistributedDataParallel's average equals the gradient of a single process. None: only this process.
            ``"world"``: the default group at the time of the call. (``torch.distributed.group.WORLD`` is None before
            init_process_group, so a module built with it at that time would have no group.)
        students: the networks that learn, for example ``(0,)`` if network 1 is a mean teacher; the others only teach, and get
            no gradient. None: all.
        minimum_confidence: a network teaches only where its largest probability is at least this; None: no such limit.
        temperature: T of the teacher's probabilities in the weight, softmax(z_j / T); below 1, a sharper distribution.
        class_weights: C numbers that multiply the weight of a voxel, by its pseudo-label. None: 1 for all.
        prototypes: the mean features of a class in each ``"sample"``, as in the paper, or in the whole ``"batch"``. Only
            `rplib.ReliableMutualLoss` and `rplib.MutualObjective` keep their moving average over the calls, ``"average"``.
        reduction: ``"mean"``: per pair the mean over the voxels taught, as in the paper; ``"sum"``: the sum over them;
            ``"none"``: nothing is summed.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 input): the sum over ordered pairs of networks. Computed in float32 or
        better whatever the input's dtype. A non-finite logit or feature gives a non-finite loss. With ``reduction="none"`` a
        tensor (pairs, B, *spatial) of this process's voxels: weight times cross-entropy, 0 where no network teaches.

    Raises:
        TypeError: not a list of tensors, or an integer dtype.
        ValueError: shapes, numbers, devices or keywords do not fit; the requested ``impl`` is not possible;
            with ``check_finite``, a non-finite value.
        RuntimeError: another rank of the process group did not call the loss within the group's timeout.

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
    options = Options(
        confidence, weighting, cross_entropy_on, eps, impl, check_finite, process_group, students,
        minimum_confidence, temperature, class_weights, prototypes, reduction,
    )  # fmt: skip
    return loss_with(options, logits, features, mask, sample_weights)


def loss_with(
    options: Options,
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    mask: Tensor | None,
    sample_weights: Tensor | Sequence[float] | None = None,
    averages: PrototypeAverages | None = None,
) -> Tensor:
    """`reliable_mutual_loss` with keywords that are already checked, for modules that keep them and the averages."""
    logits, features, mask, extras = prepared(logits, features, mask, options, sample_weights, averages)
    form = dispatch.choose(options.impl, logits, features, dispatch.asked_of(options, mask, extras))
    if form == "triton":
        from rplib.kernels.operators import loss as triton_loss  # here: Triton need not be installed

        return triton_loss(usable_in_autograd(logits), features, options)
    if options.reduction == "none":
        found = (naive if form == "naive" else lean).maps([z.detach() for z in logits], features, options, mask, extras)
        return per_voxel.loss(logits, found, options, mask)
    if form == "naive":
        return naive.loss(logits, features, options, valid=mask, extras=extras)
    return lean.loss(logits, features, options, mask, extras)


def reliability(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    sample_weights: Tensor | Sequence[float] | None = None,
    *,
    confidence: Confidence | None = "entropy",
    weighting: Weighting | None = "similarity",
    cross_entropy_on: CrossEntropyOn = "logits",
    eps: float = 1e-6,
    impl: Implementation = "auto",
    check_finite: bool = False,
    process_group: Group = None,
    students: tuple[int, ...] | None = None,
    minimum_confidence: float | None = None,
    temperature: float = 1.0,
    class_weights: tuple[float, ...] | None = None,
    prototypes: Prototypes = "sample",
    reduction: Reduction = "mean",
) -> list[Reliability]:
    """Which voxels each teacher is reliable at, and how reliable: the decisions of the loss, for inspection.

    Accepts the arguments of `reliable_mutual_loss`. With ``impl="triton"`` mask and weight come from the kernels of the loss.

    Returns:
        One `Reliability` per ordered pair, in the order (student, teacher) = (0, 1), (0, 2) .. (1, 0) ..; its tensors
        carry no gradient. With ``weighting=None`` the weight is the mask, and prototypes and similarity are None. Where a voxel
        does not count, mask and weight are 0, and the label has no meaning. With ``students``, only the pairs whose student
        learns.

    Raises:
        TypeError, ValueError: see `reliable_mutual_loss`.

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
    options = Options(
        confidence, weighting, cross_entropy_on, eps, impl, check_finite, process_group, students,
        minimum_confidence, temperature, class_weights, prototypes, reduction,
    )  # fmt: skip
    return reliability_with(options, logits, features, mask, sample_weights)


def reliability_with(
    options: Options,
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    mask: Tensor | None,
    sample_weights: Tensor | Sequence[float] | None = None,
    averages: PrototypeAverages | None = None,
) -> list[Reliability]:
    """`reliability` with keywords that are already checked."""
    logits, features, mask, extras = prepared(logits, features, mask, options, sample_weights, averages)
    logits = [z.detach() for z in logits]
    form = dispatch.choose(options.impl, logits, features, dispatch.asked_of(options, mask, extras))
    if form == "naive":
        return naive.maps(logits, features, options, mask, extras)
    if form == "torch":
        return lean.maps(logits, features, options, mask, extras)
    from rplib.kernels.operators import maps as triton_maps

    return triton_maps(logits, features, options)


class Prepared(NamedTuple):
    """Checked inputs: plain tensors. Features are detached, as are the logits of networks that do not learn."""

    logits: list[Tensor]
    features: list[Tensor] | None
    mask: Tensor | None
    extras: Extras


def prepared(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    mask: Tensor | None,
    options: Options,
    sample_weights: Tensor | Sequence[float] | None = None,
    averages: PrototypeAverages | None = None,
) -> Prepared:
    """Check the arguments against each other and against the options."""
    if options.prototypes == "average" and averages is None:
        raise ValueError(
            'prototypes="average" keeps state from call to call, and a function has none; use rplib.ReliableMutualLoss or '
            "rplib.MutualObjective."
        )
    needed = options.weighting is not None
    z, f = inputs.check_tensors(logits, features, features_needed=needed)
    options.check_sizes(len(z), z[0].shape[1])
    mask = inputs.check_mask(mask, z[0])
    f = None if f is None or not needed else [t.detach() for t in f]
    if options.students is not None:
        z = [t if k in options.students else t.detach() for k, t in enumerate(z)]
    if options.check_finite:
        inputs.check_finite(z, f, mask)
    return Prepared(z, f, mask, Extras(inputs.check_sample_weights(sample_weights, z[0]), averages))


def usable_in_autograd(logits: list[Tensor]) -> list[Tensor]:
    """The logits, with copies of those made in torch.inference_mode, which the operators cannot save for their backward pass."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not any(z.requires_grad for z in logits):
        return logits
    return [z.clone() if z.is_inference() else z for z in logits]
