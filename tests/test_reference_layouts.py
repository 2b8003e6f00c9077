"""Pancreas-CT, BraTS and one's own NIfTI folder as data sets; C classes, several channels and 2-D from file to score."""

import csv
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from reference_tools import TINY, mistake

from rplib import cli
from rplib.errors import UserError
from rplib.reference.checkpoint import load_network
from rplib.reference.config import Config, load_recipe
from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.layouts import Brats, NiftiFolder, Pancreas, guess_layout, open_dataset, open_for, split_training
from rplib.reference.datasets.nifti import normalised
from rplib.reference.evaluation import metrics
from rplib.reference.inference.windows import segment
from rplib.reference.network import MutualVNet
from rplib.reference.training.batches import TwoStreamBatches

AFFINE = np.array([[-0.5, 0, 0, 40.0], [0, 1.5, 0, -20.0], [0, 0, 2.0, 7.0], [0, 0, 0, 1]])


def write_h5(path: Path, **arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def check(capsys, *arguments) -> tuple[int, str]:
    code = cli.main(["data", "check", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out


# ---------------------------------------------------------------------------------------------------------- h5 layouts


def test_pancreas_layout(tmp_path, capsys):
    image, label = np.random.default_rng(0).random((6, 5, 4)), np.zeros((6, 5, 4), np.float32)
    label[2:4, 2:4] = 1
    for name in ("image0001", "image0002"):
        write_h5(tmp_path / "Pancreas_h5" / f"{name}_norm.h5", image=image, label=label)
    write_h5(tmp_path / "Pancreas_h5" / "image0003_norm.h5", image=image)  # unlabelled
    (tmp_path / "train.list").write_text("image0001\nimage0003\n")
    (tmp_path / "test.list").write_text("image0002\n")
    assert guess_layout(tmp_path) == "pancreas"
    dataset = open_dataset(tmp_path, "pancreas")
    assert isinstance(dataset, Pancreas)
    case = dataset.load("image0001", needs_label=True)
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(case.label, label)
    assert dataset.has_label("image0001") and not dataset.has_label("image0003")
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "2 training cases (1 without a label), 1 test cases; 6-6 x 5-5 x 4-4 voxels" in out
    write_h5(tmp_path / "Pancreas_h5" / "image0003_norm.h5", image=image, label=label + 0.5)
    code, out = check(capsys, tmp_path)
    assert code == 2
    assert "image0003_norm.h5: 'label' has 120 voxels outside the classes" in out


def write_brats(root: Path) -> None:
    image = np.random.default_rng(0).random((6, 5, 4), np.float32)
    label = np.zeros((6, 5, 4), np.uint8)
    label[1, 1, 1], label[2, 2, 2], label[3, 3, 3] = 1, 2, 4
    for name in "ABCD":
        write_h5(root / "data" / f"{name}.h5", image=image, label=label.astype(np.float32) if name == "B" else label)
    (root / "train.txt").write_text("A,HGG\nB , LGG, more\n\n")
    (root / "val.txt").write_text("C\n")
    (root / "test.txt").write_text("D,\n")


def test_brats_layout(tmp_path, capsys):
    write_brats(tmp_path)
    assert guess_layout(tmp_path) == "brats"
    dataset = open_dataset(tmp_path, "brats")
    assert isinstance(dataset, Brats)
    assert [dataset.names(split) for split in dataset.splits] == [["A", "B"], ["C"], ["D"]]
    for name in "AB":  # whole tumour: every label above 0
        label = dataset.load(name, needs_label=True).label
        assert (label.sum(), label.max(), label.dtype) == (3, 1, np.uint8)
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "2 training cases (0 without a label), 1 validation cases, 1 test cases" in out
    for bad in (-1, 0.5, np.nan):
        write_h5(tmp_path / "data" / "A.h5", image=np.zeros((2, 2, 2)), label=np.full((2, 2, 2), bad))
        with pytest.raises(UserError, match=r"A\.h5: 'label' has 8 voxels outside"):
            dataset.load("A")
    (tmp_path / "val.txt").write_text("A\n")
    (tmp_path / "test.txt").unlink()
    code, out = check(capsys, tmp_path)
    assert code == 2
    assert "case A is in train.txt and in val.txt" in out
    assert f"no test.txt in {tmp_path}" in out


def test_layouts_with_one_channel_and_three_axes_say_so(tmp_path):
    write_brats(tmp_path)
    with pytest.raises(UserError, match="'brats' has one channel and three axes"):
        open_for(load_recipe("brats-25", ["in_channels=4"]), tmp_path)
    with pytest.raises(UserError, match="'brats' has one channel and three axes"):
        open_for(load_recipe("brats-25", ["patch=96,96", "stride=64,64"]), tmp_path)


def test_training_and_evaluation_on_brats_under_both_protocols(tmp_path, capsys):
    """`paper` chooses on val.txt here; the test list is not opened."""
    random = np.random.default_rng(0)
    for name in "ABCDEF":
        label = np.zeros((18, 17, 16), np.uint8)
        label[4:12, 4:12, 4:12] = random.choice([1, 2, 4], (8, 8, 8))
        write_h5(tmp_path / "d" / "data" / f"{name}.h5", image=random.random(label.shape) + (label > 0), label=label)
    for split, names in (("train", "ABCD"), ("val", "E"), ("test", "F")):
        (tmp_path / "d" / f"{split}.txt").write_text("".join(f"{name},x\n" for name in names))
    settings = [*TINY, "labelled=2", "iterations=3", "protocol=paper", "validate_from=1", "validate_every=1"]
    (tmp_path / "d" / "test.txt").rename(tmp_path / "hidden")
    arguments = ["--data", tmp_path / "d", "--out", tmp_path / "run", "--device", "cpu"]
    assert cli.main([str(w) for w in ["train", "--recipe", "brats-25", *arguments, "--set", *settings]]) == 0
    err = capsys.readouterr().err
    assert "selected on the VAL list" in err
    (tmp_path / "hidden").rename(tmp_path / "d" / "test.txt")
    for split, name in (("val", "E"), ("test", "F")):
        arguments = ["evaluate", tmp_path / "run", "--data", tmp_path / "d", "--split", split, "--device", "cpu"]
        assert cli.main([str(word) for word in arguments]) == 0
        rows = read(tmp_path / "run" / f"evaluation-{split}" / "scores.csv")
        assert {row["case"] for row in rows} == {name}
    capsys.readouterr()
    la = ["--split", "val", "--device", "cpu"]
    (tmp_path / "d" / "2018LA_Seg_Training Set").mkdir()
    config = (tmp_path / "run" / "config.toml").read_text().replace('dataset = "brats"', 'dataset = "left-atrium"')
    (tmp_path / "run" / "config.toml").write_text(config)
    assert "'left-atrium' has no val list" in mistake(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "d", *la)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------ NIfTI folder


def test_a_folder_of_3d_images(tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
    label = np.zeros((6, 5, 4), np.uint8)
    label[1, 1, 1], label[2, 2, 2] = 1, 2
    for number in range(1, 7):
        write_nifti(tmp_path / "images" / f"patient_{number:04d}.nii.gz", image)
    for number in range(1, 6):
        write_nifti(tmp_path / "labels" / f"patient_{number:04d}.nii.gz", label)
    assert guess_layout(tmp_path) == "generic"
    dataset = open_dataset(tmp_path, "generic", classes=3)
    assert isinstance(dataset, NiftiFolder)
    assert (dataset.dims, dataset.channels) == (3, 1)
    train, test = dataset.names("train"), dataset.names("test")
    assert (len(train), len(test)) == (5, 1)  # a fifth of the five labelled
    assert sorted(train + test) == [f"patient_{number:04d}" for number in range(1, 7)]
    assert train[-1] == "patient_0006"  # unlabelled ones come last
    case = dataset.load(train[0], needs_label=True)
    np.testing.assert_allclose(case.image, (image - image.mean()) / image.std(), atol=1e-6)
    assert case.image.dtype == np.float32
    np.testing.assert_array_equal(case.label, label)
    np.testing.assert_array_equal(case.affine, AFFINE)
    assert dataset.load("patient_0006").label is None
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "3-D, 1 channel, labels 0, 1, 2: --set in_channels=1 classes=3" in out
    assert f"a fifth of the labelled cases is held out for testing ({test[0]})" in out
    with pytest.raises(UserError, match=r"has 1 voxels outside the classes 0\.\.1 \(the first is 2\)"):
        open_dataset(tmp_path, "generic", classes=2).load(train[0])
    (tmp_path / "test.list").write_text("patient_0002\n")
    assert open_dataset(tmp_path, "generic").names("train") == [f"patient_000{n}" for n in (1, 3, 4, 5, 6)]
    (tmp_path / "train.list").write_text("patient_0006\npatient_0001\n")
    dataset = open_dataset(tmp_path, "generic")
    split = split_training(dataset, load_recipe("generic"))
    assert (split.labelled, split.unlabelled) == (["patient_0001"], ["patient_0006"])


@pytest.mark.parametrize("layout", ["suffixes", "one file", "vector"])
def test_channels_in_files_or_in_one(tmp_path, capsys, layout):
    channels = np.random.default_rng(0).random((3, 6, 5, 4)).astype(np.float32)
    for name in ("a", "b_0001"):
        if layout == "suffixes":
            for number, channel in enumerate(channels):
                write_nifti(tmp_path / "images" / f"{name}_{number:04d}.nii.gz", channel)
        else:
            stored = np.moveaxis(channels, 0, -1)
            write_nifti(tmp_path / "images" / f"{name}.nii", stored if layout == "one file" else stored[:, :, :, None])
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", np.ones((6, 5, 4), np.uint8))
    for count in (None, 3):
        dataset = open_dataset(tmp_path, "generic", channels=count)
        assert (dataset.channels, dataset.dims) == (3, 3)
        assert sorted(dataset.names("train") + dataset.names("test")) == ["a", "b_0001"]
        image = dataset.load("b_0001").image
        expected = (channels - channels.mean((1, 2, 3), keepdims=True)) / channels.std((1, 2, 3), keepdims=True)
        np.testing.assert_allclose(image, expected, atol=1e-5)
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "6-6 x 5-5 x 4-4 voxels" in out and "3-D, 3 channels" in out
    with pytest.raises(UserError, match=r"channels"):
        open_dataset(tmp_path, "generic", channels=2).load("a")


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 1, 2), (6, 5, 2)])
def test_2d_images(tmp_path, shape):
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    channels = 2 if shape[-1] == 2 else 1
    for name in "ab":
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", image)
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", np.eye(6, 5, dtype=np.uint8).reshape(6, 5, *[1] * (name == "b")))
    dataset = open_dataset(tmp_path, "generic", channels=channels, dims=2, normalisation="none")
    for name in "ab":
        case = dataset.load(name)
        np.testing.assert_array_equal(case.label, np.eye(6, 5))
        expected = np.moveaxis(image.reshape(6, 5, 2), 2, 0) if channels == 2 else image.reshape(6, 5)
        np.testing.assert_array_equal(case.image, expected)
    if len(shape) == 2:  # the others may be read as 3-D images as well
        with pytest.raises(UserError, match="expected a 3-D image"):
            open_dataset(tmp_path, "generic", channels=channels, dims=3).load("a")


def test_normalisations():
    image = np.array([[0.0, 2.0], [4.0, 6.0]], np.float32)
    np.testing.assert_allclose(normalised(image, "z-score"), (image - 3) / np.sqrt(5), atol=1e-6)
    np.testing.assert_allclose(normalised(image, "z-score-nonzero") * np.sqrt(8 / 3), [[0, -2], [0, 2]], atol=1e-6)
    np.testing.assert_array_equal(normalised(image, "none"), image)
    ramp = np.arange(1001, dtype=np.float32)
    clipped = np.clip(ramp, 5, 995)
    np.testing.assert_allclose(normalised(ramp, "percentiles"), (clipped - clipped.mean()) / clipped.std(), atol=1e-5)
    for how in ("z-score", "z-score-nonzero", "percentiles"):
        assert not normalised(np.full((3, 3), 7.0, np.float32), how).any()
    assert normalised(image, "z-score").dtype == np.float32


def test_bad_nifti_files_are_reported(tmp_path, capsys):
    image, label = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32), np.ones((6, 5, 4), np.uint8)
    images, labels = tmp_path / "images", tmp_path / "labels"
    for name in "abcdefghi":
        write_nifti(images / f"{name}.nii.gz", image)
        write_nifti(labels / f"{name}.nii.gz", label)
    (images / "a.nii.gz").write_bytes((images / "a.nii.gz").read_bytes()[:-200])
    (labels / "b.nii.gz").write_bytes(b"nothing")
    write_nifti(labels / "c.nii.gz", label[:5])
    write_nifti(labels / "d.nii.gz", label, AFFINE + np.diag([0, 0, 0.2, 0]))
    write_nifti(labels / "e.nii.gz", label * 0.5)
    write_nifti(labels / "f.nii.gz", 0 * label)
    write_nifti(images / "g.nii.gz", np.where(image > 0.9, np.nan, image))
    write_nifti(images / "h.nii.gz", np.stack([image, image], -1))
    (tmp_path / "train.list").write_text("a\nb\nc\nd\ne\nf\ng\nh\nnobody\n")
    (tmp_path / "test.list").write_text("i\n")
    code, out = check(capsys, tmp_path, "--channels", "1")
    assert code == 2
    for path, reason in [
        (images / "a.nii.gz", "not a readable NIfTI file"),
        (labels / "b.nii.gz", "not a readable NIfTI file"),
        (labels / "c.nii.gz", "has shape (5, 5, 4) but"),
        (labels / "d.nii.gz", "affines that differ by 0.60 mm at the corners"),
        (labels / "e.nii.gz", "outside the classes"),
        (images / "f.nii.gz", "contains only background"),
        (images / "g.nii.gz", "NaN or infinite"),
        (images / "h.nii.gz", "has 2 channels; expected 1"),
        (images / "nobody.nii.gz", "has no file"),
    ]:
        assert any(str(path) in line and reason in line for line in out.splitlines()), (path, reason, out)
    write_nifti(labels / "stranger.nii.gz", label)
    assert "stranger.nii.gz has no matching image" in mistake(capsys, "data", "check", tmp_path)
    assert "no .nii or .nii.gz file in" in mistake(capsys, "data", "check", tmp_path / "images", "--layout", "generic")


