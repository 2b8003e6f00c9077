"""`rplib.FeatureTap` on nnU-Net's own networks (package dynamic_network_architectures, which nnunetv2 brings)."""

import copy

import pytest
import torch

import rplib

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="comes with the extra nnunet")

STAGES, WIDTHS = 3, (6, 8, 10)


def built(kind: str, dims: int, deep: bool) -> torch.nn.Module:
    conv, norm = (torch.nn.Conv2d, torch.nn.InstanceNorm2d) if dims == 2 else (torch.nn.Conv3d, torch.nn.InstanceNorm3d)
    per_stage = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return getattr(unet, kind)(
        input_channels=1, n_stages=STAGES, features_per_stage=WIDTHS, conv_op=conv, kernel_sizes=3, strides=(1, 2, 2),
        num_classes=3, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=norm, nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=deep, **{per_stage: 1},
    )  # fmt: skip


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet"])
def test_layer_found_and_trained_with(kind, dims, deep):
    """The layer of full resolution, with and without deep supervision, on the network and on its copy."""
    network = built(kind, dims, deep)
    other = copy.deepcopy(network)
    tap = rplib.FeatureTap([network, other])
    images = torch.randn(2, 1, *(16,) * dims)
    outputs = [one(images) for one in (network, other)]
    logits = rplib.unstack(outputs)[0] if deep else outputs
    last = f"decoder.seg_layers.{STAGES - 2}"
    assert tap.layers == [[last], [last]]
    features = tap.features()
    for one, f, z in zip((network, other), features, logits, strict=True):
        assert f.shape == (2, WIDTHS[0], *images.shape[2:])
        torch.testing.assert_close(one.decoder.seg_layers[-1](f), z, rtol=1e-5, atol=1e-5)
    target = torch.randint(0, 3, (1, *images.shape[2:]))
    rplib.MutualObjective()(logits, features, target, 0.1).total.backward()
    assert network.decoder.seg_layers[-1].weight.grad.abs().sum() > 0


def test_switching_deep_supervision_off_for_validation_keeps_the_layer():
    """nnU-Net's trainer does so by an attribute of the decoder."""
    network = built("PlainConvUNet", 2, True)
    tap = rplib.FeatureTap(network)
    images = torch.randn(1, 1, 16, 16)
    assert isinstance(network(images), list) and len(tap.features()) == 1
    network.decoder.deep_supervision = False
    logits = network(images)
    (features,) = tap.features()
    torch.testing.assert_close(network.decoder.seg_layers[-1](features), logits, rtol=1e-5, atol=1e-5)
