"""`rplib data shrink` against values worked out by hand."""

import h5py
import numpy as np
import pytest
from reference_tools import mistake

from rplib import cli
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.datasets.nifti_writing import write_nifti
from rplib.reference.datasets.phantom import write_phantoms

AFFINE = np.array([[0.0, -2.0, 0.0, 10.0], [3.0, 0.0, 0.0, 20.0], [0.0, 0.0, 4.0, 30.0], [0.0, 0.0, 0.0, 1.0]])


def write(path, image, label=None, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = image
        if label is not None:
            file["label"] = label
        if affine is not None:
            file.attrs["affine"] = affine


def brats(root, label_dtype=np.uint8):
    """Three cases: odd sizes and raw tumour labels; no label; no affine."""
    image = np.arange(5 * 4 * 7, dtype=np.float32).reshape(5, 4, 7)
    label = np.zeros((5, 4, 7), label_dtype)
    label[:2, :2, :2] = [[[0, 0], [0, 1]], [[1, 1], [4, 4]]]  # 3 of 0, 3 of 1, 2 of 4: the larger of the two that are as frequent
    label[2:4, 2:4, 4:6] = [[[2, 2], [2, 0]], [[4, 4], [4, 4]]]
    label[4:, 3:, 6:] = 2  # is cut off
    write(root / "data" / "a.h5", image, label, AFFINE)
    write(root / "data" / "b.h5", image)
    write(root / "data" / "c.h5", image[:4, :4, :6], label[:4, :4, :6])
    for name, text in (("train", "a\nb,with a remark\n"), ("val", "c\n"), ("test", "d\n")):
        (root / f"{name}.txt").write_text(text)
    write(root / "data" / "d.h5", image, label)
    return image, label


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_blocks_by_hand(tmp_path, capsys, dtype):
    image, _ = brats(tmp_path / "data", dtype)
    assert cli.main(["data", "shrink", str(tmp_path / "data"), str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    assert "4 cases written, 0 already there, 1 without a label" in out
    with h5py.File(tmp_path / "small" / "data" / "a.h5") as file:
        small, label, affine = file["image"][()], file["label"][()], file.attrs["affine"]
    assert small.dtype == np.float32 and small.shape == label.shape == (2, 2, 3) and label.dtype == dtype
    for x, y, z in np.ndindex(small.shape):
        assert small[x, y, z] == image[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].mean(), (x, y, z)
    expected = np.zeros((2, 2, 3))
    expected[0, 0, 0], expected[1, 1, 2] = 1, 4
    assert np.array_equal(label, expected)
    # The first block's centre lies between voxels 0 and 1 of each axis; its edges are twice as long.
    assert np.allclose(affine @ [0, 0, 0, 1], AFFINE @ [0.5, 0.5, 0.5, 1], atol=0)
    assert np.allclose(affine @ [1, 2, 0, 1], AFFINE @ [2.5, 4.5, 0.5, 1], atol=0)
    with h5py.File(tmp_path / "small" / "data" / "b.h5") as file:
        assert list(file) == ["image"]
    with h5py.File(tmp_path / "small" / "data" / "d.h5") as file:
        assert "affine" not in file.attrs
    assert [(tmp_path / "small" / f"{part}.txt").read_text() for part in ("train", "val", "test")] == ["a\nb\n", "c\n", "d\n"]
    assert cli.main(["data", "check", str(tmp_path / "small")]) == 0


def test_a_phantom_set_by_three_and_again(tmp_path, capsys):
    write_phantoms(tmp_path / "data", 2, 1, (36, 36, 34), seed=3)
    arguments = ["data", "shrink", str(tmp_path / "data"), str(tmp_path / "small")]
    assert cli.main([*arguments, "--by", "3"]) == 0
    large, small = open_dataset(tmp_path / "data"), open_dataset(tmp_path / "small")
    for split in ("train", "test"):
        assert small.names(split) == large.names(split)
        for name in small.names(split):
            case, whole = small.load(name), large.load(name)
            size = tuple(s // 3 for s in whole.image.shape)
            cut = tuple(slice(3 * s) for s in size)
            assert case.image.shape == size
            assert case.image.mean() == pytest.approx(whole.image[cut].mean(), abs=1e-4)
            middle = tuple(slice(1, 3 * s, 3) for s in size)  # mostly what the block's middle is
            assert np.mean(case.label != whole.label[middle]) < 0.05 and case.label.any()
    capsys.readouterr()
    assert cli.main([*arguments, "--by", "3"]) == 0
    assert "0 cases written, 3 already there" in capsys.readouterr().out
    assert "was converted with other settings (release left-atrium, shrunk, by 3; now" in mistake(capsys, *arguments)


def test_lists_inside_the_cases_folder(tmp_path):
    write_phantoms(tmp_path / "data", 2, 1, (32, 32, 32), seed=3)
    folder = tmp_path / "data" / "2018LA_Seg_Training Set"
    for name in ("train.list", "test.list"):
        (tmp_path / "data" / name).rename(folder / name)
    assert cli.main(["data", "shrink", str(tmp_path / "data"), str(tmp_path / "small")]) == 0
    assert open_dataset(tmp_path / "small").names("train") == open_dataset(tmp_path / "data").names("train")


def test_mistakes(tmp_path, capsys):
    write_phantoms(tmp_path / "data", 2, 1, (32, 32, 32), seed=3)
    arguments = ["data", "shrink", str(tmp_path / "data"), str(tmp_path / "small")]
    assert "are the same folder" in mistake(capsys, "data", "shrink", tmp_path / "data", tmp_path / "data")
    write_phantoms(tmp_path / "other", 2, 1, (32, 32, 32), seed=3)  # of the same names, but nothing that was shrunk
    assert "with other settings (none; now" in mistake(capsys, "data", "shrink", tmp_path / "data", tmp_path / "other")
    assert "--by is 1; expected 2 or more" in mistake(capsys, *arguments, "--by", "1")
    assert "no data folder" in mistake(capsys, "data", "shrink", str(tmp_path / "none"), str(tmp_path / "small"))
    assert "3 cases" in mistake(capsys, *arguments, "--by", "60")  # could not be converted
    (tmp_path / "own" / "images").mkdir(parents=True)
    write_nifti(tmp_path / "own" / "images" / "a.nii.gz", np.ones((4, 4, 4), np.float32), np.eye(4))
    assert "contains NIfTI files" in mistake(capsys, "data", "shrink", str(tmp_path / "own"), str(tmp_path / "small"))
    (tmp_path / "data" / "test.list").unlink()
    assert "lacks one of train.list, test.list" in mistake(capsys, *arguments)
