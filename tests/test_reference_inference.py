"""Sliding windows: the golden result, the paper's window positions, padding, batches, and the decision."""

import math

import numpy as np
import pytest
import torch
from data_paths import golden_dir
from torch import nn

from rplib.errors import UserError
from rplib.reference.inference.windows import DECODER_1, MEAN, labels, segment, segment_outputs, window_overlap
from rplib.reference.network import MutualVNet


class Stub(nn.Module):
    """A two-decoder network whose logits are functions of the window, for results that can be worked by hand."""

    def __init__(self, *decoders):
        super().__init__()
        self.decoders = decoders
        self.windows = []
        self.anchor = nn.Parameter(torch.zeros(()))  # tells dtype and device, as a real network's weights do

    def forward(self, x):
        self.windows.extend(x)
        logits = [decoder(x) for decoder in self.decoders]
        return logits, [x] * len(logits)


def _foreground(probability):
    """Logits (N, 2, ...) whose softmax gives this foreground probability."""
    return torch.cat([torch.zeros_like(probability), torch.logit(probability)], 1)


@pytest.fixture(scope="module")
def golden():
    return np.load(golden_dir() / "sliding_window.npz")


@pytest.fixture(scope="module")
def golden_network():
    network = MutualVNet(filters=2)
    network.load_state_dict(torch.load(golden_dir() / "mutual_vnet.pth", weights_only=True))
    return network.eval()


@pytest.mark.parametrize("batch", [1, 4])
def test_golden(golden, golden_network, batch):
    stride = (int(golden["stride_xy"]), int(golden["stride_xy"]), int(golden["stride_z"]))
    found = segment(golden_network, golden["image"], golden["patch"].tolist(), stride, batch=batch)

    truth = golden["foreground_score"]
    assert found.label.dtype == np.uint8
    assert found.score.dtype == np.float32
    np.testing.assert_allclose(found.score, truth, rtol=0, atol=1e-5)
    undecided = np.abs(truth - 0.5) < 1e-5
    different = found.label != golden["label"]
    print(f"labels: {different.sum()} of {different.size} differ, {undecided.sum()} voxels are within 1e-5 of 0.5")
    assert not (different & ~undecided).any()
    # Both labels occur in number: the comparison above is no empty one, and undecided voxels are rare.
    assert 0.05 < golden["label"].mean() < 0.95
    assert undecided.mean() < 1e-3


def test_windows_together_equal_windows_one_at_a_time():
    """Of decoder 1 alone and of both, and as a validation decides, on the device; voxels within 1e-5 of 0.5 are counted."""
    torch.manual_seed(2)
    network = MutualVNet(filters=2).eval()
    image = np.random.default_rng(3).normal(size=(24, 19, 16)).astype(np.float32)
    middle = np.median(segment(network, image, (16, 16, 16), (5, 5, 5)).score)
    with torch.no_grad():  # an untrained network gives the same everywhere: shift its decision to the middle
        for decoder in (network.decoder1, network.decoder2):
            decoder.out_conv.bias[1] -= float(np.log(middle / (1 - middle)))
    single = segment_outputs(network, image, (16, 16, 16), (5, 5, 5), batch=1)
    together = segment_outputs(network, image, (16, 16, 16), (5, 5, 5), batch=5)
    first = segment(network, image, (16, 16, 16), (5, 5, 5), batch=5)
    validated = labels(network, image, (16, 16, 16), (5, 5, 5), 5, "cpu").numpy()
    for one, other in [*((single[o], together[o]) for o in single), (single[DECODER_1], first)]:
        np.testing.assert_allclose(one.score, other.score, rtol=0, atol=1e-6)
        undecided = np.abs(one.score - 0.5) < 1e-5
        different = one.label != other.label
        print(f"{different.sum()} of {different.size} labels differ, {undecided.sum()} voxels are within 1e-5 of 0.5")
        assert not (different & ~undecided).any() and undecided.sum() < 10
    assert 0.05 < single[DECODER_1].label.mean() < 0.95
    np.testing.assert_array_equal(validated, first.label)


def test_decoder_2_runs_only_where_it_is_asked_for():
    network, calls = MutualVNet(filters=1).eval(), []
    network.decoder2.register_forward_hook(lambda *_: calls.append(1))
    image = np.zeros((16, 16, 16), np.float32)
    segment(network, image, (16, 16, 16), (16, 16, 16))
    labels(network, image, (16, 16, 16), (16, 16, 16), 1, "cpu")
    assert not calls
    segment(network, image, (16, 16, 16), (16, 16, 16), output=MEAN)
    assert calls


