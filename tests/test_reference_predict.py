"""`rplib predict`: the same labels as evaluation gives, on the image's own grid, whatever the files and their axes."""

import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from reference_tools import TINY, mistake, write_case, write_dataset

from rplib import cli
from rplib.reference import checkpoint
from rplib.reference.config import load_recipe
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.inference import window_bar
from rplib.reference.inference.new_images import find_inputs, group_inputs
from rplib.reference.inference.windows import DECODER_1, MEAN, Segmentation, segment, segment_outputs
from rplib.reference.network import MutualVNet

ROOT = Path(__file__).resolve().parent.parent
SHEARED = np.array([[0.1, -0.8, 0, 12], [1.2, 0.1, 0, -7], [0, 0.2, 2.5, 30], [0, 0, 0, 1.0]])  # odd axes, no right angles


def run_folder(folder: Path, recipe: str, *changes: str) -> Path:
    """A run with drawn weights: what `rplib predict` needs of a training."""
    config = load_recipe(recipe, [*TINY, *changes])
    torch.manual_seed(3)
    network = checkpoint.build_network(config).eval()
    with torch.no_grad():  # the drawn network says background everywhere
        network.decoder1.out_conv.bias.copy_(torch.tensor([0.0, *[0.02] * (config.classes - 1)]))
    folder.mkdir()
    content = {"network": network.state_dict(), "iteration": 1, "chosen_by": "last iteration"}
    checkpoint.save(folder / checkpoint.BEST, {**content, "config": config.to_toml()})
    (folder / checkpoint.CONFIG).write_text(config.to_toml())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("runs") / "run", "la-4")


@pytest.fixture
def data(tmp_path):
    write_dataset(tmp_path / "data", train=1, test=2)
    return open_dataset(tmp_path / "data")


def predict(*arguments) -> int:
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def labels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def expected(run: Path, image: np.ndarray, **keywords) -> np.ndarray:
    network, config = checkpoint.load_network(run)
    return segment(network, image, config.patch, keywords.pop("stride", config.stride), **keywords).label


def test_h5_files_of_the_training_layout_give_what_evaluate_gives(run, data, tmp_path, capsys):
    names = data.names("test")
    assert predict(run, *(data.path(name) for name in names), "--out", tmp_path / "out", "--spacing", "0.5", "1", "2") == 0
    out, _ = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}_prediction.nii.gz" for name in names]
    for name in names:
        path = tmp_path / "out" / f"{name}_prediction.nii.gz"
        truth = expected(run, data.load(name).image)
        assert 0 < truth.mean() < 1
        np.testing.assert_array_equal(labels(path), truth)
        np.testing.assert_array_equal(nibabel.load(path).affine, np.diag([0.5, 1, 2, 1]))
        assert f"{name}: {truth.sum():,} voxels ({truth.sum() / 1000:.1f} ml); {path}" in out
    assert f"2 segmented, written to {tmp_path / 'out'}" in out


