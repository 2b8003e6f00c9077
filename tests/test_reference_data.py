"""The Left Atrium layout, the phantoms, and `rplib data`."""

import importlib.util
import subprocess
import sys

import h5py
import numpy as np
import pytest
from data_paths import left_atrium_dir
from reference_tools import mistake, write_case, write_dataset
from scipy import ndimage

from rplib import cli
from rplib.errors import UserError
from rplib.reference.datasets.layouts import LeftAtrium, open_dataset
from rplib.reference.datasets.phantom import MOST_THRESHOLD_DICE, best_threshold_dice, phantom_case
from rplib.reference.datasets.phantom_organs import organs_case

# ------------------------------------------------------------------------------------------------------ reading cases


def test_cases_are_read_as_they_were_written(tmp_path):
    names = write_dataset(tmp_path, train=2, test=1)
    dataset = open_dataset(tmp_path)
    assert dataset.names("train") == names[:2]
    assert dataset.names("test") == names[2:]
    case = dataset.load(names[0], needs_label=True)
    with h5py.File(dataset.path(names[0])) as file:
        assert np.array_equal(case.image, file["image"][()])
        assert np.array_equal(case.label, file["label"][()])
    assert (case.name, case.image.dtype, case.label.dtype) == (names[0], np.float32, np.uint8)


def test_real_left_atrium_cases_are_read_to_the_bit(tmp_path):
    source = left_atrium_dir()
    ids = [(source / "left_atrium" / f"{split}.list").read_text().split()[0] for split in ("train", "test")]
    unpack = source / "unpack_left_atrium.py"
    subprocess.run([sys.executable, unpack, tmp_path, "--ids", *ids], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("unpack_left_atrium", unpack)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    dataset = open_dataset(tmp_path)
    assert (dataset.names("train"), dataset.names("test")) == (ids[:1], ids[1:])
    for name in ids:
        case = dataset.load(name, needs_label=True)
        image, label = module.load_case(source / "left_atrium" / f"{name}.xz")
        assert np.array_equal(case.image, image)
        assert np.array_equal(case.label, label)
        assert case.image.shape[2] == 88
    assert cli.main(["data", "check", str(tmp_path)]) == 0


def test_lists_may_lie_beside_the_cases_and_end_as_on_windows(tmp_path):
    names = write_dataset(tmp_path, train=2, test=1)
    inner = tmp_path / LeftAtrium.cases_folder
    (tmp_path / "train.list").unlink()
    (tmp_path / "test.list").rename(inner / "test.list")
    (inner / "train.list").write_bytes(f"{names[0]}\r\n{names[1]}\r\n\r\n".encode())
    assert open_dataset(tmp_path).names("train") == names[:2]
    assert open_dataset(tmp_path).names("test") == names[2:]


def test_an_unlabelled_case_needs_no_label(tmp_path):
    path = write_case(tmp_path, "A", image=np.zeros((4, 4, 4), np.float64))
    dataset = open_dataset(tmp_path)
    assert dataset.load("A").label is None
    assert dataset.load("A").image.dtype == np.float32
    with pytest.raises(UserError, match=f"{path} lacks the key 'label'.*used as a labelled case"):
        dataset.load("A", needs_label=True)


IMAGE = np.zeros((4, 5, 6), np.float32)
WITH_NAN = np.where(np.arange(120).reshape(IMAGE.shape) == 7, np.nan, IMAGE).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": np.zeros((4, 5, 6), np.uint8)}, "lacks the key 'image' (keys found: label)"),
        ({"image": IMAGE, "label": np.full(IMAGE.shape, 2, np.uint8)}, "120 voxels outside the classes 0..1"),
        ({"image": IMAGE, "label": np.full(IMAGE.shape, -1, np.int16)}, "120 voxels outside the classes 0..1"),
        ({"image": IMAGE, "label": np.full(IMAGE.shape, 0.5, np.float32)}, "120 voxels outside the classes 0..1"),
        ({"image": IMAGE, "label": np.full(IMAGE.shape, np.nan, np.float32)}, "120 voxels outside the classes 0..1"),
        (
            {"image": IMAGE, "label": np.zeros((5, 4, 6), np.uint8)},
            "'label' has shape (5, 4, 6) but 'image' has (4, 5, 6)",
        ),
        ({"image": np.zeros((4, 5), np.float32)}, "shape (4, 5); expected three axes"),
        ({"image": WITH_NAN}, "1 NaN or infinite values"),
        ({"image": np.zeros(IMAGE.shape, "S3")}, "has type |S3; expected float32"),
    ],
)
def test_a_bad_case_is_refused_by_file_and_reason(tmp_path, arrays, message):
    path = write_case(tmp_path, "BAD", **arrays)
    with pytest.raises(UserError) as caught:
        open_dataset(tmp_path).load("BAD")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_labels_stored_as_float_are_read(tmp_path):
    label = np.arange(120).reshape(IMAGE.shape) % 3
    write_case(tmp_path, "A", image=IMAGE, label=label.astype(np.float32))
    assert np.array_equal(open_dataset(tmp_path, classes=3).load("A").label, label)


