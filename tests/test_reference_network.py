"""The two-decoder V-Net and the training step against the authors' network and step (golden vectors)."""

import numpy as np
import pytest
import torch
from data_paths import golden_dir

import rplib
from rplib.errors import UserError
from rplib.reference.checkpoint import load_network
from rplib.reference.network import MutualVNet
from rplib.reference.training.step import training_step


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(golden_dir() / f"{name}.npz") as file:
        return dict(file)


def golden_network() -> MutualVNet:
    return load_network(golden_dir() / "mutual_vnet.pth")[0]


def without_dropout(network: MutualVNet) -> MutualVNet:
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout3d):
            module.p = 0.0
    return network


def error(ours: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy() - exact).max())


def test_the_paper_size_has_12_347_716_parameters():
    assert sum(p.numel() for p in MutualVNet(in_channels=1, classes=2, filters=16).parameters()) == 12_347_716


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_authors_checkpoint_gives_their_logits_in_eval_mode(dtype, tolerance):
    stored, network = golden("mutual_vnet"), golden_network().to(dtype)
    logits, _ = network(torch.from_numpy(stored["image"]).to(dtype))
    assert [error(logits[k], stored[f"eval_logits_{k}"]) <= tolerance for k in range(2)] == [True, True]


def test_the_authors_checkpoint_gives_their_logits_and_features_in_train_mode():
    """float64: the deepest level has 4 values per channel, so float32 statistics are good to 1e-3 only."""
    stored, network = golden("mutual_vnet"), without_dropout(golden_network().double()).train()
    logits, features = network(torch.from_numpy(stored["image"]).double())
    for k in range(2):
        assert error(logits[k], stored[f"train_logits_{k}"]) <= 1e-5
        assert error(features[k], stored[f"train_features_{k}"]) <= 1e-5


def test_features_are_what_the_last_convolution_reads_after_dropout():
    network = MutualVNet(filters=4, dropout=0.5).train()
    logits, features = network(torch.randn(2, 1, 32, 16, 16))
    for decoder, z, f in zip((network.decoder1, network.decoder2), logits, features, strict=True):
        torch.testing.assert_close(decoder.out_conv(f), z, rtol=0, atol=0)
        dropped = (f.flatten(2) == 0).all(2)  # (B, F): whole channels
        assert dropped.any()
        assert not dropped.all()


