"""`rplib data left-atrium|pancreas|brats` on raw-like files, against values worked out by hand."""

import contextlib
import json
import locale
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk
from data_paths import left_atrium_dir
from reference_tools import mistake

from rplib import cli
from rplib.reference.conversion import releases as conversion
from rplib.reference.conversion.geometry import affine_of, read_volume
from rplib.reference.conversion.pancreas import PancreasRelease
from rplib.reference.datasets.layouts import open_dataset

ROOT = Path(__file__).resolve().parent.parent
FLIPPED_XY = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)


def volume(array, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None) -> sitk.Image:
    """Of an array (X, Y, Z)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(array).transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    return image


def save(path: Path, *arguments, **keywords) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume(*arguments, **keywords), str(path), useCompression=True)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def contents(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}


# -------------------------------------------------------------------------------------------------------- left atrium


def raw_left_atrium(root: Path, name: str, low=(50, 40, 3), high=(130, 60, 7), shape=(200, 170, 10), label=True, **grid):
    """Noise and a box of 255, beside other values."""
    random = np.random.default_rng(len(name))
    image = random.integers(0, 255, shape, dtype=np.uint8)
    truth = np.zeros(shape, np.uint8)
    truth[5:9, 5:9, 0] = 100  # not the cavity
    truth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 255
    grid = {"spacing": (0.625, 0.625, 1.25), "origin": (-7.0, 3.0, 11.0), **grid}
    save(root / name / "lgemri.nrrd", image, **grid)
    if label:
        save(root / name / "laendo.nrrd", truth, **grid)
    return image, truth


def test_left_atrium_by_hand(tmp_path, capsys):
    image, truth = raw_left_atrium(tmp_path / "raw", "A")
    raw_left_atrium(tmp_path / "raw" / "deep", "B", low=(2, 150, 0), high=(30, 170, 10))  # at the border
    raw_left_atrium(tmp_path / "raw", "C", label=False)
    raw_left_atrium(tmp_path / "raw", "D")
    code, out, err = run(capsys, "left-atrium", tmp_path / "raw", tmp_path / "dest")
    assert code == 0, out + err
    assert "4 cases written, 0 already there, 1 without a label" in out
    assert "NOT the published lists" in out

    dataset = open_dataset(tmp_path / "dest")
    found = contents(dataset.path("A"))
    assert (found["image"].dtype, found["label"].dtype) == (np.float32, np.uint8)
    # The label spans x 50..129 (80 voxels, widened by 32 to 112) and y 40..59 (20, widened by 92): 34..145 and -6..105.
    scored = ((image - image.mean()) / image.std()).astype(np.float32)
    affine = dataset.load("A").affine
    start = np.rint(np.linalg.solve(affine_at_origin()[:3, :3], affine[:3, 3] - affine_at_origin()[:3, 3])).astype(int)
    assert 34 - 19 <= start[0] <= 34 - 10
    assert (start[1], start[2]) == (0, 0)
    end = start + found["image"].shape
    assert 146 + 10 <= end[0] <= 146 + 19
    assert 106 + 10 <= end[1] <= 106 + 19
    assert end[2] == 10
    window = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
    np.testing.assert_allclose(found["image"], scored[window], atol=1e-6)
    np.testing.assert_array_equal(found["label"], truth[window] == 255)
    assert found["label"].sum() == 80 * 20 * 4

    border = contents(dataset.path("B"))
    assert border["label"].sum() == 28 * 20 * 10
    assert border["image"].shape[0] >= 112 and border["image"].shape[1] >= 112
    bare = contents(dataset.path("C"))
    assert list(bare) == ["image"]
    assert bare["image"].shape == (200, 170, 10)
    assert set(dataset.names("train")) | set(dataset.names("test")) == set("ABCD")
    assert dataset.names("train")[-1] == "C"
    assert run(capsys, "check", tmp_path / "dest")[0] == 0


def affine_at_origin() -> np.ndarray:
    """Of the raw-like files above: ITK's x and y point to the left and back, NIfTI's to the right and front."""
    return np.array([[-0.625, 0, 0, 7.0], [0, -0.625, 0, -3.0], [0, 0, 1.25, 11.0], [0, 0, 0, 1]])


def test_margins_are_drawn_from_the_seed_and_the_name_alone(tmp_path, capsys):
    for name in ("A", "B", "C"):
        raw_left_atrium(tmp_path / "raw", name)
    for dest, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert run(capsys, "left-atrium", tmp_path / "raw", tmp_path / dest, "--seed", seed)[0] == 0
    raw_left_atrium(tmp_path / "few", "B")
    raw_left_atrium(tmp_path / "few", "Z")
    assert run(capsys, "left-atrium", tmp_path / "few", tmp_path / "alone", "--seed", 1)[0] == 0
    files = {dest: open_dataset(tmp_path / dest).path("B").read_bytes() for dest in ("one", "again", "other", "alone")}
    assert files["one"] == files["again"] == files["alone"] != files["other"]
    assert open_dataset(tmp_path / "one").names("test") == open_dataset(tmp_path / "again").names("test")


def test_a_label_in_another_orientation_is_turned_by_its_header(tmp_path, capsys):
    """Axes z, x, y, and y mirrored: another array of the same grid."""
    image, _ = raw_left_atrium(tmp_path / "raw", "A")
    label = read_volume(tmp_path / "raw" / "A" / "laendo.nrrd")
    turned = sitk.DICOMOrient(label, "SLA")
    assert turned.GetSize() != label.GetSize()
    sitk.WriteImage(turned, str(tmp_path / "raw" / "A" / "laendo.nrrd"))
    raw_left_atrium(tmp_path / "raw", "B")
    assert run(capsys, "left-atrium", tmp_path / "raw", tmp_path / "dest")[0] == 0
    found = contents(open_dataset(tmp_path / "dest").path("A"))
    plain = contents(open_dataset(tmp_path / "dest").path("B"))
    assert found["label"].sum() == plain["label"].sum() == 80 * 20 * 4
    low = [int(np.flatnonzero(found["label"].any(axis=tuple({0, 1, 2} - {a})))[0]) for a in range(3)]
    scored = ((image - image.mean()) / image.std()).astype(np.float32)
    np.testing.assert_allclose(
        found["image"][low[0] : low[0] + 80, low[1] : low[1] + 20, 3:7], scored[50:130, 40:60, 3:7], atol=1e-6
    )


def test_real_left_atrium_cases_come_back(tmp_path, capsys):
    """The published crops, put back into a larger raw-like volume: the organ and the contrast are found again."""
    source = left_atrium_dir()
    ids = [(source / "left_atrium" / f"{split}.list").read_text().split()[0] for split in ("train", "test")]
    unpack = [sys.executable, source / "unpack_left_atrium.py", tmp_path / "la", "--ids", *ids]
    subprocess.run(unpack, check=True, capture_output=True)
    published = open_dataset(tmp_path / "la")
    for name in ids:
        case = published.load(name, needs_label=True)
        x, y, z = case.image.shape
        raw = np.zeros((x + 100, y + 80, z), np.uint8)
        truth = np.zeros(raw.shape, np.uint8)
        inner = (slice(60, 60 + x), slice(30, 30 + y), slice(None))
        raw[inner] = np.clip(60 + 30 * case.image, 0, 255)
        truth[inner] = 255 * case.label
        grid = {"spacing": (0.625, 0.625, 0.625), "origin": (1.0, 2.0, 3.0), "direction": FLIPPED_XY}
        save(tmp_path / "raw" / name / "lgemri.nrrd", raw, **grid)
        save(tmp_path / "raw" / name / "laendo.nrrd", truth, **grid)
    arguments = ["left-atrium", tmp_path / "raw", tmp_path / "dest", "--lists", tmp_path / "la"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, out + err
    assert "NOT the published lists" not in out
    converted = open_dataset(tmp_path / "dest")
    assert [converted.names(split) for split in ("train", "test")] == [ids[:1], ids[1:]]
    for name in ids:
        ours, theirs = converted.load(name, needs_label=True), published.load(name, needs_label=True)
        assert ours.label.sum() == theirs.label.sum()
        for axis in (0, 1):  # the published crops keep the rule themselves, but for one voxel at the upper end
            low, high = conversion.bounds(theirs.label)[axis]
            short = max(113 - (high - low), 0) // 2
            assert 10 <= low - short <= 19
            assert 9 <= theirs.image.shape[axis] - high - short <= 18
        assert ours.image.shape[2] == 88
        np.testing.assert_array_equal(np.diag(ours.affine)[:3], [0.625, 0.625, 0.625])
        boxes = [conversion.bounds(case.label) for case in (ours, theirs)]
        cut = [tuple(slice(*edges) for edges in box) for box in boxes]
        np.testing.assert_array_equal(ours.label[cut[0]], theirs.label[cut[1]])
        inside = [case.image[window] for case, window in zip((ours, theirs), cut, strict=True)]
        assert np.corrcoef(inside[0].ravel(), inside[1].ravel())[0, 1] > 0.98
        for axis in (0, 1):  # label box, widened to 112, and 10 to 19 voxels a side, unless the border is nearer
            (low, high), size = boxes[0][axis], ours.image.shape[axis]
            assert size >= 112
            short = max(112 - (high - low), 0)
            assert low <= short // 2 + 19 and size - high <= short - short // 2 + 19
            assert low >= min(short // 2 + 10, 30) and size - high >= 10
    assert run(capsys, "check", tmp_path / "dest")[0] == 0


# ----------------------------------------------------------------------------------------------------------- pancreas


def ct(shape=(110, 104, 12), seed=0):
    """(X, Y, Z) HU, smooth: soft tissue with a fatty border; the label is a box in the tissue."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    hu = 80 + 60 * np.sin(3 * x + seed) * np.cos(2 * y) + 20 * z
    hu[:, : shape[1] // 4] = -110
    label = np.zeros(shape, np.uint8)
    label[shape[0] // 2 : shape[0] // 2 + 12, shape[1] // 2 : shape[1] // 2 + 20, 3:8] = 1
    return np.rint(hu).astype(np.int16), label


@contextlib.contextmanager
def kept_locale():
    """Writing DICOM sets the process's locale to "C" and leaves it so: text files and pipes would then be ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@kept_locale()
def write_dicom(folder: Path, hu: np.ndarray, spacing, origin, order=None, skip=()) -> None:
    """One file a slice, HU stored with slope 2 and intercept -1024, named so that names do not sort as positions do."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    names = np.random.default_rng(1).permutation(hu.shape[2])
    for k in range(hu.shape[2]):
        if k in skip:
            continue
        stored = volume(hu[:, :, k : k + 1])  # ITK stores (value - intercept) / slope
        stored.SetSpacing(spacing)
        position = (origin[0], origin[1], origin[2] + k * spacing[2])
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0020|000d": "1.2.826.0.1.3680043.2.1",
            "0020|000e": "1.2.826.0.1.3680043.2.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.3.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{p:.6f}" for p in position),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": f"{spacing[2]:.6f}",
            "0028|1052": "-1024",
            "0028|1053": "2",
        }
        for key, value in tags.items():
            stored.SetMetaData(key, value)
        stored.SetOrigin(position)
        writer.SetFileName(str(folder / f"1-{names[k]:03d}.dcm"))
        writer.Execute(stored)