def test_a_nifti_file_keeps_its_grid_and_its_header(tmp_path):
    run = run_folder(tmp_path / "run", "generic", "normalisation=percentiles")
    image = np.random.default_rng(1).normal(100, 20, (20, 18, 17)).astype(np.float32)
    nifti = nibabel.Nifti1Image(image, None)
    nifti.header.set_qform(np.diag([1.2, 0.8, 2.5, 1]), 1)
    nifti.header.set_sform(SHEARED, 4)
    nifti.header.set_xyzt_units("mm", "sec")
    nifti.header.set_slope_inter(2, 5)
    nibabel.save(nifti, tmp_path / "scan.nii")
    arguments = ["--score", "--decoder", "mean", "--stride", 8, 8, 8]
    assert predict(run, tmp_path / "scan.nii", "--out", tmp_path / "out", *arguments) == 0
    stored = nibabel.load(tmp_path / "scan.nii")
    clipped = np.clip(image, *np.percentile(image, (0.5, 99.5)))
    network, config = checkpoint.load_network(run)
    truth = segment_outputs(network, ((clipped - clipped.mean()) / clipped.std()).astype(np.float32), config.patch, (8, 8, 8))
    for what, volume, kind in (("prediction", truth[MEAN].label, np.uint8), ("score", truth[MEAN].score, np.float32)):
        written = nibabel.load(tmp_path / "out" / f"scan_{what}.nii.gz")
        assert written.get_data_dtype() == kind
        np.testing.assert_allclose(np.asarray(written.dataobj), volume, atol=1e-5)
        np.testing.assert_array_equal(written.affine, stored.affine)
        np.testing.assert_allclose(written.affine, SHEARED, atol=1e-6)
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 4)
        np.testing.assert_array_equal(written.header.get_qform(), stored.header.get_qform())
        assert written.header.get_xyzt_units() == ("mm", "sec")
        assert b"generic, held-out, mean of both" in bytes(written.header["descrip"])


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)], ids=["in order", "turned"])
@pytest.mark.parametrize("recipe", ["pancreas-6", "brats-25", "la-4"])
def test_a_raw_scan_is_prepared_as_the_training_data_and_the_labels_are_brought_back(tmp_path, monkeypatch, recipe, axes):
    """A network that marks what is bright: the labels must be the bright block, on the scan's own voxels."""
    run = run_folder(tmp_path / "run", recipe)
    seen = []

    def bright(network, image, patch, stride, batch, device, outputs):
        seen.append(image)
        label = (image[0] > 1).astype(np.uint8)
        return {outputs[0]: type("Found", (), {"label": label, "score": label.astype(np.float32)})}

    monkeypatch.setattr("rplib.reference.inference.prediction.segment_outputs", bright)
    random = np.random.default_rng(2)
    scan, truth = random.normal(50, 5, (30, 26, 24)).astype(np.float32), np.zeros((30, 26, 24), bool)
    truth[5:11, 12:20, 3:9] = True
    scan[truth] = 240
    scan[:2] = scan[:, -1] = 0  # BraTS: outside the brain
    affine = np.diag([2.0, -1.0, 3.0, 1.0]) if recipe != "la-4" else np.diag([-0.625, -0.625, 0.625, 1.0])
    affine[:3, 3] = 11, -7, 5
    affine[:, :3] = affine[:, list(axes)]
    write = nibabel.Nifti1Image(scan.transpose(axes), affine)
    nibabel.save(write, tmp_path / "scan_flair.nii.gz")
    assert predict(run, tmp_path / "scan_flair.nii.gz", "--out", tmp_path / "out") == 0
    found = nibabel.load(tmp_path / "out" / "scan_flair_prediction.nii.gz")
    np.testing.assert_array_equal(found.affine, affine)
    np.testing.assert_array_equal(np.asarray(found.dataobj) != 0, truth.transpose(axes))
    (image,) = seen
    if recipe == "brats-25":  # cropped to the brain, axes z, y, x
        assert image.shape == (1, 24, 25, 28)
    elif recipe == "pancreas-6":  # 1 mm
        assert image.shape == (1, 60, 26, 72)
        assert np.percentile(image, 99.9) - image.min() < 10
    else:
        assert image.shape == (1, *scan.transpose(axes).shape)
        np.testing.assert_allclose([image.mean(), image.std()], [0, 1], atol=1e-4)


def test_prepared_nifti_files_are_taken_as_they_are(run, data, tmp_path):
    image = data.load(data.names("test")[0]).image
    affine = np.diag([1.0, 1, 1, 1])
    nibabel.save(nibabel.Nifti1Image(image + 3, affine), tmp_path / "a.nii.gz")
    assert predict(run, tmp_path / "a.nii.gz", "--out", tmp_path / "out", "--prepared") == 0
    assert predict(run, tmp_path / "a.nii.gz", "--out", tmp_path / "raw") == 0
    as_is, normalised = (labels(tmp_path / folder / "a_prediction.nii.gz") for folder in ("out", "raw"))
    np.testing.assert_array_equal(as_is, expected(run, image + 3))
    np.testing.assert_array_equal(normalised, expected(run, (image - image.mean()) / image.std()))
    assert (as_is != normalised).any()


