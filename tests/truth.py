"""The method in float64, written from its formulas alone; nothing here calls rplib but `compare`.

Symbols as in the paper: z logits, f features, p probabilities, H entropy, m mask (WHICH), y pseudo-label, mu prototype,
s similarity, r reliability (HOW), w = m r, CE cross-entropy, n normaliser. Pair (i, j): student i learns from teacher j.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class PairTruth:
    """One ordered pair. Maps are (B, *spatial); similarity (B, C, *spatial); prototypes (B, C, F). All float64."""

    student: int
    teacher: int
    mask: Tensor
    near_tie: Tensor
    weight: Tensor
    pseudo_label: Tensor
    cross_entropy: Tensor
    normaliser: Tensor
    prototypes: Tensor | None
    similarity: Tensor | None

    @property
    def loss(self) -> Tensor:
        return (self.weight * self.cross_entropy).sum() / self.normaliser


@dataclass(frozen=True)
class Truth:
    loss: Tensor
    magnitude: Tensor  # sum of |w| CE / n: the scale of the loss where terms of both signs cancel
    gradients: list[Tensor]  # with respect to the logits, by the closed formula
    pairs: list[PairTruth]

    @property
    def near_ties(self) -> int:
        return sum(int(pair.near_tie.sum()) for pair in self.pairs)


def confidence_score(z: Tensor, confidence: str, eps: float) -> Tensor:
    """(B, C, V) float64 -> (B, V); low is confident."""
    p = z.softmax(1)
    if confidence == "entropy":
        return -(p * (p + eps).log()).sum(1)
    assert confidence == "max_probability"
    return -p.amax(1)


def is_near_tie(a: Tensor, b: Tensor, classes: int) -> Tensor:
    """Where float32 arithmetic cannot tell which network is the more confident one."""
    return (a - b).abs() <= 1e-6 * torch.maximum(a.abs(), b.abs()) + 1e-12 + (2e-6 if classes > 2 else 0.0)


def prototypes_and_similarity(z: Tensor, f: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z (B, C, V), f (B, F, V) -> mu (B, C, F), unit or zero, and s (B, C, V)."""
    one_hot = torch.nn.functional.one_hot(z.argmax(1), z.shape[1]).movedim(-1, 1).double()  # (B, C, V)
    mu = torch.einsum("bcv,bfv->bcf", one_hot, f) / (one_hot.sum(2)[..., None] + eps)
    mu = mu / mu.norm(dim=2, keepdim=True).clamp(min=1e-12)
    dot = torch.einsum("bcf,bfv->bcv", mu, f)
    s = dot / (f.norm(dim=1).clamp(min=1e-8)[:, None] * mu.norm(dim=2).clamp(min=1e-8)[..., None])
    return mu, s


def cross_entropy(z: Tensor, y: Tensor, cross_entropy_on: str) -> Tensor:
    """z (B, C, V), y (B, V) -> (B, V)."""
    scores = z if cross_entropy_on == "logits" else z.softmax(1)
    return -scores.log_softmax(1).gather(1, y[:, None])[:, 0]


def cross_entropy_gradient(z: Tensor, y: Tensor, cross_entropy_on: str) -> Tensor:
    """d CE / d z, (B, C, V), by the closed formulas, written without subtracting nearly equal numbers.

    p(y) - 1 = -(sum of the other probabilities), and sum_q p(q) = 1 turns d(c) - sum_q p(q) d(q) into a sum of differences.
    """
    p = z.softmax(1)
    one_hot = torch.zeros_like(z).scatter_(1, y[:, None], 1.0)
    if cross_entropy_on == "logits":
        return torch.where(one_hot > 0, -(p * (1 - one_hot)).sum(1, keepdim=True), p)
    d = p.softmax(1) - one_hot
    return p * (p[:, None] * (d[:, :, None] - d[:, None])).sum(2)  # (B, c, q, V) summed over q