def cubic_spline(values: np.ndarray, factor: np.ndarray, sizes) -> np.ndarray:
    """Interpolating cubic B-splines at index i * factor, by SciPy: another implementation than the converter's."""
    from scipy import ndimage

    grid = np.meshgrid(*(np.arange(n) * f for n, f in zip(sizes, factor, strict=True)), indexing="ij")
    return ndimage.map_coordinates(values.astype(np.float64), grid, order=3, mode="mirror")


def test_pancreas_from_dicom_by_hand(tmp_path, capsys):
    hu, label = ct()
    hu -= hu % 2  # slope 2 stores even numbers
    spacing, origin = (0.8, 0.9, 2.5), (-40.0, 12.0, -300.0)
    write_dicom(tmp_path / "raw" / "DOI" / "PANCREAS_0001" / "11-24-2015" / "001-x", hu, spacing, origin)
    save(tmp_path / "raw" / "labels" / "label0001.nii.gz", label, spacing=spacing, origin=origin)
    other, other_label = ct(seed=1)
    save(tmp_path / "raw" / "PANCREAS_0007.nii.gz", other, spacing=spacing, origin=origin)
    save(tmp_path / "raw" / "labels" / "label0007.nii.gz", other_label, spacing=spacing, origin=origin)
    save(tmp_path / "raw" / "PANCREAS_0009.nii.gz", other, spacing=spacing, origin=origin)  # unlabelled
    code, out, err = run(capsys, "pancreas", tmp_path / "raw", tmp_path / "dest")
    assert code == 0, out + err
    assert "3 cases written, 0 already there, 1 without a label" in out

    # 110 x 0.8, 104 x 0.9, 12 x 2.5 mm: 88 x 93 x 30 voxels of 1 mm; both sides are below 96, so all is kept.
    dataset = open_dataset(tmp_path / "dest", "pancreas")
    assert dataset.path("image0001") == tmp_path / "dest" / "Pancreas_h5" / "image0001_norm.h5"
    found = contents(dataset.path("image0001"))
    assert (found["image"].dtype, found["label"].dtype) == (np.float32, np.float32)
    assert found["image"].shape == found["label"].shape == (88, 93, 30)
    resampled = cubic_spline(hu, 1 / np.array(spacing), (88, 93, 30))
    inside = (slice(None), slice(None), slice(0, 28))  # behind the last slice (index 11 = 27.5 mm) values go on
    windowed = (np.clip(resampled, -125, 275) + 125) / 400
    mean, deviation = found_scale(found["image"][inside], windowed[inside])
    np.testing.assert_allclose(found["image"][inside], (windowed[inside] - mean) / deviation, atol=2e-3)
    assert abs(found["image"].mean()) < 1e-4 and abs(found["image"].std() - 1) < 1e-4
    # Voxel i mm lies at index i / spacing; the nearest one decides.
    nearest = [np.floor(np.arange(n) / s + 0.5).astype(int) for n, s in zip((88, 93, 30), spacing, strict=True)]
    exact = [np.abs(np.arange(n) / s % 1 - 0.5) > 1e-6 for n, s in zip((88, 93, 30), spacing, strict=True)]  # no ties
    expected = label[np.ix_(*(np.minimum(index, n - 1) for index, n in zip(nearest, label.shape, strict=True)))]
    clear = np.ix_(*exact)
    np.testing.assert_array_equal(found["label"][clear], expected[clear])
    assert expected.any()
    affine = dataset.load("image0001").affine
    np.testing.assert_allclose(affine, [[-1, 0, 0, 40], [0, -1, 0, -12], [0, 0, 1, -300], [0, 0, 0, 1]], atol=1e-4)
    assert dataset.load("image0009").label is None
    assert dataset.names("train")[-1] == "image0009"
    assert run(capsys, "check", tmp_path / "dest")[0] == 0