def test_a_truncated_file_is_refused(tmp_path):
    path = write_case(tmp_path, "A", image=np.random.default_rng(0).random((16, 16, 16), np.float32))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"mri_norm2.h5 is not a readable h5 file"):
        open_dataset(tmp_path).load("A")


# ----------------------------------------------------------------------------------------------------------- phantoms


def dice_by_brute_force(image, label):
    organ = label.ravel() > 0
    best = 0.0
    for threshold in np.unique(image):
        for found in (image.ravel() >= threshold, image.ravel() <= threshold):
            best = max(best, 2 * np.count_nonzero(found & organ) / (np.count_nonzero(found) + np.count_nonzero(organ)))
    return best


def test_best_threshold_dice_tries_all_thresholds_both_ways():
    random = np.random.default_rng(3)
    for shift in (-2.0, 0.0, 1.0):
        label = random.integers(0, 2, (6, 5, 4))
        image = np.round(random.standard_normal(label.shape) + shift * label, 1)  # with ties
        assert best_threshold_dice(image, label) == pytest.approx(dice_by_brute_force(image, label), abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1337])
def test_no_threshold_finds_the_organ(seed):
    for index in range(3):
        case = phantom_case("P", (40, 40, 36), seed, index)
        coarse = np.quantile(case.image, np.linspace(0, 1, 200))
        organ = case.label > 0
        for threshold in coarse:  # by hand, so that a fault of best_threshold_dice shows
            for found in (case.image >= threshold, case.image <= threshold):
                dice = 2 * np.count_nonzero(found & organ) / (np.count_nonzero(found) + np.count_nonzero(organ))
                assert dice < MOST_THRESHOLD_DICE
        assert best_threshold_dice(case.image, case.label) < MOST_THRESHOLD_DICE
        assert 0.005 < organ.mean() < 0.2
        assert case.image.dtype == np.float32
        assert abs(case.image.mean()) < 1e-3
        assert abs(case.image.std() - 1) < 1e-3


def test_distractors_are_as_bright_and_as_large_as_the_organ():
    """Without its texture: at the organ's own brightness, at least half its volume lies elsewhere (mean of 8 cases)."""
    elsewhere = []
    for index in range(8):
        case = phantom_case("P", (40, 40, 36), 0, index)
        organ, smooth = case.label > 0, ndimage.gaussian_filter(case.image, 1.5)
        bright = smooth > np.median(smooth[organ])
        elsewhere.append(np.count_nonzero(bright & ~organ) / np.count_nonzero(organ))
    assert np.mean(elsewhere) > 0.5