def test_missing_channels_and_mixed_grids_are_reported(tmp_path, capsys):
    image = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    for name in "ab":
        for channel in (0, 1):
            write_nifti(tmp_path / "images" / f"{name}_{channel:04d}.nii.gz", image)
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", np.ones((6, 5, 4), np.uint8))
    write_nifti(tmp_path / "images" / "a_0001.nii.gz", image, np.diag([3, 1, 1, 1.0]))
    code, out = check(capsys, tmp_path)
    assert code == 2
    assert "a_0001.nii.gz and" in out and "mm at the corners" in out
    (tmp_path / "images" / "a_0001.nii.gz").unlink()
    assert "has the channels 0000 of case a; expected 0000, 0001" in mistake(capsys, "data", "check", tmp_path)
    (tmp_path / "images" / "a_0000.nii.gz").unlink()
    (tmp_path / "labels" / "a.nii.gz").unlink()
    assert "1 labelled cases; expected at least two" in check(capsys, tmp_path)[1]


def test_other_orientations_and_voxel_sizes_are_remarked(tmp_path, capsys):
    image = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    for name, affine in (("a", AFFINE), ("b", np.diag([0.5, 1.5, 4.0, 1]))):
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", image, affine)
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", np.ones((6, 5, 4), np.uint8), affine)
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "1 of 2 images are stored in orientation " in out
    assert "LAS; different: b (RAS)" in out or "RAS; different: a (LAS)" in out
    assert "larger or smaller than the usual 0.5 x 1.5 x 2 mm: b (0.5 x 1.5 x 4)" in out


