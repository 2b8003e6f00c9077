"""Users' own data as found on disk: nnU-Net folders, DICOM series, mistakes in labels, odd files among valid ones."""

import contextlib
import csv
import json
import locale
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from reference_tools import TINY, mistake

from rplib import cli
from rplib.errors import UserError
from rplib.reference.checkpoint import load_network
from rplib.reference.config import load_recipe
from rplib.reference.datasets.check import label_remarks
from rplib.reference.datasets.layouts import guess_layout, open_dataset, open_for, split_training
from rplib.reference.datasets.nnunet import NnunetFolder, described
from rplib.reference.evaluation import metrics
from rplib.reference.inference.windows import segment
from rplib.reference.network import MutualVNet

AFFINE = np.diag([-0.5, -0.5, 2.0, 1.0])  # right to left, front to back, upwards: as DICOM has it, in NIfTI's terms
SHAPE = (20, 18, 17)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def example_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright box, and its label."""
    random = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[tuple(slice(c, c + 9) for c in random.integers(0, 8, 3))] = 1
    return (random.integers(0, 100, SHAPE) + 200 * label).astype(np.int16), label


def write_dicom(folder: Path, array: np.ndarray) -> None:
    """One series of files without a suffix, in an order that is not that of their positions; grid as AFFINE."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    with locale_kept():
        for z in range(array.shape[2]):
            piece = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, z : z + 1].transpose(2, 1, 0)))
            piece.SetSpacing((0.5, 0.5, 2.0))
            for tag, value in {
                "0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0008|0060": "MR", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3",
                "0008|0018": f"1.2.3.4.{z + 1}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0032": f"0\\0\\{2.0 * z}",
                "0020|0013": str(z),
            }.items():  # fmt: skip
                piece.SetMetaData(tag, value)
            path = folder / f"{array.shape[2] - z:03d}.dcm"
            writer.SetFileName(str(path))
            writer.Execute(piece)
            path.rename(path.with_suffix(""))


