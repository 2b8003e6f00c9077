"""How the kernels are launched: how often, on what strides, and with offsets beyond 2^31 elements."""

import pytest
import torch

import rplib

pytest.importorskip("triton")

from rplib.kernels import launch, signatures, tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _networks(classes=2, features=16, spatial=(9, 8, 7), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, classes, *spatial, generator=generator) for _ in range(2)]
    values = [torch.randn(2, features, *spatial, generator=generator) for _ in range(2)]
    return [[t.to(DEVICE, dtype) for t in ts] for ts in (logits, values)]


def _launches(logits, features, **keywords):
    seen = []

    def note(launched):
        seen.append(launched)
        return True

    with launch.observed(note):
        loss = rplib.functional.reliable_mutual_loss(logits, features, impl="triton", **keywords)
        loss.backward()
    return seen


@pytest.mark.parametrize("classes", [2, 4, pytest.param(14, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keywords", [{}, {"weighting": None}, {"confidence": None}], ids=str)
def test_forward_and_backward_take_five_launches(classes, keywords):
    logits, features = _networks(classes)
    names = [seen.kernel.fn.__name__ for seen in _launches([z.requires_grad_() for z in logits], features, **keywords)]
    assert names == ["statistics_kernel", "prototypes_kernel", "weighting_kernel", "loss_kernel", "gradient_kernel"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_tensors_reach_the_kernels_as_they_are(memory_format):
    logits, features = _networks()
    logits = [z.contiguous(memory_format=memory_format).requires_grad_() for z in logits]
    features = [f.contiguous(memory_format=memory_format) for f in features]
    first, _, third, _, last = _launches(logits, features)
    pointers = [t.data_ptr() for t in (*logits, *features)]
    for launched in (first, third):
        assert [t.data_ptr() for t in launched.arguments[:4]] == pointers
        assert launched.constants["FLAT"]
    assert logits[0].grad.stride() == logits[0].stride()
    assert last.constants["FLAT"]


@pytest.mark.parametrize(
    ("shape", "strides", "kind"),
    [
        ((2, 3, 4, 8), (96, 32, 8, 1), "ALIGNED"),
        ((2, 3, 1, 32), (96, 32, 7, 1), "ALIGNED"),  # the stride of an axis of length 1 is never used
        ((1, 3, 4, 8), (99, 32, 8, 1), "ALIGNED"),  # nor that of a single sample
        ((2, 3, 4, 8), (99, 32, 8, 1), "ANY"),  # the second sample begins anywhere
        ((2, 3, 4, 8), (128, 40, 8, 1), "ANY"),  # channels do
        ((2, 3, 5, 7), (112, 48, 7, 1), "ANY"),  # 35 voxels
        ((2, 3, 32), (192, 64, 2), "ANY"),  # two elements from voxel to voxel
        ((2, 3, 4, 8), (192, 64, 16, 1), "ANY"),  # a slice of an axis
        ((2, 3, 4, 8), (96, 32, 1, 4), "ANY"),  # the axes exchanged
        ((2, 3, 4, 8), (96, 1, 24, 3), "PACKED"),
        ((1, 3, 4, 8), (97, 1, 24, 3), "PACKED"),
        ((2, 3, 4, 8), (97, 1, 24, 3), "LAST"),
        ((2, 3, 4, 8), (128, 1, 32, 4), "LAST"),  # three of four channels
        ((2, 3, 4, 8), (192, 1, 48, 3), "LAST"),
        ((2, 2, 4, 8), (64, 1, 16, 2), "PACKED"),
        ((2, 1, 4, 8), (32, 32, 8, 1), "ALIGNED"),
        ((2, 1, 4, 8), (32, 1, 8, 1), "ANY"),  # a stride that is never used, but not a multiple of 16
    ],
)
def test_the_layout_that_a_tensor_is_given(shape, strides, kind):
    """What a kernel may take for granted of its addresses: too much gives wrong values, too little narrow loads."""
    of = launch.geometry(torch.empty_strided(shape, strides, device="meta"))
    assert of.kind == getattr(launch, kind)
    anything = of._replace(kind=launch.ANY)
    assert launch.layout_of([of, of]) == of.kind and launch.layout_of([of, anything]) == launch.ANY
    packed = of._replace(kind=launch.PACKED)
    assert launch.layout_of([of, packed]) == {"PACKED": launch.PACKED, "LAST": launch.LAST}.get(kind, launch.ANY)


def test_sliced_axes_do_not_collapse():
    logits, features = _networks()
    logits = [z[..., 1:-1, :].requires_grad_() for z in logits]
    assert not _launches(logits, [f[..., 1:-1, :] for f in features])[0].constants["FLAT"]


@pytest.mark.parametrize("layout", ["collapses", "does not collapse"])
def test_offsets_beyond_two_to_the_31(layout):
    """The second class lies 2^31 elements behind the first (memory that nobody touches is not taken)."""
    logits, features = _networks(spatial=(5, 4, 3), dtype=torch.float16)
    far = []
    for z in logits:
        gap = 2**31 + 8
        z = z[:1]
        steps = (12, 3, 1) if layout == "collapses" else (40, 7, 1)
        view = torch.empty(gap + 4096, dtype=torch.float16, device=DEVICE).as_strided(z.shape, (4096, gap, *steps))
        far.append(view.copy_(z))
    features = [f[:1] for f in features]
    near = [z.contiguous().detach().requires_grad_() for z in far]
    far = [z.requires_grad_() for z in far]
    (there, *_, back), (here, *_) = _launches(far, features), _launches(near, features)
    assert there.constants["WIDE"]
    assert not here.constants["WIDE"]
    for a, b in zip(far, near, strict=True):
        assert a.grad.abs().sum() > 0
        assert torch.equal(a.grad, b.grad)
    assert back.constants["FLAT"] == (layout == "collapses")


def test_a_sample_of_two_to_the_31_voxels_is_refused():
    logits = [torch.zeros(1, 2, 1, device=DEVICE).expand(1, 2, 2**31) for _ in range(2)]
    with pytest.raises(ValueError, match=r"2147483648 voxels.*2\^31"):
        rplib.functional.reliable_mutual_loss(logits, weighting=None, impl="triton")


def test_every_block_of_voxels_belongs_to_one_program():
    for voxels in (1, 31, 512, 513, 4096, 999_999):
        for block in (32, 512):
            programs, per_program = launch.split(voxels, block, 2, torch.device("cpu"))
            assert (programs - 1) * per_program < max(1, voxels // block) <= programs * per_program


def test_specifications_follow_the_launches():
    specs = list(signatures.iter_specs(2, 16, torch.bfloat16, channels_last=True))
    by_name = {spec.name: spec for spec in specs}
    assert len(specs) == 5
    statistics = by_name["statistics_kernel"]
    assert statistics.signature["za"] == "*bf16"
    assert statistics.signature["sums_a"] == "*fp32"
    assert statistics.constexprs["F_LAYOUT"] == launch.PACKED  # channels last
    assert statistics.constexprs["BLOCK"] == tiling.statistics_tiles(2, 16, 2, channels_last=True).block
    assert [["tt.divisibility", 16]] in statistics.attrs.values()