# --------------------------------------------------------------------------------------- network and batches for 2-D


def test_the_network_in_two_dimensions_has_the_same_keys():
    flat, deep = MutualVNet(3, 4, 2, dims=2), MutualVNet(3, 4, 2)
    assert flat.state_dict().keys() == deep.state_dict().keys()
    logits, features = flat(torch.zeros(2, 3, 32, 16))
    assert [tuple(z.shape) for z in logits] == [(2, 4, 32, 16)] * 2
    assert [tuple(f.shape) for f in features] == [(2, 2, 32, 16)] * 2
    sum(z.square().mean() for z in flat.train()(torch.randn(2, 3, 32, 32))[0]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flat.parameters())
    assert {p.ndim for p in flat.parameters()} == {1, 4}


def test_a_2d_state_dict_alone_loads(tmp_path):
    network = MutualVNet(2, 3, 2, dims=2).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded, config = load_network(tmp_path / "weights.pth")
    assert (config.in_channels, config.classes, config.filters, len(config.patch)) == (2, 3, 2, 2)
    image = torch.randn(1, 2, 32, 32)
    assert torch.equal(loaded(image)[0][0], network(image)[0][0])


@pytest.mark.parametrize("protocol", ["held-out", "paper"])
@pytest.mark.parametrize("shape", [(20, 17), (20, 17, 18)])
def test_channels_and_labels_of_a_crop_stay_together(protocol, shape):
    """Each voxel tells where it was; turned, mirrored or cut apart from the others it would tell something else."""
    place = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    case = Case("A", np.stack([place, 2 * place, -place]), (place % 7).astype(np.uint8))
    size = (16,) * len(shape)
    config = Config(in_channels=3, classes=7, patch=size, stride=size, protocol=protocol, labelled=1, labelled_per_batch=1)
    batches = TwoStreamBatches([case], [case] * 3, config)
    seen = set()
    for _ in range(20):
        batch = batches.next()
        assert (tuple(batch.images.shape), tuple(batch.labels.shape)) == ((4, 3, *size), (1, *size))
        first = batch.images[:, 0]
        assert torch.equal(batch.images[:, 1], 2 * first) and torch.equal(batch.images[:, 2], -first)
        inside = first[0] > 0  # padding is 0
        assert torch.equal((first[0] % 7)[inside].to(torch.uint8), batch.labels[0][inside])
        seen.add(float(first[0].flatten()[0]))
    assert len(seen) > 3


