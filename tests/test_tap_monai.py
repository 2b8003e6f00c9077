"""`rplib.FeatureTap` on MONAI's segmentation networks; rplib/README.md has this table, and this test holds it to it."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import rplib

nets = pytest.importorskip("monai.networks.nets")

# name -> (arguments, those without are built below; layer that must be named or None; layer read; F; resolution that it reads)
NETWORKS = {
    "UNet(num_res_units=0)": ((2, 1, 3, (8, 16, 32), (2, 2)), None, "model.2.conv", 16, "half"),
    "UNet(num_res_units=2)": ((2, 1, 3, (8, 16, 32), (2, 2), 3, 3, 2), "model.2.0.conv", "model.2.0.conv", 16, "half"),
    "BasicUNet": ((2, 1, 3, (8, 8, 16, 16, 16, 8)), None, "final_conv", 8, "full"),
    "BasicUNetPlusPlus": ((2, 1, 3, (8, 8, 16, 16, 16, 8)), None, "final_conv_0_4", 8, "full"),
    "VNet": ((2, 1, 3), "out_tr.conv_block", "out_tr.conv_block", 32, "full"),
    "SegResNet": ((2, 8, 1, 3), None, "conv_final.2.conv", 8, "full"),
    "SegResNetDS": ((2, 8, 1, 3), None, "up_layers.2.head", 8, "full"),
    "DynUNet": ((2, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], [8, 16, 32]), None, "output_block.conv.conv", 8, "full"),
    "UNETR": ((), None, "out.conv.conv", 8, "full"),
    "SwinUNETR": ((), None, "out.conv.conv", 12, "full"),
    "AttentionUnet": ((2, 1, 3, (8, 16, 32), (2, 2)), None, "model.2.conv", 8, "full"),
    "HighResNet": ((2, 1, 3), "blocks.11", "blocks.11", 80, "full"),
    "FlexibleUNet": ((), None, "segmentation_head.0", 16, "full"),
    "MedNeXt": ((2, 8, 1, 3), None, "out_0.conv_out", 8, "full"),
}


def built(name):
    arguments = NETWORKS[name][0]
    if name in ("UNETR", "SwinUNETR"):
        pytest.importorskip("einops")
    kind = name.partition("(")[0]
    if kind == "SwinUNETR":
        return nets.SwinUNETR(1, 3, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    if kind == "UNETR":
        return nets.UNETR(1, 3, (64, 64), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4, spatial_dims=2)
    if kind == "FlexibleUNet":
        return nets.FlexibleUNet(1, 3, "efficientnet-b0", spatial_dims=2)
    return getattr(nets, kind)(*arguments)


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_found(name):
    _, layer, expected, channels, resolution = NETWORKS[name]
    network = built(name).eval()
    image = torch.randn(1, 1, 64, 64)
    if layer is not None:  # what the network alone shows is an error, or a layer with as few channels as classes
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rplib.FeatureTap(network)
            with pytest.raises((RuntimeError, UserWarning), match=r"layer="):
                network(image)
    tap = rplib.FeatureTap(network, layer=layer, resize=resolution == "half")
    logits = network(image)
    logits = logits[0] if isinstance(logits, (list, tuple)) else logits
    (features,) = tap.features()
    assert tap.layers == [[expected]] and features.shape == (1, channels, 64, 64)
    layer_object = dict(network.named_modules())[expected]
    if layer is None and resolution == "full":
        torch.testing.assert_close(layer_object(features), logits, rtol=1e-5, atol=1e-5)


def test_stacked_deep_supervision_names_the_way_out():
    """DynUNet stacks interpolated outputs in training; in evaluation it shows its layer."""
    network = nets.DynUNet(2, 1, 3, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], filters=[8, 16, 32, 32], deep_supervision=True)
    image = torch.randn(2, 1, 32, 32)
    rplib.FeatureTap(network)
    with pytest.raises(RuntimeError, match=r"layer='output_block.conv.conv'"):
        network(image)
    tap = rplib.FeatureTap(network)
    assert tap.find(image) == [["output_block.conv.conv"]]
    network.train()
    logits = rplib.unstack([network(image)])[0]
    assert logits[0].shape == (2, 3, 32, 32) and tap.features()[0].shape == (2, 8, 32, 32)


def test_the_documented_table():
    text = (Path(__file__).resolve().parent.parent / "rplib" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([\w=()]+)` \| (`layer=\"([\w.]+)\"`|found) \| `([\w.]+)` \| [^|]+ \| (full|half) \|", text, re.MULTILINE
    )
    documented = {name: (named or None, read, resolution) for name, _, named, read, resolution in rows}
    assert documented == {name: (layer, read, resolution) for name, (_, layer, read, _, resolution) in NETWORKS.items()}