def truth(
    logits: Sequence[Tensor],
    features: Sequence[Tensor] | None,
    *,
    confidence: str | None = "entropy",
    weighting: str | None = "similarity",
    cross_entropy_on: str = "logits",
    eps: float = 1e-6,
    masks: Mapping[Pair, Tensor] | None = None,
    masks_rule: str = "near_ties",
) -> Truth:
    """The formula in float64 on tensors of any dtype.

    ``masks`` are an implementation's own; they are taken at near-ties only (``masks_rule="near_ties"``: outside they must
    agree, else AssertionError) or ``"everywhere"``.
    """
    spatial = logits[0].shape[2:]
    batch, classes = logits[0].shape[:2]
    z = [t.detach().double().reshape(batch, classes, -1) for t in logits]
    score = None if confidence is None else [confidence_score(t, confidence, eps) for t in z]
    mu_s: list[tuple[Tensor, Tensor]] = []
    if weighting is not None:
        assert weighting == "similarity" and features is not None
        f = [t.detach().double().reshape(batch, t.shape[1], -1) for t in features]
        mu_s = [prototypes_and_similarity(a, b, eps) for a, b in zip(z, f, strict=True)]

    gradients = [torch.zeros_like(t) for t in z]
    pairs = []
    for i, j in permutations(range(len(z)), 2):
        if score is None:
            m = torch.ones_like(z[i][:, 0], dtype=torch.bool)
            tie = torch.zeros_like(m)
        else:
            m, tie = score[i] > score[j], is_near_tie(score[i], score[j], classes)
        if masks is not None:
            own = masks[i, j].reshape(batch, -1)
            if masks_rule == "near_ties":
                wrong = (own != m) & ~tie
                assert not wrong.any(), (
                    f"mask of pair {(i, j)} differs at {int(wrong.sum())} of {wrong.numel()} voxels outside near-ties"
                )
            else:
                assert masks_rule == "everywhere"
            m = own
        y = z[j].argmax(1)
        r = torch.ones_like(z[i][:, 0])
        mu = s = None
        if weighting is not None:
            mu, s = mu_s[j]
            r = 1 - (s - z[j].softmax(1)).square().mean(1)
        w = m * r
        n = m.sum().double() + eps
        ce = cross_entropy(z[i], y, cross_entropy_on)
        gradients[i] += (w / n)[:, None] * cross_entropy_gradient(z[i], y, cross_entropy_on)
        pairs.append(
            PairTruth(
                i,
                j,
                m.reshape(batch, *spatial),
                tie.reshape(batch, *spatial),
                w.reshape(batch, *spatial),
                y.reshape(batch, *spatial),
                ce.reshape(batch, *spatial),
                n,
                mu,
                None if s is None else s.reshape(batch, classes, *spatial),
            )
        )
    return Truth(
        torch.stack([pair.loss for pair in pairs]).sum(),
        torch.stack([(pair.weight.abs() * pair.cross_entropy).sum() / pair.normaliser for pair in pairs]).sum(),
        [g.reshape(t.shape) for g, t in zip(gradients, logits, strict=True)],
        pairs,
    )


def frozen_loss(logits: Sequence[Tensor], pairs: Sequence[PairTruth], cross_entropy_on: str = "logits") -> Tensor:
    """The loss as a differentiable function of the logits alone: weights, labels and normalisers of ``pairs`` are constants."""
    total = torch.zeros((), dtype=torch.float64, device=logits[0].device)
    for pair in pairs:
        z = logits[pair.student].double().flatten(2)
        ce = cross_entropy(z, pair.pseudo_label.flatten(1), cross_entropy_on)
        total = total + (pair.weight.flatten(1) * ce).sum() / pair.normaliser
    return total


def autograd_gradients(logits: Sequence[Tensor], pairs: Sequence[PairTruth], cross_entropy_on: str = "logits") -> list[Tensor]:
    """Gradients of `frozen_loss` by autograd: the second witness beside the closed formula."""
    leaves = [t.detach().double().requires_grad_() for t in logits]
    return list(torch.autograd.grad(frozen_loss(leaves, pairs, cross_entropy_on), leaves))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of ``dtype`` at |x|, float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().double())[1] - 1
    spacing = torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent)
    return spacing.clamp(min=info.smallest_normal * info.eps)


# ------------------------------------------------------------------------------------------ an implementation against it


def own_masks(maps) -> dict[Pair, Tensor]:
    return {(m.student, m.teacher): m.mask for m in maps}