# ------------------------------------------------------------------------------------------------------- end to end

THREE_CLASSES = ["filters=4", "labelled_per_batch=2", "batch_size=3", "ramp_every=5", "dropout=0", "classes=3", "in_channels=2"]


def write_shapes(root: Path, shape: tuple[int, ...], channels: int) -> dict[str, np.ndarray]:
    """Squares (class 1, bright in the first channel) and small bars (class 2, dark in the last); returns the labels."""
    labels = {}
    for number in range(8):
        random = np.random.default_rng(number)
        label = np.zeros(shape, np.uint8)
        a, b = random.integers(1, 4, len(shape)), random.integers(14, 17, len(shape))
        label[tuple(slice(k, k + 9) for k in a)] = 1
        label[tuple(slice(k, k + 8) for k in b)] = 2
        image = random.standard_normal((channels, *shape)).astype(np.float32) * 0.3
        image[0] += 2 * (label == 1)
        image[-1] -= 2 * (label == 2)
        name = f"case{number}"
        affine = np.diag([0.5, 2.0, 1.0, 1.0])
        for channel in range(channels):
            write_nifti(root / "images" / f"{name}_{channel:04d}.nii.gz", image[channel], affine)
        if number < 5:
            write_nifti(root / "labels" / f"{name}.nii.gz", label, affine)
        labels[name] = label
    return labels


