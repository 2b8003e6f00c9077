"""Two-stream batches: what is in them, how they are cut, and that their state is all there is to know."""

from collections import Counter

import numpy as np
import pytest

from rplib.errors import UserError
from rplib.reference.config import Config
from rplib.reference.datasets.layouts import Case
from rplib.reference.training.batches import TwoStreamBatches, padding

SMALL = Config(patch=(16, 16, 16), stride=(16, 16, 16), labelled=3)


def label_of(image: np.ndarray) -> np.ndarray:
    return (image // 5 % 2).astype(np.uint8)  # turned or mirrored alone, it fits no longer


def numbered(name: str, shape=(18, 17, 16), labelled=True) -> Case:
    """Every voxel tells where it came from, and so what its label is (`label_of`)."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Case(name, image, label_of(image) if labelled else None)


def cases(labelled=3, unlabelled=5) -> tuple[list[Case], list[Case]]:
    return [numbered(f"L{i}") for i in range(labelled)], [numbered(f"U{i}", labelled=False) for i in range(unlabelled)]


def test_labelled_samples_come_first_and_labels_fit_their_images():
    batches = TwoStreamBatches(*cases(), SMALL)
    for _ in range(10):
        batch = batches.next()
        assert (tuple(batch.images.shape), tuple(batch.labels.shape)) == ((4, 1, 16, 16, 16), (2, 16, 16, 16))
        assert [name[0] for name in batch.names] == ["L", "L", "U", "U"]
        assert str(batch.labels.dtype) == "torch.uint8" and str(batch.images.dtype) == "torch.float32"
        assert np.array_equal(label_of(batch.images[:2, 0].numpy()), batch.labels.numpy())


def test_each_stream_runs_through_all_its_cases_before_one_comes_again():
    batches = TwoStreamBatches(*cases(labelled=3, unlabelled=5), SMALL)
    names = [batches.next().names for _ in range(15)]
    for start, size in ((0, 3), (2, 5)):
        stream = [name for batch in names for name in batch[start : start + 2]]
        for epoch in range(0, len(stream) - size + 1, size):
            assert len(set(stream[epoch : epoch + size])) == size
    assert names[:5] != names[5:10]


def test_labelled_only_training_sees_the_same_labelled_crops():
    both = TwoStreamBatches(*cases(), SMALL)
    alone = TwoStreamBatches(cases()[0], [], SMALL.replace(batch_size=2, consistency=0.0))
    for _ in range(6):
        a, b = both.next(), alone.next()
        assert a.names[:2] == b.names
        assert (a.images[:2] == b.images).all()


@pytest.mark.parametrize("protocol", ["held-out", "paper"])
def test_a_restored_state_resumes_with_the_same_batches(protocol):
    config = SMALL.replace(protocol=protocol)
    going, other = (TwoStreamBatches(*cases(), config) for _ in range(2))
    for _ in range(7):
        going.next()
    other.next()
    other.restore(going.state())
    for _ in range(7):
        a, b = going.next(), other.next()
        assert a.names == b.names
        assert (a.images == b.images).all()
        assert (a.labels == b.labels).all()


def test_the_seed_changes_the_batches():
    first, other = (TwoStreamBatches(*cases(), SMALL.replace(seed=seed)).next() for seed in (1, 2))
    assert first.names != other.names or not (first.images == other.images).all()


def symmetries(protocol: str, draws: int = 400) -> Counter:
    """How often each symmetry of the square is drawn, by where the corners of a cube go."""
    image = np.zeros((16, 16, 16), np.float32)
    image[0, 0], image[0, 15], image[15, 0], image[15, 15] = 1, 2, 3, 4
    case = Case("A", image, image.astype(np.uint8))
    config = SMALL.replace(protocol=protocol, labelled_per_batch=1, batch_size=2)
    seen: Counter = Counter()
    batches = TwoStreamBatches([case], [case], config)
    for _ in range(draws):
        patch = batches.next().images[0, 0, :, :, 8].numpy()
        seen[tuple(patch[patch > 0].astype(int))] += 1
    return seen


def test_every_symmetry_is_equally_likely_when_held_out():
    seen = symmetries("held-out")
    assert len(seen) == 8
    assert all(25 <= count <= 80 for count in seen.values())  # 50 expected, standard deviation 6.6


def test_as_the_authors_the_identity_never_comes():
    """They always mirror; padding by 3 shifts the corners, so look at cases that need none."""
    image = np.zeros((18, 18, 18), np.float32)
    image[8, 8, 8], image[8, 9, 8], image[9, 8, 8], image[9, 9, 8] = 1, 2, 3, 4
    case = Case("A", image, (image > 0).astype(np.uint8))
    batches = TwoStreamBatches([case], [case], SMALL.replace(protocol="paper", labelled_per_batch=1, batch_size=2))
    seen = set()
    for _ in range(200):
        patch = batches.next().images[0, 0].numpy()
        seen.add(tuple(patch[patch > 0].astype(int)))
    assert seen == {(2, 1, 4, 3), (3, 4, 1, 2), (1, 3, 2, 4), (4, 2, 3, 1)}  # the four mirrorings, no rotation


@pytest.mark.parametrize(("protocol", "offsets"), [("held-out", {0, 1, 2}), ("paper", {0, 1})])
def test_offsets_of_the_crop(protocol, offsets):
    """18 voxels and a patch of 16: three offsets are possible, the authors' loader never takes the last."""
    case = Case("A", np.broadcast_to(np.arange(18, dtype=np.float32), (18, 18, 18)).copy(), np.zeros((18,) * 3, np.uint8))
    config = SMALL.replace(protocol=protocol, augmentation="none", labelled_per_batch=1, batch_size=2)
    batches = TwoStreamBatches([case], [case], config)
    assert {int(batches.next().images[0, 0, 0, 0, 0]) for _ in range(60)} == offsets


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 16), (20, 16)])
def test_a_patch_as_large_as_the_image_moves_by_the_margin_alone(shape):
    """Without a margin there is one crop along such an axis; with one, every shift is drawn and the rest is 0."""
    image = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    case, patch = Case("A", image, label_of(image)), (16,) * len(shape)
    config = Config(patch=patch, stride=patch, labelled=3, augmentation="none", labelled_per_batch=1, batch_size=2)
    spare = [size - 16 for size in shape]
    for margin in (0, 2):
        batches = TwoStreamBatches([case], [case], config.replace(crop_margin=margin))
        seen = [set() for _ in shape]
        for _ in range(120):
            plan = batches.draw()
            batch = batches.cut(plan)
            (crop,) = plan.crops[0]
            for axis, start in enumerate(crop.start):
                seen[axis].add(start)
            wide = np.pad(image, margin)
            expected = wide[tuple(slice(s + margin, s + margin + 16) for s in crop.start)]
            assert np.array_equal(batch.images[0, 0].numpy(), expected)
            assert np.array_equal(batch.labels[0].numpy(), np.where(expected > 0, label_of(expected), 0))
        assert seen == [set(range(-margin, n + margin + 1)) for n in spare]