@contextlib.contextmanager
def locale_kept():
    """Writing DICOM sets the process's locale to C (reading does not)."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def check(capsys, *arguments) -> tuple[int, str]:
    code = cli.main(["data", "check", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out


def train(data: Path, out: Path, *settings: str) -> int:
    arguments = ["train", "--recipe", "generic", "--data", data, "--out", out, "--device", "cpu", "--set", *TINY, *settings]
    return cli.main([str(word) for word in arguments])


# ------------------------------------------------------------------------------------------------------------ nnU-Net


def nnunet(root: Path, cases: int = 5, labelled: int = 3, channels: int = 2, **changes: object) -> Path:
    for number in range(cases):
        image, label = example_case(number)
        for channel in range(channels):
            write_nifti(root / "imagesTr" / f"case_{number}_{channel:04d}.nii.gz", image + channel * number)
        if number < labelled:
            write_nifti(root / "labelsTr" / f"case_{number}.nii.gz", label)
    content = {
        "channel_names": {str(number): "MRI" for number in range(channels)}, "labels": {"background": 0, "organ": 1},
        "numTraining": labelled, "file_ending": ".nii.gz", **changes,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_an_nnunet_folder_is_trained_on_as_it_lies(tmp_path, capsys):
    data = nnunet(tmp_path / "Dataset001_Organ")
    assert guess_layout(data) == "generic"
    code, out = check(capsys, data)
    assert code == 0, out
    assert "3-D, 2 channels, labels 0 (background), 1 (organ): --set in_channels=2 classes=2" in out
    config = load_recipe("generic", ["in_channels=2"])
    dataset = open_for(config, data)
    assert isinstance(dataset, NnunetFolder)
    split = split_training(dataset, config)
    assert (len(split.labelled), split.unlabelled) == (2, ["case_3", "case_4"])  # one of three is the test case
    case = dataset.load("case_3")
    assert case.image.shape == (2, *SHAPE) and case.label is None
    np.testing.assert_array_equal(case.affine, AFFINE)
    assert train(data, tmp_path / "run", "in_channels=2", "labelled=0", "iterations=2") == 0
    arguments = ["evaluate", tmp_path / "run", "--data", data, "--device", "cpu"]
    assert cli.main([str(word) for word in arguments]) == 0
    images = sorted((data / "imagesTr").glob("case_4_*"))
    arguments = ["predict", tmp_path / "run", *images, "--out", tmp_path / "out", "--device", "cpu"]
    assert cli.main([str(word) for word in arguments]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case_4_prediction.nii.gz"]


def test_settings_that_contradict_dataset_json(tmp_path, capsys):
    data = nnunet(tmp_path / "d", labels={"background": 0, "left": 1, "right": 2})
    said = mistake(capsys, "train", "--recipe", "generic", "--data", data, "--out", tmp_path / "r", "--device", "cpu")
    assert "dataset.json lists 2 channels; set in_channels=2" in said
    with pytest.raises(UserError, match=r"lists the labels 0 \(background\), 1 \(left\), 2 \(right\); set classes=3"):
        open_dataset(data, "generic", classes=2, channels=2)
    _, label = example_case(0)
    write_nifti(data / "labelsTr" / "case_0.nii.gz", 5 * label)  # a value that dataset.json does not name
    code, out = check(capsys, data)
    assert code == 2
    assert "case_0.nii.gz" in out and "outside the classes 0..2 (the first is 5)" in out


def test_test_cases_of_nnunet(tmp_path, capsys):
    data = nnunet(tmp_path / "d", channels=1)
    for number in (7, 8):
        image, label = example_case(number)
        write_nifti(data / "imagesTs" / f"case_{number}_0000.nii.gz", image)
        if number == 7:
            write_nifti(data / "labelsTs" / f"case_{number}.nii.gz", label)
    dataset = open_dataset(data, "generic")
    assert dataset.names("test") == ["case_7"]
    assert dataset.names("train") == [f"case_{number}" for number in range(5)]
    assert dataset.load("case_7", needs_label=True).label.sum() == 9**3
    code, out = check(capsys, data)
    assert code == 0
    assert "1 cases of imagesTs have a label in labelsTs: they are the test cases" in out
    assert "1 images in imagesTs have no label and are not used" in out and "fifth" not in out
    write_nifti(data / "imagesTr" / "case_7_0000.nii.gz", example_case(7)[0])
    with pytest.raises(UserError, match="case_7 is in both imagesTr and imagesTs"):
        open_dataset(data, "generic")


def test_cases_that_are_named_unlabelled_and_ignore(tmp_path):
    labels = {"background": 0, "organ": 1, "ignore": 2}
    data = nnunet(tmp_path, labelled=5, channels=1, labels=labels, unlabelled=["case_4"])
    write_nifti(data / "labelsTr" / "case_4.nii.gz", np.full(SHAPE, 2, np.uint8))
    dataset = open_dataset(data, "generic")
    assert not dataset.has_label("case_4") and dataset.load("case_4").label is None
    assert dataset.has_label("case_3")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("nothing", "is not a readable dataset.json"),
        ("[1]", "expected a JSON object"),
        ('{"labels": {"background": 0, "whole": [1, 2]}}', r"gives the label 'whole' as \[1, 2\].*regions are not supported"),
        ('{"labels": {"background": 0}, "file_ending": ".png"}', r"file_ending '.png'; expected .nii.gz or .nii"),
    ],
)
def test_bad_dataset_json(tmp_path, content, reason):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        described(tmp_path / "dataset.json")


def test_dataset_json_of_version_1(tmp_path):
    labels = {"0": "background", "1": "liver", "2": "tumour"}
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": labels}))
    assert described(tmp_path / "dataset.json") == (1, {0: "background", 1: "liver", 2: "tumour"}, frozenset())


# -------------------------------------------------------------------------------------------------------------- DICOM


def test_dicom_series_are_images(tmp_path, capsys):
    """Trained on and segmented; the same voxels and grid as the NIfTI files of the same cases."""
    data = tmp_path / "d"
    for number in range(4):
        image, label = example_case(number)
        write_dicom(data / "images" / f"patient{number}" / ("study/series" if number == 1 else "."), image)
        if number < 3:
            write_nifti(data / "labels" / f"patient{number}.nii.gz", label)
    code, out = check(capsys, data)
    assert code == 0, out
    assert "3-D, 1 channel, labels 0, 1" in out and "20-20 x 18-18 x 17-17 voxels" in out
    dataset = open_dataset(data, "generic", normalisation="none")
    for number in range(4):
        case = dataset.load(f"patient{number}")
        np.testing.assert_array_equal(case.image, example_case(number)[0])
        np.testing.assert_allclose(case.affine, AFFINE, atol=1e-6)
        assert (case.label is None) == (number == 3)
    assert train(data, tmp_path / "run", "labelled=0", "iterations=2") == 0
    write_nifti(tmp_path / "same.nii.gz", example_case(3)[0])
    arguments = ["predict", tmp_path / "run", data / "images" / "patient3", tmp_path / "same.nii.gz", "--out", tmp_path / "out"]
    assert cli.main([*map(str, arguments), "--device", "cpu"]) == 0
    found, expected = (nibabel.load(tmp_path / "out" / f"{name}_prediction.nii.gz") for name in ("patient3", "same"))
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-6)
    assert found.shape == SHAPE


def test_folders_that_are_no_one_series(tmp_path, capsys):
    image, label = example_case(0)
    for name in "abc":
        write_dicom(tmp_path / "images" / name, image)
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", label)
    write_dicom(tmp_path / "images" / "b" / "again", image)
    (tmp_path / "images" / "c" / "005").unlink()
    (tmp_path / "images" / "notes").mkdir()
    (tmp_path / "images" / "notes" / "read.me").write_text("no image")
    code, out = check(capsys, tmp_path)
    assert code == 2
    assert "b contains 2 folders of DICOM files (b, again); keep one series" in out
    assert "4.00 mm apart, the others 2.00 mm; a slice is missing" in out
    assert "notes" not in out and "images/a" not in out


# ---------------------------------------------------------------------------------------------------- slips and odd ones


def test_labels_that_look_like_slips(tmp_path, capsys):
    for number in range(6):
        image, label = example_case(number)
        label = 2 * label  # nobody has 1
        if number == 4:
            label[0, 0, :3] = 9
        write_nifti(tmp_path / "images" / f"c{number}.nii.gz", image)
        write_nifti(tmp_path / "labels" / f"c{number}.nii.gz", label)
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "no case contains labels 1, 3, 4, 5, 6, ..., although 9 occurs; renumber the labels 0..2 without gaps" in out
    assert "label 9 occurs in only one of 6 labelled cases, c4 (3 voxels); check whether it is a mistake" in out
    assert "label 2" not in out


def test_labels_that_are_as_they_should_be():
    everywhere = {value: dict.fromkeys("abcdef", 5) for value in range(3)}
    assert label_remarks(everywhere) == []
    assert label_remarks({0: {"a": 1, "b": 1}, 1: {"a": 1}}) == []  # two cases are too few to tell
    assert label_remarks({}) == []


def test_an_odd_first_file_does_not_blame_the_others(tmp_path, capsys):
    random = np.random.default_rng(0)
    for number, name in enumerate("abcdef"):
        shape = (*SHAPE, 2) if name == "a" else SHAPE
        affine = AFFINE * np.array([-1, 1, 3, 1])[:, None] if name == "b" else AFFINE
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", random.random(shape).astype(np.float32), affine)
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", example_case(number)[1], affine)
    code, out = check(capsys, tmp_path)
    assert code == 2
    problems = [line for line in out.splitlines() if ".nii.gz" in line]
    assert len(problems) == 1 and "a.nii.gz has 2 channels; expected 1" in problems[0]
    assert "3-D, 1 channel" in out
    assert "4 of 5 images are stored in orientation LPS; different: b (RPS)" in out
    assert "1 of 5 images have voxel sizes more than 1.5 times larger or smaller than the usual 0.5 x 0.5 x 2 mm: b (0.5 x" in out


def test_check_of_an_unknown_folder_says_what_it_looked_for(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").touch()
    said = mistake(capsys, "data", "check", tmp_path)
    assert "found notes.txt, pictures/." in said
    for name in ("2018LA_Seg_Training Set/", "Pancreas_h5/", "images/", "imagesTr/", "train.txt"):
        assert name in said
    (tmp_path / "pictures").rmdir()
    (tmp_path / "notes.txt").unlink()
    assert "found nothing." in mistake(capsys, "data", "check", tmp_path)
    assert "no data folder" in mistake(capsys, "data", "check", tmp_path / "absent")


def test_predict_does_the_good_files_when_one_is_refused(tmp_path, capsys):
    data = nnunet(tmp_path / "d", channels=1)
    assert train(data, tmp_path / "run", "labelled=0", "iterations=1") == 0
    (tmp_path / "picture.png").touch()
    good = sorted((data / "imagesTr").iterdir())[:2]
    capsys.readouterr()
    files = [tmp_path / "nobody.nii.gz", good[0], tmp_path / "picture.png", good[1]]
    code = cli.main([str(word) for word in ["predict", tmp_path / "run", *files, "--out", tmp_path / "out", "--device", "cpu"]])
    out, err = capsys.readouterr()
    assert code == 2
    assert "nobody.nii.gz not segmented: no file " in err and "picture.png not segmented: " in err
    assert "2 of 4 images were not segmented; see above for the reasons: nobody.nii.gz, picture.png." in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"case_{number}_0000_prediction.nii.gz" for number in (0, 1)
    ]
    assert out.count("voxels") + out.count("nothing found") == 2


# ------------------------------------------------------------------------------------------------------------- slices


def test_a_network_of_slices_sees_volumes_slice_by_slice():
    network = MutualVNet(in_channels=2, classes=3, filters=2, dims=2).eval()
    volumes = torch.randn(2, 2, 16, 32, 3)
    logits, features = network(volumes)
    assert [tuple(z.shape) for z in logits] == [(2, 3, 16, 32, 3)] * 2 and features[0].shape == (2, 2, 16, 32, 3)
    for z in range(3):
        alone, _ = network(volumes[..., z])
        for whole, part in zip(logits, alone, strict=True):
            torch.testing.assert_close(whole[..., z], part)
    torch.testing.assert_close(network.first_logits(volumes), logits[0])


def test_training_on_slices_of_volumes_and_scores_of_volumes(tmp_path, capsys):
    """The network is two-dimensional; crops, scores, label maps and spacings are those of volumes."""
    data = tmp_path / "d"
    for number in range(5):
        image, label = example_case(number)
        write_nifti(data / "images" / f"c{number}.nii.gz", image)
        if number < 4:
            write_nifti(data / "labels" / f"c{number}.nii.gz", label)
    assert train(data, tmp_path / "run", "labelled=0", "patch=16,16,1", "stride=8,8,1", "batch_size=4", "channels_last=true") == 0
    network, config = load_network(tmp_path / "run")
    assert config.slices and isinstance(network.encoder.block_one.conv[0], torch.nn.Conv2d)
    arguments = ["evaluate", tmp_path / "run", "--data", data, "--device", "cpu"]
    assert cli.main([str(word) for word in arguments]) == 0
    (row, *_) = list(csv.DictReader((tmp_path / "run" / "evaluation-test" / "scores.csv").open()))
    case = open_dataset(data, "generic").load(row["case"], needs_label=True)
    found = segment(network, case.image, config.patch, config.stride)
    assert found.label.shape == SHAPE
    assert float(row["dice"]) == pytest.approx(metrics.score(found.label, case.label).dice, abs=1e-4)
    images = [data / "images" / "c4.nii.gz", "--out", tmp_path / "out", "--device", "cpu"]
    assert cli.main([str(word) for word in ["predict", tmp_path / "run", *images]]) == 0
    assert nibabel.load(tmp_path / "out" / "c4_prediction.nii.gz").shape == SHAPE


def test_patches_that_are_no_slices():
    for patch in ("16,1,16", "1,1,1", "16,1", "8,16,1"):
        with pytest.raises(UserError, match="multiple of 16, or the last of three be 1 to train on slices"):
            load_recipe("generic", [f"patch={patch}", "stride=1" + ",1" * patch.count(",")])


def test_slices_of_background_alone_are_normal(tmp_path, capsys):
    for number in range(4):
        image, label = example_case(number)
        write_nifti(tmp_path / "images" / f"c{number}.nii.gz", image[:, :, :1])
        write_nifti(tmp_path / "labels" / f"c{number}.nii.gz", label[:, :, 8:9] * (number > 0))
    code, out = check(capsys, tmp_path)
    assert code == 0, out
    assert "1 label of 2-D images contains only background" in out