def found_scale(image: np.ndarray, windowed: np.ndarray) -> tuple[float, float]:
    """Mean and deviation that the image was z-scored with, by a straight line through (image, windowed)."""
    deviation, mean = np.polyfit(image.ravel().astype(np.float64), windowed.ravel(), 1)
    return float(mean), float(deviation)


def test_pancreas_is_cropped_around_the_label(tmp_path, capsys):
    shape = (230, 220, 6)
    hu = np.random.default_rng(0).integers(0, 120, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[60:180, 100:110, 2:4] = 1  # 120 x 10: x is wide enough, y is widened by 86 to 62..147
    for number in (1, 2):
        save(tmp_path / "raw" / f"PANCREAS_000{number}.nii.gz", hu)
        save(tmp_path / "raw" / f"label000{number}.nii.gz", label)
    assert run(capsys, "pancreas", tmp_path / "raw", tmp_path / "dest")[0] == 0
    found = contents(open_dataset(tmp_path / "dest", "pancreas").path("image0001"))
    crop = np.clip(hu, -125, 275)[35:205, 32:178].astype(np.float64)  # x 60-25..180+25; y 57-25..153+25
    assert found["image"].shape == crop.shape == (170, 146, 6)
    np.testing.assert_allclose(found["image"], (crop - crop.mean()) / crop.std(), atol=2e-4)
    np.testing.assert_array_equal(found["label"], label[35:205, 32:178])


def test_orientations_of_pancreas_files_do_not_matter(tmp_path, capsys):
    """The same body stored in four orders of axes gives the same voxels."""
    hu, label = ct()
    spacing, origin = (0.8, 0.9, 2.0), (-40.0, 12.0, -300.0)
    plain = {"image": volume(hu, spacing, origin), "label": volume(label, spacing, origin)}
    for number, (image_axes, label_axes) in enumerate([("LPS", "LPS"), ("RAS", "LPS"), ("LPS", "RAS"), ("SAR", "PIL")], 1):
        for what, axes in (("image", image_axes), ("label", label_axes)):
            name = "PANCREAS_" if what == "image" else "label"
            path = tmp_path / "raw" / f"{name}{number:04d}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            sitk.WriteImage(sitk.DICOMOrient(plain[what], axes), str(path))
    code, out, err = run(capsys, "pancreas", tmp_path / "raw", tmp_path / "dest")
    assert code == 0, out + err
    assert "header does not match the CT" not in out
    dataset = open_dataset(tmp_path / "dest", "pancreas")
    first = dataset.load("image0001")
    for number in (2, 3, 4):
        case = dataset.load(f"image000{number}")
        np.testing.assert_array_equal(case.label, first.label)
        np.testing.assert_allclose(case.image, first.image, atol=1e-3)
        np.testing.assert_allclose(case.affine, first.affine, atol=1e-4)


def test_labels_whose_header_says_nothing_are_laid_over_the_ct_and_must_meet_tissue(tmp_path, capsys):
    hu, label = ct()
    spacing, origin = (0.8, 0.9, 2.0), (-40.0, 12.0, -300.0)
    for number in (1, 2):
        save(tmp_path / "raw" / f"PANCREAS_000{number}.nii.gz", hu, spacing=spacing, origin=origin)
        save(tmp_path / "raw" / f"label000{number}.nii.gz", label, spacing=spacing, origin=(0, 0, 0))
    code, out, _ = run(capsys, "pancreas", tmp_path / "raw", tmp_path / "dest")
    assert code == 0
    assert "image0001, image0002: the label's header does not match the CT" in out
    plain = open_dataset(tmp_path / "dest", "pancreas").load("image0001")

    on_fat = np.roll(label, -45, axis=1)
    save(tmp_path / "raw" / "label0002.nii.gz", on_fat, spacing=spacing, origin=(0, 0, 0))
    code, out, err = run(capsys, "pancreas", tmp_path / "raw", tmp_path / "wrong")
    assert code == 2
    assert "label0002.nii.gz does not cover soft tissue" in out and "try --flip-labels y" in out
    assert "1 case of" in err
    assert not (tmp_path / "wrong" / "train.list").exists()

    for number in (1, 2):
        save(tmp_path / "raw" / f"label000{number}.nii.gz", label[:, ::-1], spacing=spacing, origin=(0, 0, 0))
    assert run(capsys, "pancreas", tmp_path / "raw", tmp_path / "flipped", "--flip-labels", "y")[0] == 0
    case = open_dataset(tmp_path / "flipped", "pancreas").load("image0001")
    np.testing.assert_array_equal(case.label, plain.label)
    assert "letters of xyz" in mistake(capsys, "data", "pancreas", tmp_path / "raw", tmp_path / "x", "--flip-labels", "yy")


def test_a_missing_slice_and_a_damaged_one_are_reported(tmp_path, capsys):
    hu, label = ct()
    write_dicom(tmp_path / "raw" / "PANCREAS_0001", hu, (1, 1, 2.5), (0, 0, 0), skip=(5,))
    write_dicom(tmp_path / "raw" / "PANCREAS_0004", hu, (1, 1, 2.5), (0, 0, 0))
    damaged = sorted((tmp_path / "raw" / "PANCREAS_0004").iterdir())[3]
    damaged.write_bytes(damaged.read_bytes()[:-300])
    for number in (2, 3):
        save(tmp_path / "raw" / f"PANCREAS_000{number}.nii.gz", hu)
        save(tmp_path / "raw" / f"label000{number}.nii.gz", label)
    code, out, _ = run(capsys, "pancreas", tmp_path / "raw", tmp_path / "dest")
    assert code == 2
    assert "are 5.00 mm apart, the others 2.50 mm" in out
    assert f"{damaged} is not a readable slice of the series" in out


def test_withdrawn_cases_are_left_out_of_published_lists(tmp_path, capsys):
    hu, label = ct()
    for number in (1, 2):
        save(tmp_path / "raw" / f"PANCREAS_000{number}.nii.gz", hu)
        save(tmp_path / "raw" / f"label000{number}.nii.gz", label)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.list").write_text("image0025\nimage0002\n")
    (lists / "test.list").write_text("image0001\n")
    code, out, _ = run(capsys, "pancreas", tmp_path / "raw", tmp_path / "dest", "--lists", lists)
    assert code == 0
    assert "image0025" in out and "withdrawn" in out
    assert open_dataset(tmp_path / "dest", "pancreas").names("train") == ["image0002"]
    (lists / "train.list").write_text("image0003\nimage0002\n")
    assert "lists image0003 (1 in all)" in mistake(
        capsys, "data", "pancreas", tmp_path / "raw", tmp_path / "new", "--lists", lists
    )


# -------------------------------------------------------------------------------------------------------------- brats


def raw_brats(root: Path, name: str, label=True, axes="LPS", suffix=".nii.gz") -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) FLAIR with a brain between zeros, and labels 1, 2, 4."""
    random = np.random.default_rng(4)
    flair, seg = np.zeros((24, 20, 16), np.int16), np.zeros((24, 20, 16), np.uint8)
    flair[3:20, 5:18, 2:15] = random.integers(1, 900, (17, 13, 13))
    flair[10, 10, 10] = 30000  # beyond the 99.9th percentile
    flair[4, 6, 3] = 0  # a hole
    for value, x in ((1, 6), (2, 9), (4, 12)):
        seg[x : x + 3, 8:12, 5:9] = value
    for what, array in (("flair", flair), ("seg", seg)):
        if what == "flair" or label:
            path = root / name / f"{name}_{what}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = sitk.DICOMOrient(volume(array, (1, 1, 1), (0, -239, 0)), axes if what == "flair" else "LPS")
            sitk.WriteImage(stored, str(path))
    return flair, seg


def test_brats_by_hand(tmp_path, capsys):
    flair, seg = raw_brats(tmp_path / "raw" / "HGG", "BraTS19_A_1")
    raw_brats(tmp_path / "raw" / "LGG", "BraTS19_B_1", axes="PIR")
    raw_brats(tmp_path / "raw" / "LGG", "BraTS19_C_1", suffix=".nii")
    raw_brats(tmp_path / "raw" / "new", "BraTS19_D_1", label=False)
    code, out, err = run(capsys, "brats", tmp_path / "raw", tmp_path / "dest")
    assert code == 0, out + err
    dataset = open_dataset(tmp_path / "dest", "brats")
    found = contents(tmp_path / "dest" / "data" / "BraTS19_A_1.h5")
    crop = flair[3:20, 5:18, 2:15].astype(np.float64)
    crop = np.minimum(crop, np.percentile(crop, 99.9))
    brain = crop[crop > 0]
    expected = (crop - brain.mean()) / brain.std()
    assert found["image"].dtype == np.float32
    np.testing.assert_allclose(found["image"], expected.transpose(2, 1, 0), atol=1e-4)
    np.testing.assert_array_equal(found["label"], (seg[3:20, 5:18, 2:15] > 0).transpose(2, 1, 0))
    assert found["label"].sum() == 3 * (3 * 4 * 4)
    # Written axes are z, y, x; index 0 of them lies at x 3, y 5, z 2 of the file, whose x and y point left and back.
    np.testing.assert_array_equal(
        dataset.load("BraTS19_A_1").affine, [[0, 0, -1, -3], [0, -1, 0, 234], [1, 0, 0, 2], [0, 0, 0, 1]]
    )
    for name in ("BraTS19_B_1", "BraTS19_C_1"):
        other = contents(dataset.path(name))
        np.testing.assert_array_equal(other["image"], found["image"])
        np.testing.assert_array_equal(other["label"], found["label"])
    assert dataset.load("BraTS19_D_1").label is None
    lists = [dataset.names(split) for split in ("train", "val", "test")]
    assert [len(names) for names in lists] == [2, 1, 1]
    assert lists[0][-1] == "BraTS19_D_1"
    assert run(capsys, "check", tmp_path / "dest")[0] == 0


# ------------------------------------------------------------------------------------------------- what all have alike


def test_what_is_done_is_not_done_again(tmp_path, capsys, monkeypatch):
    for name in "ABC":
        raw_brats(tmp_path / "raw", name)
    dest = tmp_path / "dest"
    assert run(capsys, "brats", tmp_path / "raw", dest)[0] == 0
    times = {path: path.stat().st_mtime_ns for path in (dest / "data").iterdir()}
    (dest / "data" / "B.h5").write_bytes((dest / "data" / "B.h5").read_bytes()[:-500])  # cut short
    lists = [(dest / f"{split}.txt").read_text() for split in ("train", "val", "test")]
    code, out, _ = run(capsys, "brats", tmp_path / "raw", dest)
    assert code == 0
    assert "1 case written, 2 already there" in out
    assert lists == [(dest / f"{split}.txt").read_text() for split in ("train", "val", "test")]
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ["B.h5"]
    with h5py.File(dest / "data" / "A.h5", "a") as file:
        del file["label"]  # as if the label came later than the image
    assert "1 case written" in run(capsys, "brats", tmp_path / "raw", dest)[1]
    with h5py.File(dest / "data" / "A.h5", "a") as file:
        file.attrs[conversion.SETTINGS] = json.dumps({"release": "brats", "seed": 3})
    assert "was converted with other settings" in mistake(capsys, "data", "brats", tmp_path / "raw", dest)


def test_a_kill_leaves_no_broken_file(tmp_path, capsys):
    """Killed in the middle of writing the second case, then run again."""
    for name in "ABC":
        raw_brats(tmp_path / "raw", name)
    trap = """