def test_the_seed_and_the_index_fix_a_phantom():
    first, again = (phantom_case("P", (32, 32, 32), 5, 2) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    for seed, index in ((6, 2), (5, 3)):
        other = phantom_case("P", (32, 32, 32), seed, index)
        assert other.image.shape != first.image.shape or not np.array_equal(other.image, first.image)


def test_rplib_data_phantom_writes_what_rplib_data_check_accepts(tmp_path, capsys):
    arguments = ["--cases", "3", "--size", "32", "32", "32", "--seed", "4"]
    assert cli.main(["data", "phantom", str(tmp_path / "a"), *arguments]) == 0
    assert cli.main(["data", "phantom", str(tmp_path / "b"), *arguments]) == 0
    files = [sorted(p.relative_to(tmp_path / side) for p in (tmp_path / side).rglob("*")) for side in "ab"]
    assert files[0] == files[1]
    dataset = open_dataset(tmp_path / "a")
    assert (len(dataset.names("train")), len(dataset.names("test"))) == (3, 1)
    assert all(len(name) == 20 for name in dataset.names("train"))
    for name in dataset.names("train"):
        again = open_dataset(tmp_path / "b").load(name)
        assert np.array_equal(dataset.load(name).image, again.image)
        with h5py.File(dataset.path(name)) as file:
            assert (file["image"].dtype, file["label"].dtype, file["image"].compression) == ("float32", "uint8", "gzip")
    capsys.readouterr()
    assert cli.main(["data", "check", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "3 training cases (0 without a label), 1 test cases" in out
    assert "no problems found" in out


@pytest.mark.parametrize(("size", "classes"), [((48, 48), 4), ((48, 40, 36), 3), ((64, 64), 5)])
def test_phantoms_of_several_organs(tmp_path, capsys, size, classes):
    arguments = ["--cases", "2", "--test-cases", "1", "--size", *map(str, size), "--classes", str(classes), "--seed", "3"]
    assert cli.main(["data", "phantom", str(tmp_path / "a"), *arguments]) == 0
    dataset = open_dataset(tmp_path / "a", "generic", classes)
    assert (len(dataset.names("train")), len(dataset.names("test"))) == (2, 1)
    for index, name in enumerate([*dataset.names("train"), *dataset.names("test")]):
        case = dataset.load(name, needs_label=True)
        assert set(np.unique(case.label)) == set(range(classes))
        assert case.label.ndim == len(size)
        for k in range(1, classes):
            assert best_threshold_dice(case.image, case.label == k) < MOST_THRESHOLD_DICE
        again = organs_case(name, size, classes, 3, index)
        assert np.array_equal(again.label, case.label)
        assert np.allclose(again.image, case.image, atol=1e-4)
        assert not np.array_equal(organs_case(name, size, classes, 4, index).label, case.label)
    capsys.readouterr()
    assert cli.main(["data", "check", str(tmp_path / "a")]) == 0
    assert f"classes={classes}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "0"], "0 training and 1 test cases"),
        (["--size", "8", "32", "32"], "at least 32 voxels"),
        (["--seed", "-1"], "--seed is -1"),
        (["--size", "32"], "--size has 1 numbers; expected three"),
        (["--size", "32", "--classes", "3"], "expected two or three axes of at least 32 voxels"),
        (["--size", "48", "48", "--classes", "9"], "classes is 9; expected 3 to 5"),
        (["--cases", "many"], "invalid int value: 'many'"),
    ],
)
def test_impossible_phantoms(tmp_path, capsys, arguments, message):
    assert message in mistake(capsys, "data", "phantom", tmp_path / "new", *arguments)


def test_phantoms_overwrite_nothing(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert "not an empty folder" in mistake(capsys, "data", "phantom", tmp_path)
    assert "not an empty folder" in mistake(capsys, "data", "phantom", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep me"


# ---------------------------------------------------------------------------------------------------- rplib data check


def test_check_lists_every_problem(tmp_path, capsys):
    names = write_dataset(tmp_path, train=6, test=2)
    dataset = open_dataset(tmp_path)
    label = np.ones((20, 18, 17), np.uint8)
    write_case(tmp_path, names[0], label=label)  # no image
    write_case(tmp_path, names[1], image=label.astype(np.float32), label=7 * label)  # no such class
    dataset.path(names[2]).unlink()
    dataset.path(names[3]).write_bytes(b"half a file")
    write_case(tmp_path, names[4], image=label.astype(np.float32))  # unlabelled: fine
    write_case(tmp_path, names[5], image=label.astype(np.float32), label=0 * label)  # nothing in it
    write_case(tmp_path, names[6], image=label.astype(np.float32))  # a test case needs a label
    (tmp_path / "test.list").write_text(f"{names[6]}\n{names[7]}\n{names[4]}\n")  # one of them is a training case
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if names[7] not in line][:-1]
    for name, reason in [
        (names[0], "lacks the key 'image'"),
        (names[1], "outside the classes"),
        (names[2], "has no file"),
        (names[3], "not a readable h5 file"),
        (names[5], "contains only background"),
        (names[6], "lacks the key 'label'"),
        (names[4], "is in train.list and in test.list"),
    ]:
        assert any(name in line and reason in line for line in problems), (name, reason, out)
    assert "6 training cases (1 without a label), 3 test cases" in out
    assert "rplib: error: 8 problems found" in err
    assert "Traceback" not in err


def test_check_names_a_missing_folder_a_missing_list_and_a_repeated_case(tmp_path, capsys):
    assert "no data folder" in mistake(capsys, "data", "check", tmp_path / "nowhere")
    names = write_dataset(tmp_path, train=2, test=1)
    (tmp_path / "test.list").unlink()
    (tmp_path / "train.list").write_text(f"{names[0]}\n{names[0]}\n")
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "no test.list" in out
    assert f"lists {names[0]} more than once" in out
    (tmp_path / "train.list").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "test.list").write_text("\n")
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "train.list is not a readable list" in out
    assert "test.list is empty" in out
    assert "unknown data layout 'mnist'" in mistake(capsys, "data", "check", tmp_path, "--layout", "mnist")