def other_image_matters(norm: str, dims: int) -> bool:
    """Whether the logits of one image change with the other image of the batch, in training mode."""
    torch.manual_seed(0)
    network = MutualVNet(filters=2, dropout=0.0, dims=dims, norm=norm).double().train()
    image, first, second = torch.randn(3, 1, *(32, 32, 16)[:dims], dtype=torch.float64)
    logits = [network(torch.stack([image, other]))[0][0][0] for other in (first, second)]
    return not torch.allclose(*logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
def test_with_instance_norm_the_images_of_a_batch_share_nothing(dims):
    assert not other_image_matters("instance", dims)
    assert other_image_matters("batch", dims)


def test_instance_norm_has_the_parameters_of_batch_norm_and_no_running_statistics():
    batch, instance = MutualVNet(filters=2), MutualVNet(filters=2, norm="instance")
    assert [(name, p.shape) for name, p in batch.named_parameters()] == [
        (name, p.shape) for name, p in instance.named_parameters()
    ]
    assert not dict(instance.named_buffers())
    image = torch.randn(1, 1, 32, 32, 16)
    trained = without_dropout(instance).train()(image)[0]
    torch.testing.assert_close(instance.eval()(image)[0], trained, rtol=0, atol=0)


def test_an_unknown_norm_or_dimension_is_refused():
    with pytest.raises(ValueError, match="norm is 'group'; expected 'batch' or 'instance'"):
        MutualVNet(filters=2, norm="group")
    with pytest.raises(ValueError, match="dims is 1; expected 2 or 3"):
        MutualVNet(filters=2, dims=1)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_bare_weights_show_which_norm_they_were_trained_with(norm, tmp_path):
    torch.manual_seed(0)
    network = MutualVNet(filters=2, norm=norm).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded, config = load_network(tmp_path / "weights.pth")
    assert config.norm == norm
    image = torch.randn(1, 1, 32, 16, 16)
    torch.testing.assert_close(loaded(image)[0], network(image)[0], rtol=0, atol=0)


def test_decoders_differ_in_how_they_upsample():
    kinds = [
        {type(layer) for layer in decoder.block_five_up.conv}
        for decoder in (MutualVNet(filters=2).decoder1, MutualVNet(filters=2).decoder2)
    ]
    assert torch.nn.ConvTranspose3d in kinds[0]
    assert torch.nn.Upsample not in kinds[0]
    assert torch.nn.Upsample in kinds[1]
    assert torch.nn.ConvTranspose3d not in kinds[1]


def test_the_golden_trajectory_through_the_step_of_rplib_train():
    """20 SGD steps in float64: every loss to 1e-8 absolute, and the evaluation logits after them."""
    stored = golden("training_trajectory")
    network = MutualVNet(filters=2, dropout=0.0).double()
    network.load_state_dict(torch.load(golden_dir() / "training_trajectory_init.pth", weights_only=True))
    optimiser = torch.optim.SGD(
        network.train().parameters(),
        lr=float(stored["lr"]),
        momentum=float(stored["momentum"]),
        weight_decay=float(stored["weight_decay"]),
    )
    objective = rplib.MutualObjective(dice_weight=float(stored["dice_coefficient"]), dice_classes=(1,))
    labelled = int(stored["labeled_batch"])
    losses = [
        training_step(
            network,
            objective,
            optimiser,
            torch.from_numpy(images).double(),
            torch.from_numpy(labels[:labelled]),
            float(stored["consistency_coefficient"]),
        )
        for images, labels in zip(stored["images"], stored["labels"], strict=True)
    ]
    assert len(losses) == 20
    ours = np.array([[float(x) for x in terms] for terms in losses])  # (20, 3): total, dice, mutual
    assert np.abs(ours - stored["losses_float64"]).max() <= 1e-8
    logits, _ = network.eval()(torch.from_numpy(stored["images"][0]).double())
    for k in range(2):
        assert error(logits[k], stored[f"final_eval_logits_{k}_float64"]) <= 1e-8


def test_the_step_never_asks_for_a_value(monkeypatch):
    """No host synchronisation: on a GPU each of these would wait for the device."""
    monkeypatch.setattr("rplib.targets.looks_allowed", lambda _: False)  # labels are looked at on a CPU alone

    def refuse(self, *_):
        raise AssertionError("the training step asked for a value")

    network = MutualVNet(filters=2)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(2, 1, 32, 16, 16), torch.ones(1, 32, 16, 16, dtype=torch.uint8)
    objective = rplib.MutualObjective()
    with monkeypatch.context() as patch:
        for name in ("item", "__float__", "__int__", "__bool__", "tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        terms = training_step(network, objective, optimiser, images, labels, 0.5)
    assert all(torch.isfinite(x) and not x.requires_grad for x in terms)


def test_autocast_holds_for_the_network_and_not_for_the_loss():
    class Pointwise(torch.nn.Module):  # PyTorch's bfloat16 3x3x3 convolutions are not to be trusted on a CPU
        def __init__(self):
            super().__init__()
            self.heads = torch.nn.ModuleList(torch.nn.Conv3d(1, 2, 1) for _ in range(2))

        def forward(self, x):
            self.logits = [head(x) for head in self.heads]
            return self.logits, self.logits

    images, labels = torch.randn(2, 1, 8, 8, 8), torch.ones(1, 8, 8, 8, dtype=torch.uint8)
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        network = Pointwise()
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        terms = training_step(network, rplib.MutualObjective(), optimiser, images, labels, 0.5, dtype)
        assert {z.dtype for z in network.logits} == {expected}
        assert {x.dtype for x in terms} == {torch.float32}


def test_a_state_dict_of_another_network_is_refused(tmp_path):
    state = MutualVNet(filters=2).state_dict()
    state["decoder2.out_conv.weight"] = torch.zeros(2, 3, 1, 1, 1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"do not fit the network.*decoder2\.out_conv\.weight"):
        load_network(tmp_path / "other.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "stranger.pth")
    with pytest.raises(UserError, match="neither a checkpoint"):
        load_network(tmp_path / "stranger.pth")


def test_data_parallel_checkpoints_load(tmp_path):
    network = MutualVNet(filters=2, classes=3)
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, tmp_path / "parallel.pth")
    loaded, config = load_network(tmp_path / "parallel.pth")
    assert (config.filters, config.classes, loaded.training) == (2, 3, False)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