@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [
        ((21,), (8,), (3,)),
        ((112,), (96,), (16,)),
        ((113,), (96,), (16,)),
        ((9,), (8,), (8,)),
        ((20, 11), (8, 4), (3, 4)),
    ],
)
def test_window_positions_are_those_of_the_paper(size, patch, stride):
    # The authors' rule: ceil((size - patch) / stride) + 1 windows per axis, the last one moved back to the image's end.
    expected = np.zeros(size)
    counts = [math.ceil((n - p) / s) + 1 for n, p, s in zip(size, patch, stride, strict=True)]
    starts = [[min(s * i, n - p) for i in range(c)] for n, p, s, c in zip(size, patch, stride, counts, strict=True)]
    for corner in np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(size)):
        expected[tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))] += 1

    network = Stub(lambda x: _foreground(torch.full_like(x, 0.25)))
    image = np.arange(np.prod(size), dtype=np.float32).reshape(size)
    found = segment(network, image, patch, stride, batch=3)
    seen = np.zeros(size)
    for window in network.windows:
        np.add.at(seen, np.unravel_index(window.numpy().astype(int).ravel(), size), 1)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_allclose(found.score, 0.25, rtol=1e-6)


def test_an_image_smaller_than_the_patch_is_padded_with_zeros_on_both_sides():
    network = Stub(_foreground)  # the score is the image
    image = np.full((5, 9, 3), 0.75, dtype=np.float32)
    found = segment(network, image, (8, 8, 8), (4, 4, 4))
    assert found.label.shape == found.score.shape == image.shape
    np.testing.assert_allclose(found.score, 0.75, rtol=1e-6)
    window = network.windows[0][0]
    assert tuple(window.shape) == (8, 8, 8)
    inside = torch.zeros(8, 8, 8, dtype=torch.bool)
    inside[1:6, :, 2:5] = True  # 3 too few: 1 before and 2 behind; 5 too few: 2 and 3
    assert (window[inside] == 0.75).all()
    assert (window[~inside] == 0).all()


def test_the_mean_of_both_is_of_probabilities_and_not_of_logits():
    first, second = (lambda x: _foreground(torch.full_like(x, 0.999)), lambda x: _foreground(torch.full_like(x, 0.1)))
    network, image = Stub(first, second), np.zeros((8, 8, 8), dtype=np.float32)
    found = segment_outputs(network, image, (8, 8, 8), (4, 4, 4))
    np.testing.assert_allclose(found[DECODER_1].score, 0.999, rtol=1e-5)
    np.testing.assert_allclose(found[MEAN].score, 0.5495, rtol=1e-5)
    assert len(network.windows) == 1  # one forward pass serves both
    np.testing.assert_allclose(segment(network, image, (8, 8, 8), (4, 4, 4), output=MEAN).score, 0.5495, rtol=1e-5)


def test_exactly_one_half_is_background():
    network = Stub(lambda x: torch.zeros_like(x).repeat(1, 2, 1, 1, 1))
    found = segment(network, np.zeros((8, 8, 8), dtype=np.float32), (8, 8, 8), (8, 8, 8))
    assert (found.score == 0.5).all()
    assert not found.label.any()


def test_more_than_two_classes_take_the_largest_mean_probability():
    probabilities = torch.tensor([0.4, 0.35, 0.25])  # foreground together 0.6, yet background is the largest
    network = Stub(lambda x: probabilities.log().view(1, 3, 1, 1, 1).expand(len(x), 3, *x.shape[2:]))
    found = segment(network, np.zeros((8, 8, 8), dtype=np.float32), (8, 8, 8), (8, 8, 8))
    assert not found.label.any()
    np.testing.assert_allclose(found.score, 0.6, rtol=1e-5)

    shifted = Stub(lambda x: probabilities.roll(2).log().view(1, 3, 1, 1, 1).expand(len(x), 3, *x.shape[2:]))
    assert (segment(shifted, np.zeros((8, 8, 8), dtype=np.float32), (8, 8, 8), (8, 8, 8)).label == 2).all()


def test_the_network_keeps_its_dtype_and_needs_no_gradient():
    network = MutualVNet(filters=1).double().eval()
    found = segment(network, np.zeros((16, 16, 16), dtype=np.float32), (16, 16, 16), (16, 16, 16))
    assert found.score.dtype == np.float32
    assert all(parameter.grad is None for parameter in network.parameters())


def test_several_channels():
    network = MutualVNet(in_channels=2, filters=1).eval()
    image = np.random.default_rng(1).normal(size=(2, 16, 20, 16)).astype(np.float32)
    assert segment(network, image, (16, 16, 16), (8, 8, 8)).label.shape == (16, 20, 16)


@pytest.mark.parametrize("stride", [(0, 4, 4), (9, 4, 4), (4, 4)])
def test_impossible_strides(stride):
    with pytest.raises(UserError, match=r"stride .* does not fit the patch \(8, 8, 8\)"):
        window_overlap((8, 8, 8), stride)


def test_patch_of_other_dimension_than_the_image():
    with pytest.raises(UserError, match="one size per axis"):
        segment(Stub(_foreground), np.zeros((8, 8), dtype=np.float32), (8, 8, 8, 8), (8, 8, 8, 8))
