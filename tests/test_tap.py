"""`rplib.FeatureTap`: which layer it finds, and that what it gives is that layer's input, whatever is done to the network."""

import copy
import io
import pickle
import shutil
import warnings

import pytest
import torch
from tapped_networks import Checkpointed, DeepSupervision, Interpolated, Plain, SharedHead, TwoDecoders, WithFeatures
from torch import nn
from truth import leaves

import rplib

IMAGE = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0))


def out_conv(network):
    return dict(network.named_modules())["out_conv"]


def assert_makes(layer, features, logits):
    """The features are what the layer reads: applied to them again it gives the logits."""
    with torch.no_grad():
        torch.testing.assert_close(layer(features), logits, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", [Plain, WithFeatures])
def test_the_last_convolution_of_two_networks(kind, dims):
    networks = [kind(dims), kind(dims, width=5)]
    tap = rplib.FeatureTap(networks)
    assert tap.layers == [None, None] and "not found yet" in repr(tap)
    image = IMAGE if dims == 2 else torch.randn(2, 1, 4, 6, 8)
    for _ in range(2):
        logits = [network(image) for network in networks]
        features = tap.features()
        for network, z, f in zip(networks, logits, features, strict=True):
            assert f.shape[2:] == image.shape[2:] and not f.requires_grad
            assert_makes(network.out_conv, f, z if kind is Plain else z[0])
    assert (
        tap.layers == [["out_conv"], ["out_conv"]] and repr(tap) == "FeatureTap(networks[0]: 'out_conv', networks[1]: 'out_conv')"
    )
    assert [f.shape[1] for f in features] == [6, 5]


@pytest.mark.parametrize("kind", [TwoDecoders, SharedHead])
def test_two_decoders_in_one_network(kind):
    network = kind()
    tap = rplib.FeatureTap(network)
    for _ in range(2):
        logits = network(IMAGE)
        features = tap.features()
        assert len(features) == 2
        for k, (z, f) in enumerate(zip(logits, features, strict=True)):
            assert_makes(network.heads[k][1] if kind is TwoDecoders else network.out, f, z)
    assert tap.layers == [["heads.0.1", "heads.1.1"] if kind is TwoDecoders else ["out", "out"]]


def test_the_trainers_own_network():
    from rplib.reference.network import MutualVNet

    network = MutualVNet(filters=2, dims=2)
    tap = rplib.FeatureTap(network)
    with pytest.warns(UserWarning, match=r"F = 2 channels for C = 2 classes"):
        _, features = network(torch.randn(2, 1, 16, 16))
    assert all(torch.equal(ours, own) for ours, own in zip(tap.features(), features, strict=True))
    assert tap.layers == [["decoder1.out_conv", "decoder2.out_conv"]]


def test_deep_supervision_counts_at_full_resolution():
    network = DeepSupervision()
    tap = rplib.FeatureTap(network)
    fine = network(IMAGE)[0]
    (f,) = tap.features()
    assert_makes(network.seg_layers[1], f, fine)
    network.eval()
    assert_makes(network.seg_layers[1], *_last(tap, network))


def _last(tap, network):
    z = network(IMAGE)
    return tap.features()[0], z


def test_find_shows_the_layers_and_leaves_the_network_as_it_was():
    network = Plain()
    network.block_two.eval()
    before = copy.deepcopy(network.state_dict())
    tap = rplib.FeatureTap([network])
    assert tap.find(IMAGE) == [["out_conv"]]
    assert network.training and network.block_one.training and not network.block_two.training
    assert all(torch.equal(a, before[k]) for k, a in network.state_dict().items())
    with pytest.raises(RuntimeError, match=r"networks\[0\] has not run"):
        tap.features()


def test_impossible_is_an_error_with_candidates():
    network = Interpolated()
    rplib.FeatureTap(network)
    with pytest.raises(RuntimeError, match=r"(?s)networks\[0\].*layer='body'.*layer='classifier': input \(2, 6, 2, 3\)"):
        network(IMAGE)


def test_named_layer_and_resizing():
    network = Interpolated()
    with pytest.raises(ValueError, match=r"'clasifier'.*'classifier'"):
        rplib.FeatureTap(network, layer="clasifier")
    tap = rplib.FeatureTap(network, layer="classifier")
    network(IMAGE)
    with pytest.raises(ValueError, match=r"classifier.*\(2, 6, 2, 3\).*\(2, 2, 8, 12\).*resize=True"):
        tap.features()
    tap = rplib.FeatureTap(network, layer="classifier", resize=True)
    network(IMAGE)
    (f,) = tap.features()
    expected = nn.functional.interpolate(network.body(IMAGE), size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(f, expected.detach())


def test_layers_per_network_and_per_decoder():
    networks = [Plain(), TwoDecoders()]
    tap = rplib.FeatureTap(networks, layer=["block_two.0", ["heads.0.1", "heads.1.1"]])
    _ = [network(IMAGE) for network in networks]
    assert [f.shape[1] for f in tap.features()] == [6, 5, 6]
    assert rplib.FeatureTap(TwoDecoders(), layer=["heads.1.1", "heads.0.1"]).layers == [["heads.1.1", "heads.0.1"]]
    with pytest.raises(ValueError, match="layer has 3 entries for 2 networks"):
        rplib.FeatureTap(networks, layer=["out_conv"] * 3)


def test_few_channels_are_remarked_on_once():
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1))
    for layer in (None, "1"):
        tap = rplib.FeatureTap(network, layer=layer)
        with pytest.warns(UserWarning, match=r"'1' of networks\[0\] has F = 3 channels for C = 3 classes.*layer="):
            network(IMAGE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network(IMAGE)
        assert tap.features()[0].shape == (2, 3, 8, 12)


# ------------------------------------------------------------------------------------------------- reading


def test_features_are_read_once():
    networks = [Plain(), Plain()]
    tap = rplib.FeatureTap(networks)
    with pytest.raises(RuntimeError, match=r"networks\[0\] has not run"):
        tap.features()
    networks[0](IMAGE)
    with pytest.raises(RuntimeError, match=r"networks\[1\] has not run"):
        tap.features()
    _ = [network(IMAGE) for network in networks]
    assert len(tap.features()) == 2
    with pytest.raises(RuntimeError, match="has not run"):
        tap.features()


def test_the_last_forward_pass_counts():
    network = Plain(has_dropout=False)
    tap = rplib.FeatureTap(network)
    network(IMAGE)
    z = network(IMAGE * 2)
    assert_makes(network.out_conv, tap.features()[0], z)


def test_a_new_tap_replaces_the_old_one_and_remove_takes_all_hooks_away():
    network = Plain()
    old, new = rplib.FeatureTap(network), rplib.FeatureTap(network)
    network(IMAGE)
    assert len(new.features()) == 1
    with pytest.raises(RuntimeError, match="has not run"):
        old.features()
    new.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_networks_that_share_an_encoder():
    encoder = nn.Conv2d(1, 6, 3, padding=1)
    networks = [nn.Sequential(encoder, nn.Conv2d(6, 2, 1)) for _ in range(2)]
    tap = rplib.FeatureTap(networks)
    for _ in range(2):
        logits = [network(IMAGE * (k + 1)) for k, network in enumerate(networks)]
        for network, z, f in zip(networks, logits, tap.features(), strict=True):
            assert_makes(network[1], f, z)


def test_mistakes():
    network = Plain()
    with pytest.raises(ValueError, match=r"networks\[1\] is given twice"):
        rplib.FeatureTap([network, network])
    with pytest.raises(TypeError, match=r"networks\[0\] is a str"):
        rplib.FeatureTap(["network"])
    with pytest.raises(ValueError, match="networks is empty"):
        rplib.FeatureTap([])
    with pytest.raises(ValueError, match=r"networks\[0\] is compiled already"):
        rplib.FeatureTap(torch.compile(network, backend="eager"))


# ------------------------------------------------------------------------------------------------- what people do to networks


@pytest.mark.parametrize("found", [False, True])
def test_a_copy_never_writes_into_the_originals_features(found):
    """The mean teacher of a tapped student, copied before and after a forward pass whose features were not read."""
    student = Plain(has_dropout=False)
    tap = rplib.FeatureTap(student)
    if found:
        student(IMAGE)
    teacher = copy.deepcopy(student)
    z = student(IMAGE)
    teacher(-3 * IMAGE)
    assert_makes(student.out_conv, tap.features()[0], z)
    both = rplib.FeatureTap([student, teacher])
    logits = [student(IMAGE), teacher(-3 * IMAGE)]
    for network, z, f in zip((student, teacher), logits, both.features(), strict=True):
        assert_makes(network.out_conv, f, z)


def test_a_copied_tap_reads_its_own_copies():
    network = Plain(has_dropout=False)
    tap = rplib.FeatureTap([network])
    network(IMAGE)
    again = copy.deepcopy(tap)
    assert again.networks[0] is not network
    z, other = network(IMAGE), again.networks[0](2 * IMAGE)
    assert_makes(network.out_conv, tap.features()[0], z)
    assert_makes(network.out_conv, again.features()[0], other)


@pytest.mark.parametrize("found", [False, True])
def test_saving_and_loading_a_whole_network(found):
    network = Plain(has_dropout=False)
    tap = rplib.FeatureTap(network)
    if found:
        network(IMAGE)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    z = loaded(IMAGE)
    new = rplib.FeatureTap(loaded)
    z = loaded(IMAGE)
    assert_makes(loaded.out_conv, new.features()[0], z)
    assert pickle.loads(pickle.dumps(tap)).layers == tap.layers
    assert list(network.state_dict()) == list(Plain().state_dict())


def test_averaged_model_of_a_tapped_network():
    network = Plain(has_dropout=False)
    tap = rplib.FeatureTap(network)
    average = torch.optim.swa_utils.AveragedModel(network)
    z = network(IMAGE)
    average(-IMAGE)
    assert_makes(network.out_conv, tap.features()[0], z)


def test_activation_checkpointing_does_not_bring_old_features_back():
    network = Checkpointed(has_dropout=False)
    tap = rplib.FeatureTap(network)
    for _ in range(2):
        z = network(IMAGE)
        assert_makes(network.out_conv, tap.features()[0], z)
        z.square().sum().backward()  # computes the forward pass again
        with pytest.raises(RuntimeError, match="has not run"):
            tap.features()
    outer = Plain(has_dropout=False)
    tap = rplib.FeatureTap(outer)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # computes the forward pass again to its end
        z = torch.utils.checkpoint.checkpoint(outer, IMAGE, use_reentrant=False)
    assert_makes(outer.out_conv, tap.features()[0], z)
    z.square().sum().backward()
    with pytest.raises(RuntimeError, match="has not run"):
        tap.features()


@pytest.mark.parametrize("order", ["find", "forward", "layer"])
def test_compiled(order):
    network = Plain(has_dropout=False)
    tap = rplib.FeatureTap(network, layer="out_conv" if order == "layer" else None)
    if order == "find":
        tap.find(IMAGE)
    elif order == "forward":
        network(IMAGE)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    for scale in (1, 2, 3):
        z = compiled(scale * IMAGE)
        assert_makes(network.out_conv, tap.features()[0], z)
    z.sum().backward()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor on a CPU needs a C++ compiler")
@pytest.mark.slow
def test_compiled_by_inductor():
    network = Plain(has_dropout=False).eval()
    tap = rplib.FeatureTap(network)
    network(IMAGE)
    torch._dynamo.reset()
    compiled = torch.compile(network)
    for scale in (1, 2):
        z = compiled(scale * IMAGE)
        assert_makes(network.out_conv, tap.features()[0], z)


def test_compiled_too_early_is_an_error():
    network = Plain()
    rplib.FeatureTap(network)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"run one forward pass before torch.compile"):
        torch.compile(network, backend="eager", fullgraph=True)(IMAGE)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        network = Plain(has_dropout=False)
        inside = rplib.FeatureTap(network)
        parallel = nn.parallel.DistributedDataParallel(network)
        z = parallel(IMAGE)
        z.sum().backward()
        assert_makes(network.out_conv, inside.features()[0], z)
        outside = rplib.FeatureTap(parallel)
        z = parallel(IMAGE)
        assert_makes(network.out_conv, outside.features()[0], z)
        assert outside.layers == [["module.out_conv"]]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_a_teacher_without_a_graph(how):
    student, teacher = Plain(), Plain()
    tap = rplib.FeatureTap([student, teacher])
    with how():
        taught = teacher(IMAGE)
    loss = rplib.ReliableMutualLoss(students=(0,))([student(IMAGE), taught], tap.features())
    loss.backward()
    assert student.out_conv.weight.grad.abs().sum() > 0 and teacher.out_conv.weight.grad is None


def test_a_training_step_as_people_write_it():
    """Features read by hand and by the tap give the same loss and gradients."""
    torch.manual_seed(3)
    networks = [Plain(has_dropout=False), Plain(has_dropout=False)]
    twins = copy.deepcopy(networks)
    tap = rplib.FeatureTap(networks)
    objective = rplib.MutualObjective()
    target = (IMAGE[:1, 0] > 0).long()
    logits = [network(IMAGE) for network in networks]
    objective(logits, tap.features(), target, 0.5).total.backward()
    features = [twin.body(IMAGE) for twin in twins]
    objective([t.out_conv(f) for t, f in zip(twins, features, strict=True)], leaves(features), target, 0.5).total.backward()
    for network, twin in zip(networks, twins, strict=True):
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
