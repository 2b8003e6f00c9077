"""The entropy of a voxel as the kernels compare it, against float64: by the formula, and up to the constant eps for small eps."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from rplib.kernels.rules import Rules  # noqa: E402
from rplib.kernels.voxels import _entropy, load_logits, opinion  # noqa: E402

VOXELS = 2048
SIZES = [3, 4, 14]


@triton.jit
def entropy_kernel(z, out, V: tl.constexpr, CLASSES: tl.constexpr, PAD: tl.constexpr, RULES: tl.constexpr):
    at = tl.arange(0, V)[:, None]
    logits = load_logits(z, at, V, at < V, CLASSES, PAD, 0, False, False)
    tl.store(out + at, _entropy(opinion(logits, CLASSES, False), RULES, CLASSES))


def ours(z: torch.Tensor, eps: float) -> np.ndarray:
    """Of logits (C, V)."""
    classes, voxels = z.shape
    out = torch.empty(voxels)
    entropy_kernel[(1,)](z.contiguous(), out, voxels, classes, 1 << (classes - 1).bit_length(), Rules(eps=eps))
    return out.double().numpy()


def exact(z: torch.Tensor, eps: float) -> np.ndarray:
    p = z.double().softmax(0)
    return -(p * (p + eps).log()).sum(0).numpy()


def logits(classes: int, seed: int) -> torch.Tensor:
    """(C, V): from no preference to certainty, so that probabilities of every size down to 0 occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, VOXELS, generator=generator) * torch.logspace(-2, 2, VOXELS)


@pytest.mark.parametrize("eps", [1e-6, 3e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("classes", SIZES)
def test_entropy_up_to_a_constant(classes, eps):
    """For small eps without a logarithm per class; the constant is the eps of the largest class."""
    assert eps * classes <= 5e-5
    z = logits(classes, classes)
    expected = exact(z, eps)
    error = np.abs(ours(z, eps) - eps - expected)
    assert (error <= 2e-6 * np.abs(expected) + 0.006 * (classes - 1) * eps + 1e-12).all(), error.max()


@pytest.mark.parametrize("eps", [1e-4, 0.5])
@pytest.mark.parametrize("classes", SIZES)
def test_entropy_by_the_formula(classes, eps):
    z = logits(classes, classes)
    expected = exact(z, eps)
    np.testing.assert_allclose(ours(z, eps), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", SIZES)
def test_confident_voxels_keep_their_order(classes):
    """The probability of the other classes is far below eps and below what 1 - p resolves in float32."""
    gap = torch.linspace(10, 60, VOXELS)
    z = torch.zeros(classes, VOXELS)
    z[1] = gap
    assert (np.diff(ours(z, 1e-6)) < 0).all()
    assert (np.diff(exact(z[:, gap < 30], 1e-6)) < 0).all()


@pytest.mark.parametrize("classes", SIZES)
def test_a_logit_of_minus_infinity(classes):
    z = logits(classes, 5)
    z[1] = -torch.inf
    without = torch.cat([z[:1], z[2:]])
    expected = exact(without, 1e-6)
    error = np.abs(ours(z, 1e-6) - 1e-6 - expected)
    assert (error <= 2e-6 * np.abs(expected) + 0.006 * (classes - 1) * 1e-6 + 1e-12).all(), error.max()