@pytest.mark.slow_cases("2")
@pytest.mark.parametrize("dims", [2, 3])
def test_three_classes_and_two_channels_from_file_to_score(tmp_path, capsys, dims):
    shape, iterations, patch, stride = (28, 26, 25)[:dims], 150, "32,32", "16,16"
    if dims == 3:
        iterations, patch, stride = 10, "32,16,16", "12,12,12"
    labels = write_shapes(tmp_path / "data", shape, channels=2)
    settings = [*THREE_CLASSES, f"patch={patch}", f"stride={stride}", f"iterations={iterations}", "learning_rate=0.05"]
    settings += ["schedule=polynomial", "channels_last=true", "checkpoint_every=1000"]
    arguments = ["train", "--recipe", "generic", "--data", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu"]
    assert cli.main([str(word) for word in [*arguments, "--set", *settings]]) == 0
    assert "has no test.list: a fifth of the labelled cases" in capsys.readouterr().err
    arguments = ["evaluate", tmp_path / "run", "--data", tmp_path / "data", "--nifti", "all", "--device", "cpu"]
    assert cli.main([str(word) for word in arguments]) == 0
    out = tmp_path / "run" / "evaluation-test"
    assert (out / "pictures.png").read_bytes().startswith(b"\x89PNG")

    network, config = load_network(tmp_path / "run")
    dataset = open_for(config, tmp_path / "data")
    (name,) = dataset.names("test")
    case = dataset.load(name)
    found = segment(network, case.image, config.patch, config.stride)
    assert found.label.shape == shape
    rows = {int(row["class"]): row for row in read(out / "scores.csv") if row["method"] == "decoder 1"}
    assert set(rows) == {1, 2}
    for klass, row in rows.items():
        ours, truth = found.label == klass, labels[name] == klass
        overlap = 2 * np.count_nonzero(ours & truth) / (np.count_nonzero(ours) + np.count_nonzero(truth))
        assert float(row["dice"]) == pytest.approx(overlap)
        assert overlap > 0.5 or dims == 3  # it has learnt both classes; in 3-D that takes too long for a test
        expected = metrics.score(ours, truth, (0.5, 2.0, 1.0)[:dims])  # the affine's own voxel size
        assert float(row["hd95_mm"] or "nan") == pytest.approx(expected.hd95_mm, nan_ok=True)
    for what in ("prediction", "image", "truth", "score"):
        nifti = nibabel.load(out / "nifti" / f"{name}_{what}.nii.gz")
        np.testing.assert_allclose(nifti.affine, np.diag([0.5, 2.0, 1.0, 1.0]))
    np.testing.assert_array_equal(nibabel.load(out / "nifti" / f"{name}_prediction.nii.gz").get_fdata(), found.label)
    assert nibabel.load(out / "nifti" / f"{name}_image.nii.gz").shape[-1] == 2
    summary = {(row["method"], row["class"], row["metric"]): row for row in read(out / "summary.csv")}
    assert float(summary["decoder 1", "2", "dice"]["mean"]) == pytest.approx(float(rows[2]["dice"]))


def test_the_supervised_recipe_reads_no_unlabelled_image(tmp_path, capsys):
    write_shapes(tmp_path / "data", (20, 20), channels=1)
    (tmp_path / "data" / "images" / "case7_0000.nii.gz").write_bytes(b"never read")
    settings = ["filters=2", "patch=32,16", "stride=16,16", "classes=3", "iterations=2", "validation=1"]
    arguments = ["train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu"]
    assert cli.main([str(w) for w in [*arguments, "--recipe", "generic-supervised", "--set", *settings]]) == 0
    capsys.readouterr()
    arguments[4] = tmp_path / "other"
    line = mistake(capsys, *arguments, "--recipe", "generic", "--set", *settings)
    assert "case7_0000.nii.gz is not a readable NIfTI file" in line
    settings[-1] = "validation=4"
    line = mistake(capsys, *arguments, "--recipe", "generic", "--set", *settings)
    assert "validation=4 leaves none of the 4 labelled cases" in line