def test_2d_images_of_two_channels_and_three_classes(tmp_path):
    run = run_folder(tmp_path / "run", "generic", "patch=16,16", "stride=8,8", "in_channels=2", "classes=3", "normalisation=none")
    image = np.random.default_rng(1).normal(size=(2, 20, 24)).astype(np.float32)
    for number, channel in enumerate(image):
        nibabel.save(nibabel.Nifti1Image(channel[..., None], SHEARED), tmp_path / f"a_000{number}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(image, 0, -1), SHEARED), tmp_path / "b.nii.gz")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["image"] = image
    files = [tmp_path / name for name in ("a_0001.nii.gz", "a_0000.nii.gz", "b.nii.gz", "c.h5")]
    assert predict(run, *files, "--out", tmp_path / "out") == 0
    truth = expected(run, image)
    assert {0, 1, 2} >= set(np.unique(truth)) > {0}
    assert labels(tmp_path / "out" / "a_prediction.nii.gz").shape == (20, 24, 1)
    for name in "abc":
        np.testing.assert_array_equal(labels(tmp_path / "out" / f"{name}_prediction.nii.gz").reshape(20, 24), truth)


def test_the_largest_component_alone(run, tmp_path, monkeypatch):
    label = np.zeros((6, 6, 6), np.uint8)
    label[:2], label[4:, :2] = 1, 1
    monkeypatch.setattr(
        "rplib.reference.inference.prediction.segment_outputs", lambda *_: {"decoder 1": Segmentation(label, label)}
    )
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random(label.shape), np.eye(4)), tmp_path / "a.nii.gz")
    assert predict(run, tmp_path / "a.nii.gz", "--out", tmp_path / "all") == 0
    assert predict(run, tmp_path / "a.nii.gz", "--out", tmp_path / "one", "--largest-component") == 0
    np.testing.assert_array_equal(labels(tmp_path / "all" / "a_prediction.nii.gz"), label)
    label[4:] = 0
    np.testing.assert_array_equal(labels(tmp_path / "one" / "a_prediction.nii.gz"), label)


