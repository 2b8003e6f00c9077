"""gradcheck in float64: numerical differences of the loss itself, away from ties.

Labels, masks and weights are constants of the derivative, so every comparison must keep its outcome while gradcheck moves a logit
by 1e-6. With ``weighting=None`` the loss is then a smooth function, checked as it is for the forms that compute in float64.
With similarity weights the derivative by definition leaves out how the weights depend on the logits: a function whose
weights are frozen is checked numerically, and each implementation's gradient against it.
"""

import pytest
import torch
from loss_cases import ANY_K_IMPLS, IMPLS, networks
from torch.autograd import gradcheck
from truth import confidence_score, frozen_loss, truth

import rplib

CROSS_ENTROPY = pytest.mark.parametrize("cross_entropy_on", ["logits", "probabilities"])
CONFIDENCE = pytest.mark.parametrize("confidence", ["entropy", "max_probability", None])


def away_from_ties(spatial, classes, features, margin=1e-3, **keywords):
    """Random logits with a gap wherever the method compares: largest against second logit, one network against another."""
    for seed in range(1000):
        logits, feats = networks(spatial, classes, features, batch=2, dtype=torch.float64, seed=seed, **keywords)
        gaps = [z.topk(2, dim=1).values for z in logits]
        clear = all((g[:, 0] - g[:, 1] > margin).all() for g in gaps)
        for confidence in ("entropy", "max_probability"):
            scores = [confidence_score(z.flatten(2), confidence, 1e-6) for z in logits]
            clear &= all(((a - b).abs() > margin).all() for k, a in enumerate(scores) for b in scores[k + 1 :])
        if clear:
            return logits, feats
    raise AssertionError("no example away from ties found")


@CONFIDENCE
@CROSS_ENTROPY
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("impl", ANY_K_IMPLS)
def test_without_weighting_the_loss_itself(impl, count, cross_entropy_on, confidence):
    logits, features = away_from_ties((3,), 3, 4, count=count)
    z = [t.requires_grad_() for t in logits]

    def loss(*inputs):
        return rplib.functional.reliable_mutual_loss(
            inputs, features, impl=impl, weighting=None, confidence=confidence, cross_entropy_on=cross_entropy_on
        )

    assert gradcheck(loss, z)


@CONFIDENCE
@CROSS_ENTROPY
@pytest.mark.parametrize("impl", IMPLS)
def test_similarity_with_its_weights_frozen(impl, cross_entropy_on, confidence):
    logits, features = away_from_ties((3, 2), 3, 4)
    keywords = {"confidence": confidence, "cross_entropy_on": cross_entropy_on}
    pairs = truth(logits, features, **keywords).pairs
    z = [t.requires_grad_() for t in logits]
    assert gradcheck(lambda *inputs: frozen_loss(inputs, pairs, cross_entropy_on), z)

    dtype = torch.float32 if impl == "triton" else torch.float64
    ours = [t.detach().to(dtype).requires_grad_() for t in logits]
    loss = rplib.functional.reliable_mutual_loss(ours, [f.to(dtype) for f in features], impl=impl, **keywords)
    # The function frozen by the implementation's own maps: its weights are what it shows.
    own = rplib.reliability([t.detach() for t in ours], [f.to(dtype) for f in features], impl=impl, **keywords)
    frozen = [
        type(pair)(
            **{
                **vars(pair),
                "weight": m.weight.double(),
                "pseudo_label": m.pseudo_label,
                "normaliser": m.mask.sum().double() + 1e-6,
            }
        )
        for pair, m in zip(pairs, own, strict=True)
    ]
    exact = torch.autograd.grad(frozen_loss(z, frozen, cross_entropy_on), z)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for gradient, expected in zip(torch.autograd.grad(loss, ours), exact, strict=True):
        assert (gradient.double() - expected).norm() <= tolerance * expected.norm()


@CROSS_ENTROPY
@pytest.mark.parametrize("impl", IMPLS)
def test_directional_derivative_in_float32(impl, cross_entropy_on):
    """For the forms that have no float64: the float64 formula's difference quotient along the gradient's own direction."""
    logits, _ = away_from_ties((3, 2), 3, 4)
    dtype = torch.float32
    z = [t.to(dtype).requires_grad_() for t in logits]
    loss = rplib.functional.reliable_mutual_loss(z, features=None, impl=impl, weighting=None, cross_entropy_on=cross_entropy_on)
    gradients = [g.double() for g in torch.autograd.grad(loss, z)]
    square = sum(g.square().sum() for g in gradients)
    step = 1e-5 / square.sqrt()
    sides = []
    for sign in (1, -1):
        moved = [t.detach().double() + sign * step * g for t, g in zip(z, gradients, strict=True)]
        sides.append(truth(moved, None, weighting=None, cross_entropy_on=cross_entropy_on).loss)
    quotient = (sides[0] - sides[1]) / (2 * step)
    assert abs(quotient.item() / square.item() - 1) <= 1e-5