import os, signal, sys
from rplib.reference import checkpoint
from rplib.reference.conversion import releases as conversion
def write(path, fill, calls=[0], genuine=checkpoint.write_atomically):
    calls[0] += 1
    def half(file):
        fill(file)
        if calls[0] == 2:
            file.truncate(file.tell() // 2); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    genuine(path, half)
conversion.write_atomically = write
from rplib.cli import main
sys.exit(main(sys.argv[1:]))
"""
    dest = tmp_path / "dest"
    arguments = ["data", "brats", str(tmp_path / "raw"), str(dest)]
    killed = subprocess.run([sys.executable, "-c", trap, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (dest / "data").glob("*.h5")] == ["A.h5"]
    assert len(list((dest / "data").glob(".*"))) == 1  # the half
    code, out, _ = run(capsys, "brats", tmp_path / "raw", dest)
    assert code == 0
    assert "2 cases written, 1 already there" in out
    assert not list(dest.rglob(".*"))
    assert run(capsys, "check", dest)[0] == 0


def test_bad_raw_files_are_reported_and_the_rest_still_run(tmp_path, capsys):
    for name in "ABCDEFGH":
        raw_brats(tmp_path / "raw", name)
    files = {name: {what: tmp_path / "raw" / name / f"{name}_{what}.nii.gz" for what in ("flair", "seg")} for name in "ABCDEFGH"}
    files["A"]["flair"].write_bytes(b"no nifti")
    files["B"]["flair"].write_bytes(files["B"]["flair"].read_bytes()[:-400])
    save(files["C"]["seg"], np.ones((5, 5, 5), np.uint8))
    save(files["D"]["flair"], np.zeros((24, 20, 16), np.int16), origin=(0, -239, 0))
    save(files["E"]["seg"], np.zeros((24, 20, 16), np.uint8), origin=(0, -239, 0))
    nan = np.full((24, 20, 16), 3.0, np.float32)
    nan[3, 3, 3] = np.nan
    save(files["F"]["flair"], nan, origin=(0, -239, 0))
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 16, 2), np.int16), np.eye(4)), files["G"]["flair"])
    code, out, err = run(capsys, "brats", tmp_path / "raw", tmp_path / "dest")
    assert code == 2
    for name, what, reason in [
        ("A", "flair", "not a readable NIfTI file"),
        ("B", "flair", "cannot be read"),
        ("C", "seg", "is not on the grid"),
        ("D", "flair", "no voxel above 0"),
        ("E", "seg", "contains only background"),
        ("F", "flair", "NaN or infinite"),
        ("G", "flair", "expected a 3-D volume with one channel"),
    ]:
        assert any(str(files[name][what]) in line and reason in line for line in out.splitlines()), (name, out)
    assert "1 case written" in out
    assert "7 cases of" in err and "run the command again" in err
    assert not (tmp_path / "dest" / "train.txt").exists()


def test_mistakes_of_conversion(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no folder" in mistake(capsys, "data", "brats", tmp_path / "nowhere", tmp_path / "dest")
    line = mistake(capsys, "data", "left-atrium", empty, tmp_path / "dest")
    assert "contains no <case>/lgemri.nrrd" in line
    assert not (tmp_path / "dest").exists()
    raw_left_atrium(tmp_path / "raw" / "one", "A")
    raw_left_atrium(tmp_path / "raw" / "two", "A")
    assert "are both case A" in mistake(capsys, "data", "left-atrium", tmp_path / "raw", tmp_path / "dest")
    raw_left_atrium(tmp_path / "single", "A")
    assert "too few for train.list, test.list" in mistake(capsys, "data", "left-atrium", tmp_path / "single", tmp_path / "dest")
    assert "--seed is -1" in mistake(capsys, "data", "left-atrium", tmp_path / "single", tmp_path / "dest", "--seed", "-1")
    assert "has no train.list" in mistake(capsys, "data", "left-atrium", tmp_path / "single", tmp_path / "dest", "--lists", empty)
    (tmp_path / "file").write_text("")
    assert "is a file" in mistake(capsys, "data", "left-atrium", tmp_path / "single", tmp_path / "file")


def test_an_affine_is_as_nibabel_reads_it(tmp_path):
    direction = (0.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0)
    path = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6)), spacing=(0.5, 2.0, 3.0), origin=(1, -2, 3), direction=direction)
    expected = nibabel.load(path).affine
    np.testing.assert_allclose(affine_of(read_volume(path)), expected, atol=1e-5)
    np.testing.assert_allclose(affine_of(read_volume(path), (1, 2, 3))[:3, 3], (expected @ [1, 2, 3, 1])[:3], atol=1e-5)


def test_pancreas_settings_tell_the_flip():
    assert PancreasRelease("zy").settings == {"release": "pancreas", "flip_labels": "yz"}