def test_bad_images_among_good_ones_are_reported_and_the_rest_still_run(run, data, tmp_path, capsys):
    good = data.path(data.names("test")[0])
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4), np.float32), np.eye(4)), tmp_path / "flat.nii.gz")
    for name, shape in (("constant", (20, 18, 17)), ("empty", (20, 18, 0))):
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    bad = [tmp_path / f"{name}.nii.gz" for name in ("bad", "flat", "constant", "empty")]
    arguments = [run, bad[0], good, *bad[1:], "--out", tmp_path / "out", "--device", "cpu"]
    assert cli.main(["predict", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert f"bad not segmented: {tmp_path / 'bad.nii.gz'} is not a readable NIfTI" in err
    assert "flat not segmented" in err
    assert f"constant not segmented: {tmp_path / 'constant.nii.gz'} is constant" in err
    assert f"empty not segmented: {tmp_path / 'empty.nii.gz'} " in err
    assert "rplib: error: 4 of 5 images were not segmented; see above for the reasons: bad, flat, constant, empty." in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{data.names('test')[0]}_prediction.nii.gz"]
    assert out.count("voxels") == 1


def test_existing_label_maps(run, data, tmp_path, capsys):
    first, second = (data.path(name) for name in data.names("test"))
    assert predict(run, first, "--out", tmp_path) == 0
    (written,) = tmp_path.glob("*.nii.gz")
    before = written.read_bytes()
    written.write_bytes(b"older")
    assert "exists already (1 such files)" in mistake(capsys, "predict", run, second, first, "--out", tmp_path)
    assert len([*tmp_path.glob("*.nii.gz")]) == 1  # nothing was begun
    assert predict(run, first, second, "--out", tmp_path, "--existing", "skip") == 0
    assert f"skipped, label maps exist: {data.names('test')[0]}" in capsys.readouterr().err
    assert written.read_bytes() == b"older"
    assert predict(run, first, second, "--out", tmp_path, "--existing", "overwrite") == 0
    assert written.read_bytes() == before  # the same voxels, the same bytes


def test_mistakes_are_reported_before_anything_is_done(run, data, tmp_path, capsys):
    path = data.path(data.names("test")[0])
    (tmp_path / "x").mkdir()
    for name in ("a.nii.gz", "x/a.nii", "b.png"):
        (tmp_path / name).write_bytes(b"")

    def message(*arguments):
        line = mistake(capsys, "predict", *arguments, "--out", tmp_path / "out", "--device", "cpu")
        assert not (tmp_path / "out").exists()
        return line

    assert "no run folder" in message(tmp_path / "no", path)
    assert "no file" in message(run, tmp_path / "no.nii.gz")
    assert "2 of 2 images were not segmented" in message(run, tmp_path / "no.nii.gz", tmp_path / "b.png")
    assert "is a folder without DICOM files; name the images in it" in message(run, tmp_path)
    assert "b.png is neither NIfTI" in message(run, tmp_path / "b.png")
    assert "are both called a" in message(run, tmp_path / "a.nii.gz", tmp_path / "x" / "a.nii")
    assert "does not fit" in message(run, path, "--stride", "99", "1", "1")
    assert "--spacing has 2 numbers" in message(run, path, "--spacing", "1", "1")
    assert "--out" in mistake(capsys, "predict", run, path)
    assert "is a file" in mistake(capsys, "predict", run, path, "--out", tmp_path / "b.png")
    write_case(tmp_path / "flat", "A", image=np.zeros((4, 4), np.float32))
    line = mistake(capsys, "predict", run, next((tmp_path / "flat").rglob("*.h5")), "--out", tmp_path / "out")
    assert "'image' has shape (4, 4); expected 3 axes" in line


def test_files_that_are_one_image(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0007.nii", "c.nii.gz"):
        (tmp_path / name).touch()
    inputs, refused = find_inputs([*sorted(tmp_path.iterdir()), tmp_path / "nobody.nii"])
    assert refused == [("nobody.nii", f"no file {tmp_path / 'nobody.nii'}.")]
    assert [item.name for item in group_inputs(inputs, 1)[0]] == ["a_0000", "a_0001", "b_0007", "c"]
    (both, single), refused = group_inputs(inputs, 2)
    assert refused == [("b", "the channels 0007 of b were given; expected 0000, 0001.")]
    assert (both.name, [path.name for path in both.files]) == ("a", ["a_0000.nii.gz", "a_0001.nii.gz"])
    assert (single.name, len(single.files)) == ("c", 1)
    found, ((name, reason),) = group_inputs(inputs[:2], 3)
    assert (found, name) == ([], "a")
    assert "the channels 0000, 0001 of a were given; expected 0000, 0001, 0002" in reason


@pytest.mark.parametrize("output", [DECODER_1, MEAN])
def test_the_bar_counts_the_windows_that_the_network_sees(monkeypatch, output):
    bars = []

    class Bar(window_bar.Progress):
        def __init__(self, **keywords):
            bars.append(self)
            super().__init__(**(keywords | {"disable": False}))

    monkeypatch.setattr(window_bar, "Progress", Bar)
    network, shape = MutualVNet(filters=1, dims=2).eval(), (27, 20)
    with window_bar.window_bar(network, shape, (16, 16), (5, 3), "case"):
        segment(network, np.zeros(shape, np.float32), (16, 16), (5, 3), batch=4, output=output)
    assert [(bar.n, bar.total) for bar in bars] == [(12, 12)]  # 4 x 3
    segment(network, np.zeros(shape, np.float32), (16, 16), (5, 3))
    assert bars[0].n == 12  # the hook is gone


def test_axes_that_are_not_at_right_angles(tmp_path, capsys):
    image = np.random.default_rng(0).normal(size=(20, 18, 17)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, SHEARED), tmp_path / "a.nii.gz")
    turned = run_folder(tmp_path / "turned", "brats-25")
    assert "not orthogonal" in mistake(capsys, "predict", turned, tmp_path / "a.nii.gz", "--out", tmp_path / "out")
    as_it_lies = run_folder(tmp_path / "as-it-lies", "la-4")
    assert predict(as_it_lies, tmp_path / "a.nii.gz", "--out", tmp_path / "out") == 0
    np.testing.assert_allclose(nibabel.load(tmp_path / "out" / "a_prediction.nii.gz").affine, SHEARED, atol=1e-6)


def test_the_script_accepts_the_same_options(tmp_path):
    script = [sys.executable, str(ROOT / "reference" / "predict.py"), "no-run", "no-image", "--out", "out"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("rplib: error: no run folder no-run")