def test_a_margin_never_moves_a_crop_off_the_slices():
    volume = numbered("A", (16, 18, 3))
    config = Config(patch=(16, 16, 1), stride=(16, 16, 1), labelled_per_batch=1, batch_size=2, crop_margin=5)
    batches = TwoStreamBatches([volume], [volume], config)
    starts = [crop.start for _ in range(200) for (crop,) in batches.draw().crops]
    assert {s[2] for s in starts} == {0, 1, 2} and min(min(s[:2]) for s in starts) == -5
    for patch, margin, protocol in (((16, 16), 16, "held-out"), ((32, 16, 1), 16, "held-out"), ((16, 16), 1, "paper")):
        with pytest.raises(UserError, match="crop_margin"):
            Config(patch=patch, stride=(1,) * len(patch), crop_margin=margin, protocol=protocol)


def test_small_volumes_are_padded():
    assert padding((10, 17, 16), (16, 16, 16)) == [(3, 3), (0, 0), (0, 0)]
    assert padding((11, 16, 16), (16, 16, 16)) == [(2, 3), (0, 0), (0, 0)]
    # As the authors do: an axis equal to the patch counts as short, and 3 voxels are spare on each side.
    assert padding((16, 16, 16), (16, 16, 16), as_authors=True) == [(3, 3)] * 3
    assert padding((18, 18, 18), (16, 16, 16), as_authors=True) == [(0, 0)] * 3
    assert padding((10, 17, 16), (16, 16, 16), as_authors=True) == [(6, 6), (2, 2), (3, 3)]


@pytest.mark.parametrize("protocol", ["held-out", "paper"])
def test_a_patch_larger_than_the_volume_works(protocol):
    small = numbered("S", (7, 20, 9))
    batch = TwoStreamBatches([small] * 2, [small] * 2, SMALL.replace(protocol=protocol)).next()
    assert tuple(batch.images.shape) == (4, 1, 16, 16, 16)


def test_as_the_authors_an_incomplete_batch_is_dropped_and_the_unlabelled_order_restarts():
    batches = TwoStreamBatches(*cases(labelled=3, unlabelled=5), SMALL.replace(protocol="paper"))
    names = [batches.next().names for _ in range(40)]
    assert all(len(set(batch[2:])) == 2 for batch in names)  # each epoch is one batch: nothing is left over
    assert all(len(set(batch[:2])) == 2 for batch in names)


def test_streams_that_are_too_short():
    with pytest.raises(UserError, match="0 unlabelled cases for 2 unlabelled samples"):
        TwoStreamBatches(cases()[0], [], SMALL)
    with pytest.raises(UserError, match="1 labelled cases for 2 labelled samples"):
        TwoStreamBatches(cases(1)[0], cases()[1], SMALL.replace(protocol="paper"))
    assert TwoStreamBatches(cases(1)[0], cases()[1], SMALL).next().names[:2] == ["L0", "L0"]