def leaves(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Leaves of the graph that share storage and strides with ``tensors``."""
    return None if tensors is None else [t.detach().requires_grad_() for t in tensors]


@dataclass(frozen=True)
class Comparison:
    """One forward and backward of an implementation beside the truth evaluated with its mask at near-ties."""

    loss: Tensor
    gradients: list[Tensor]
    truth: Truth
    maps: list
    upstream: float = 1.0
    truth_gradients: list[Tensor] = field(default_factory=list)

    @property
    def loss_error(self) -> float:
        """Relative to the sum of the absolute terms (equal to the loss where no weight is negative)."""
        error, scale = (self.loss.double() - self.truth.loss).abs().item(), self.truth.magnitude.item()
        return error / scale if scale else error

    @property
    def gradient_errors(self) -> list[float]:
        """||error|| / ||truth|| per network; ||error|| where the truth is zero."""
        errors = []
        for ours, exact in zip(self.gradients, self.truth_gradients, strict=True):
            error, scale = (ours.double() - exact).norm().item(), exact.norm().item()
            errors.append(error / scale if scale else error)
        return errors

    def check(self, tolerance: float = 1e-6, gradient_tolerance: float | None = None) -> None:
        assert self.loss_error <= tolerance, (
            f"loss {self.loss.item():.17g}, truth {self.truth.loss.item():.17g}: {self.loss_error:.2e}"
        )
        for network, error in enumerate(self.gradient_errors):
            limit = tolerance if gradient_tolerance is None else gradient_tolerance
            assert error <= limit, f"gradient of network {network}: ||error||/||truth|| = {error:.2e} > {limit:.0e}"

    def check_maps(self, tolerance: float) -> None:
        """Every map that `rplib.reliability` shows, against the truth."""
        assert [(m.student, m.teacher) for m in self.maps] == [(p.student, p.teacher) for p in self.truth.pairs]
        dtype = torch.float64 if self.loss.dtype == torch.float64 else torch.float32
        for ours, exact in zip(self.maps, self.truth.pairs, strict=True):
            assert ours.mask.dtype == torch.bool and torch.equal(ours.mask, exact.mask)
            assert ours.pseudo_label.dtype == torch.int64 and torch.equal(ours.pseudo_label, exact.pseudo_label)
            for name in ("weight", "prototypes", "similarity"):
                mine, expected = getattr(ours, name), getattr(exact, name)
                if expected is None:
                    assert mine is None, name
                    continue
                assert mine.dtype == dtype and not mine.requires_grad, name
                torch.testing.assert_close(
                    mine.double(), expected, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
                )


def evaluate(impl: str, logits, features, upstream: float = 1.0, **keywords) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one implementation; checks on the way what holds for each call."""
    import rplib

    z, f = leaves(logits), leaves(features)
    before = [(t, t._version, t.detach().clone()) for t in [*logits, *(features or [])]]
    loss = rplib.functional.reliable_mutual_loss(z, f, impl=impl, **keywords)
    assert loss.shape == () and loss.device == logits[0].device
    widest = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    assert loss.dtype == widest, f"loss is {loss.dtype}"
    (loss * upstream).backward()
    for t, version, copy in before:
        assert t._version == version and torch.equal(t.nan_to_num(7.0), copy.nan_to_num(7.0)), "an input was written to"
    for t in f or []:
        assert t.grad is None, "features get no gradient"
    for t in z:
        assert t.grad is not None and t.grad.dtype == t.dtype and t.grad.shape == t.shape
    return loss.detach(), [t.grad for t in z]


def compare(impl: str, logits, features, upstream: float = 1.0, masks_rule: str = "near_ties", **keywords) -> Comparison:
    """Forward, gradient and maps of one implementation beside the truth, by the rule of near-ties."""
    import rplib

    loss, gradients = evaluate(impl, logits, features, upstream, **keywords)
    maps = list(rplib.reliability(logits, features, impl=impl, **keywords))
    exact = truth(logits, features, masks=own_masks(maps), masks_rule=masks_rule, **keywords)
    return Comparison(loss, gradients, exact, maps, upstream, [g * upstream for g in exact.gradients])
