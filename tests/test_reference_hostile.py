"""Hostile names, headers, settings, disks and neighbours: every one is a sentence that names the file, and nothing is damaged."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from reference_tools import TINY, mistake, write_case, write_dataset

from rplib import cli
from rplib.errors import UserError, explained
from rplib.reference import checkpoint, files
from rplib.reference.config import Config, load_config, load_recipe, parse
from rplib.reference.datasets import headers
from rplib.reference.datasets.cases import read_list
from rplib.reference.datasets.h5 import read_h5
from rplib.reference.datasets.layouts import open_dataset
from rplib.reference.datasets.nifti import open_nifti
from rplib.reference.training import run_folder, trainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them takes as long as these trainings."""
    monkeypatch.setattr(trainer, "write_curves", lambda _: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root)
    return root


def start(data: Path, run: Path, *overrides: str) -> list[str]:
    return ["train", "--recipe", "la-4", "--data", str(data), "--out", str(run), "--set", *TINY, *overrides]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_curves", lambda _: None)
        assert cli.main(start(data, run, "iterations=10")) == 0
    return run


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["a\x01b", "a\nb", "a\u2028b", "\udcff", "a\x7fb", "", "x" * 201])
def test_a_name_that_no_file_could_hold_is_refused_at_the_start(data, tmp_path, capsys, name):
    line = mistake(capsys, *start(data, tmp_path / "run", f"name={name}"))
    assert line.startswith("name is ") and "printable characters" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ['a"b', "a\\b", "[/b]", "a # b", "'", "é \u202e", "$a_{$b", "C:\\new\\table"])
def test_settings_come_back_from_their_file(name):
    config = load_recipe("la-8", [f"filters={4}"]).replace(name=name, weight_decay=1e-12, learning_rate=1e22)
    assert parse(config.to_toml(), "config.toml") == config


HUGE = [
    ("iterations=100000000000000000000", "expected at most 1000000000"),
    ("filters=1000000000", "expected at most 4096"),
    ("filters=4000", "GB of memory and this machine has"),
    ("patch=1600,1600,1600", "GB of memory and this machine has"),
    ("patch=16000000,16,16", "expected at most 4096"),
    ("batch_size=4000 patch=512,512,512", "GB of memory and this machine has"),
    (f"seed={'9' * 5000}", "seed is '999"),
    (f"iterations={'9' * 4000}", "(4000 characters)"),
    (f"learning_rate={'9' * 400}", "expected a number below 1.8e308"),
    (f"seed=0x{'f' * 5000}", "a number of thousands of digits"),
    (f"patch={'[' * 5000}", "expected three whole numbers"),
    (f"{'k' * 5000}=1", "unknown setting"),
]


@pytest.mark.parametrize(("settings", "reason"), HUGE, ids=[settings[:20] for settings, _ in HUGE])
def test_impossible_settings_are_refused_with_what_they_would_need(data, tmp_path, capsys, settings, reason):
    line = mistake(capsys, *start(data, tmp_path / "run", "stride=16,16,16", *settings.split()))
    assert reason in line
    assert len(line) < 1000
    assert not (tmp_path / "run" / "config.toml").exists()


def test_every_integer_setting_has_a_range():
    for key, field in Config.__dataclass_fields__.items():
        if field.type in (int, tuple[int, ...]):
            assert field.metadata["least"] is not None and field.metadata["most"] is not None, key


def test_what_a_step_surely_needs_by_hand():
    config = load_recipe("la-4", TINY)
    weights = sum(p.nbytes for p in checkpoint.build_network(config).parameters())
    voxels = 3 * 16**3  # batch_size, patch
    assert run_folder.memory_needed(config) == 3 * weights + 4 * voxels * (1 + 2 * (2 + 2))  # image, features and logits twice


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "seed = " + "9" * 5000, "[" * 3000, "name = 'a", "\x00", "seed = 1\nseed = 2", "a" * 10_000]
)
def test_a_recipe_that_no_parser_takes(tmp_path, capsys, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    assert str(path) in mistake(capsys, "train", "--recipe", path, "--data", tmp_path, "--out", tmp_path / "run")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfbase = 'la-8'\r\nfilters = 4\r\n", b"base = 'la-8'\r\nfilters = 4"])
def test_a_byte_order_mark_and_windows_line_ends_are_stripped(tmp_path, content):
    (tmp_path / "own.toml").write_bytes(content)
    assert load_config(tmp_path / "own.toml").filters == 4
    (tmp_path / "train.list").write_bytes(b"\xef\xbb\xbfA\r\nB\r\n\xef\xbb\xbfC, x\rD")
    assert read_list(tmp_path / "train.list") == ["A", "B", "C", "D"]


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["..", "../../escaped", "/etc/escaped", "a/b", "a\\b", "a\x00b", "a\x1b[2Jb", "x" * 201, "."])
@pytest.mark.parametrize("command", ["evaluate", "shrink", "check", "train"])
def test_a_list_cannot_lead_out_of_its_folder(data, trained, tmp_path, capsys, name, command):
    root = tmp_path / "data"
    write_dataset(root, train=4, test=1)
    for split in ("train", "test"):
        (root / f"{split}.list").write_text(f"CASE00\nCASE01\nCASE02\n{name}\nCASE03\n")
    before = everything(tmp_path)
    arguments = {
        "evaluate": ["evaluate", trained, "--data", root, "--out", tmp_path / "out", "--nifti", "all"],
        "shrink": ["data", "shrink", root, tmp_path / "out"],
        "check": ["data", "check", root],
        "train": start(root, tmp_path / "out"),
    }[command]
    if command == "check":
        assert cli.main(list(map(str, arguments))) == 2
        message = capsys.readouterr().out
    else:
        message = mistake(capsys, *arguments)
    assert "train.list contains '" in message or "test.list contains '" in message
    assert "not a case name; expected" in message
    assert "\x1b" not in message and "\x00" not in message
    assert {k: v for k, v in everything(tmp_path).items() if not k.startswith("out/")} == before


@pytest.mark.parametrize("part", ["../a", "/a", "a/b", "..", "a\x00", "a\nb", "é" * 128, ""])
def test_no_output_path_leaves_its_folder(tmp_path, part):
    with pytest.raises(UserError, match="expected"):
        files.output_path(tmp_path, part)
    assert files.output_path(tmp_path, "x" * 255).parent == tmp_path


def test_a_long_name_is_reported_before_the_network_is_asked(data, trained, tmp_path, capsys):
    image = tmp_path / f"{'x' * 248}.nii"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((16, 16, 16), np.float32), np.eye(4)), image)
    assert "a name of at most 255 bytes, not 266" in mistake(capsys, "predict", trained, image, "--out", tmp_path / "out")


def test_names_are_neither_formulas_nor_markup(data, tmp_path, capsys):
    root, name = tmp_path / "data", "cost$a_{$b [red] :smile: &lt;"
    names = write_dataset(root, train=4, test=1)
    folder = root / "2018LA_Seg_Training Set"
    (folder / names[-1]).rename(folder / name)
    (root / "test.list").write_text(f"{name}\n")
    run = tmp_path / "run"
    assert cli.main(start(root, run, "iterations=2", "name=[/b] $x_{")) == 0
    assert cli.main(["evaluate", str(run), "--data", str(root), "--nifti", "none"]) == 0
    out = capsys.readouterr().out
    assert name in out and "Recipe [/b] $x_{" in out
    written = {path.name for path in (run / "evaluation-test").iterdir()}
    assert {"scores.csv", "report.html", "pictures.png", "reliability.png"} <= written
    assert "cost$a_{$b [red] :smile: &amp;lt;" in (run / "evaluation-test" / "report.html").read_text()
    assert cli.main(["compare", str(run)]) == 0
    assert "[/b] $x_{" in capsys.readouterr().out


def test_scores_are_there_whatever_becomes_of_the_pictures(data, trained, tmp_path, monkeypatch):
    from rplib.reference.reporting import report

    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", str(trained), "--data", str(data), "--out", str(tmp_path / "out"), "--nifti", "none", "--no-maps"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scores.csv", "summary.csv", "report.txt"}


# ------------------------------------------------------------------------------------------------------------- headers

AFFINES = {
    "text": "identity",
    "3x3": np.eye(3),
    "nan": np.diag([np.nan, 1, 1, 1]),
    "inf": np.diag([np.inf, 1, 1, 1]),
    "zeros": np.zeros((4, 4)),
    "complex": np.eye(4) * 1j,
    "flat": np.diag([1.0, 1, 0, 1]),
    "same": np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "last row": np.ones((4, 4)) + np.diag([1, 2, 3, 4]),
    "huge": np.diag([1e300, 1e300, 1e300, 1]),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_an_affine_that_is_none(tmp_path, affine):
    path = write_case(tmp_path, "A", image=np.zeros((4, 4, 4), np.float32))
    with h5py.File(path, "a") as file:
        file.attrs["affine"] = affine
    with pytest.raises(UserError, match=r"mri_norm2\.h5: the attribute 'affine' "):
        read_h5(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("what", ["images", "labels"])
def test_a_nifti_header_with_an_affine_that_is_none(tmp_path, value, what):
    affine = np.eye(4)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        volume = nibabel.Nifti1Image(np.arange(64, dtype=np.uint8).reshape(4, 4, 4) % 2, affine)
        if folder == what:
            volume.header["srow_x"] = value
            volume.header["sform_code"], volume.header["qform_code"] = 2, 0
        content = bytearray(volume.to_bytes())
        if folder == what:  # nibabel writes its own affine over that of the header
            content[280:296] = np.array([value] * 4, "<f4").tobytes()
        (tmp_path / folder / "a.nii").write_bytes(content)
    with pytest.raises(UserError, match=f"{what}/a.nii: the affine of its header "):
        open_dataset(tmp_path, "generic").load("a")


def test_a_huge_empty_data_set_is_not_allocated(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (1500, 1500, 1000), np.float32)
    with pytest.raises(UserError, match=r"8\.4 GB of memory, more than the limit of 8 GB; .*RPLIB_MOST_GB=9"):
        read_h5(path)
    monkeypatch.setenv(headers.LIMIT, "20")
    with pytest.raises(UserError, match="the file has 0 bytes; the file is truncated"):
        read_h5(path)
    monkeypatch.setenv(headers.LIMIT, "much")
    with pytest.raises(UserError, match="RPLIB_MOST_GB is 'much'"):
        read_h5(path)


def test_a_limit_can_be_lowered_and_raised(tmp_path, monkeypatch):
    path = write_case(tmp_path, "A", image=np.zeros((64, 64, 64), np.float32))  # 1 MB
    monkeypatch.setenv(headers.LIMIT, "0.0009")
    with pytest.raises(UserError, match="more than the limit"):
        read_h5(path)
    monkeypatch.setenv(headers.LIMIT, "0.001")
    assert read_h5(path)[0]["image"].shape == (64, 64, 64)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_header_that_declares_more_than_the_file_holds(tmp_path, suffix):
    import gzip

    content = bytearray(nibabel.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)).to_bytes())
    content[42:48] = np.array([800, 800, 800], "<i2").tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(bytes(content)) if suffix == ".nii.gz" else bytes(content))
    with pytest.raises(UserError, match="declares 800 x 800 x 800 voxels of 4 bytes, but the file has"):
        open_nifti(path)
    content[42:48] = np.array([8000, 8000, 8000], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)) if suffix == ".nii.gz" else bytes(content))
    with pytest.raises(UserError, match="more than the limit"):
        open_nifti(path)


@pytest.mark.parametrize(("sizes", "reason"), [("9000 9000 9000", "more than the limit"), ("400 400 400", "the file has")])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_nrrd_header_that_declares_more_than_the_file_holds(tmp_path, sizes, reason, compressed):
    from rplib.reference.conversion.geometry import read_volume

    path = tmp_path / "lgemri.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 8, 8), np.int16)), str(path), compressed)
    content = path.read_bytes()
    assert b"sizes: 8 8 8" in content
    path.write_bytes(content.replace(b"sizes: 8 8 8", f"sizes: {sizes}".encode()))
    with pytest.raises(UserError, match=reason):
        read_volume(path)


@pytest.mark.parametrize("line", ["space origin: (0,0," + "9" * 5000, "[" * 3000, "sizes: 8 8 0x" + "f" * 4000])
def test_an_nrrd_header_that_itk_does_not_survive(tmp_path, line):
    """Found by fuzz_files.py: a segmentation fault in the parser of SimpleITK 2.5."""
    from rplib.reference.conversion.geometry import read_volume

    path = tmp_path / "lgemri.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 8, 8), np.int16)), str(path))
    path.write_bytes(path.read_bytes().replace(b"endian:", line.encode() + b"\nendian:"))
    with pytest.raises(UserError, match=r"lgemri\.nrrd has a header line of [0-9]+ bytes"):
        read_volume(path)
    path.write_bytes(path.read_bytes().replace(line.encode(), b"# " + b"x" * 5000 + b"\nkey:=" + b"y" * 5000))
    assert read_volume(path).GetSize() == (8, 8, 8)


@pytest.mark.parametrize("value", [np.nan, -1.0, 0.5, 300.0, np.inf, 1 + 2j])
def test_labels_that_are_none_are_not_shrunk(tmp_path, capsys, value):
    root = tmp_path / "data"
    write_dataset(root, train=2, test=1, shape=(18, 18, 18))
    label = np.zeros((18, 18, 18), type(value))
    label[3, 4, 5] = value
    path = write_case(root, "CASE01", image=np.random.default_rng(0).random((18, 18, 18), np.float32), label=label)
    assert cli.main(["data", "shrink", str(root), str(tmp_path / "small")]) == 2
    out = capsys.readouterr().out
    assert f"{path}: 'label' " in out and "Traceback" not in out
    assert not (tmp_path / "small" / "train.list").exists()


# -------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("number", [n for n in errno.errorcode if n not in (errno.EINTR, errno.EPIPE)])
def test_every_error_of_the_system_is_a_sentence_with_the_path(number):
    message = str(explained(OSError(number, os.strerror(number), "some/file")))
    assert os.strerror(number) in message and "some/file" in message


@pytest.mark.parametrize(
    ("path", "reason"),
    [("x" * 300, "File name too long"), ("loop/a", "symbolic links"), ("nul\0", "NUL"), ("file/a", "directory")],
)
@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "phantom", "shrink", "recipe", "compare"])
def test_paths_that_the_system_refuses(data, trained, tmp_path, capsys, path, reason, command):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    bad = tmp_path / path
    arguments = {
        "train": start(data, bad),
        "predict": ["predict", trained, open_dataset(data).path("CASE05"), "--out", bad],
        "evaluate": ["evaluate", trained, "--data", data, "--out", bad],
        "phantom": ["data", "phantom", bad, "--cases", 1, "--size", 32, 32, 32],
        "shrink": ["data", "shrink", data, bad],
        "recipe": ["train", "--recipe", f"{bad}.toml", "--data", data, "--out", tmp_path / "run"],
        "compare": ["compare", bad],
    }[command]
    line = mistake(capsys, *arguments)
    assert reason.lower() in line.lower() or str(tmp_path) in line


@contextlib.contextmanager
def full(after: int):
    """A disk that takes this many bytes per file."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["evaluate", "predict", "phantom", "shrink"])
def test_a_full_disk_names_the_file_and_leaves_none_in_part(data, trained, tmp_path, capsys, command):
    out = tmp_path / "out"
    arguments = {
        "predict": ["predict", trained, open_dataset(data).path("CASE05"), "--out", out, "--score"],
        "evaluate": ["evaluate", trained, "--data", data, "--out", out, "--nifti", "all"],
        "phantom": ["data", "phantom", out, "--cases", 1, "--size", 32, 32, 32],
        "shrink": ["data", "shrink", data, out],
    }[command]
    with full(after=1000):
        line = mistake(capsys, *arguments)
    assert "File too large: " in line and str(out) in line and "ulimit" in line
    assert not [name for name in everything(out) if ".tmp" in name or ".lock" in name] if out.exists() else True
    if command == "phantom":
        assert not out.exists()
        assert cli.main(list(map(str, arguments))) == 0


def test_memory_that_is_not_there_is_a_sentence(data, tmp_path, capsys, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        monkeypatch.setattr(trainer, "training_step", lambda *_, error=error: (_ for _ in ()).throw(error))
        line = mistake(capsys, *start(data, tmp_path / type(error).__name__))
        assert "memory" in line and "batch_size=3, patch=[16, 16, 16]" in line


# ---------------------------------------------------------------------------------------------------------- neighbours


def test_two_writers_of_one_run(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with files.locked(run, "RUN"):
        line = mistake(capsys, *start(data, run))
    assert f"--out {run} is being written by another rplib process" in line
    assert cli.main(start(data, run, "iterations=1")) == 0
    with files.locked(run, "RUN"):
        assert "another rplib process" in mistake(capsys, "train", "--resume", "--out", run, "--set", "iterations=2")
    assert not (run / files.LOCK).exists()


@pytest.mark.parametrize("command", ["evaluate", "shrink", "phantom"])
def test_two_writers_of_one_folder(data, trained, tmp_path, capsys, command):
    out = tmp_path / "out"
    out.mkdir()
    arguments = {
        "evaluate": ["evaluate", trained, "--data", data, "--out", out],
        "phantom": ["data", "phantom", out, "--cases", 1, "--size", 32, 32, 32],
        "shrink": ["data", "shrink", data, out],
    }[command]
    with files.locked(out, "OUT"):
        assert "another rplib process" in mistake(capsys, *arguments)
    assert list(out.iterdir()) == []


def test_cleaning_takes_our_own_leftovers_alone(data, tmp_path, capsys):
    out, run = tmp_path / "small", tmp_path / "run"
    strangers = [out / ".notes.tmp", out / "data" / ".x.h5.123.tmp", out / ".rplib-x.tmp", run / ".mine.tmp"]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("keep me")
    (out / "data" / ".rplib-12-0123456789ab.tmp").write_text("ours")
    assert cli.main(["data", "shrink", str(data), str(out)]) == 0
    assert cli.main([*start(data, run, "iterations=1"), "--resume"]) == 0
    assert all(path.read_text() == "keep me" for path in strangers)
    assert not (out / "data" / ".rplib-12-0123456789ab.tmp").exists()


def test_temporary_names_are_unique_and_short():
    names = {files.temporary(Path("x" * 255)).name for _ in range(100)}
    assert len(names) == 100 and max(map(len, names)) < 50


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_every_flipped_bit_of_a_record_is_found(trained, tmp_path):
    path, random = tmp_path / "last.pt", np.random.default_rng(0)
    whole = (trained / "last.pt").read_bytes()
    plain = checkpoint.load(trained / "last.pt")
    with zipfile.ZipFile(trained / "last.pt") as archive:
        entries = archive.infolist()
    inside = [(start := data_of(whole, e), start + e.file_size) for e in random.permutation(entries)[:30] if e.file_size]
    between = [(e.header_offset, data_of(whole, e)) for e in random.permutation(entries)[:15]]
    directory = [(entries[-1].header_offset + entries[-1].file_size + 200, len(whole))] * 5
    for low, high in [*inside, *between, *directory]:
        damaged, place = bytearray(whole), int(random.integers(low, high))
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        found, message = None, ""
        try:
            found = checkpoint.load(path)
        except UserError as error:
            message = str(error)
        assert str(path) in message or (low, high) not in inside
        if found is not None:  # the flip lies in what nothing reads
            assert all(torch.equal(value, found["network"][key]) for key, value in plain["network"].items())


def data_of(content: bytes, entry: zipfile.ZipInfo) -> int:
    """Where the data of a record begin: after 30 bytes, its name and its padding."""
    name, extra = (int.from_bytes(content[entry.header_offset + k : entry.header_offset + k + 2], "little") for k in (26, 28))
    return entry.header_offset + 30 + name + extra


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(data, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(start(data, whole)) == 0
    assert cli.main(start(data, run, "iterations=10")) == 0
    assert checkpoint.load(run / checkpoint.PREVIOUS)["iteration"] == 5
    with zipfile.ZipFile(run / "last.pt") as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray((run / "last.pt").read_bytes())
    content[entry.header_offset + 500] ^= 16
    (run / "last.pt").write_bytes(content)
    arguments = ["train", "--resume", "--out", str(run), "--set", "iterations=12"]
    line = mistake(capsys, *arguments)
    assert f"{run / 'last.pt'} is not a readable checkpoint (the checksum of " in line
    assert f"the previous checkpoint is kept: replace it with {run / 'last.previous.pt'}" in line
    (run / "last.previous.pt").replace(run / "last.pt")
    assert cli.main(arguments) == 0
    ends = [torch.load(folder / "last.pt", weights_only=True)["network"] for folder in (whole, run)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


CONTENTS = {
    "integer keys": {1: torch.zeros(1)},
    "no config": {"network": {}},
    "config is no text": {"network": {}, "config": 5},
    "network is no dict": {"network": [1], "config": ""},
    "integer keys inside": {"network": {1: torch.zeros(1)}, "config": Config().replace(filters=1).to_toml()},
    "no tensors inside": {"network": {"encoder.block_one.conv.0.weight": 1}, "config": Config().replace(filters=1).to_toml()},
    "a list": [1, 2],
    "a scalar tensor": {"encoder.block_one.conv.0.weight": torch.zeros(()), "decoder1.out_conv.weight": torch.zeros(())},
    "bad config": {"network": {}, "config": "filters = " + "9" * 5000},
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_checkpoints_of_other_contents(data, tmp_path, capsys, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert str(path) in mistake(capsys, "evaluate", path, "--data", data, "--out", tmp_path / "out")


def test_a_checkpoint_of_weights_alone_says_how_many_axes_its_network_has(tmp_path):
    """Flat images, three channels, four classes: all of it is read off the weights."""
    config = load_recipe("la-4", ["filters=2", "in_channels=3", "classes=4", "patch=32,16", "stride=16,16"])
    torch.save(checkpoint.build_network(config).state_dict(), tmp_path / "weights.pt")
    _, found = checkpoint.load_network(tmp_path / "weights.pt")
    assert (found.filters, found.in_channels, found.classes, found.name) == (2, 3, 4, "weights")
    assert (len(found.patch), len(found.stride)) == (2, 2)


def test_a_disk_that_is_full_is_reported_as_such_while_a_checkpoint_is_written(tmp_path):
    with full(after=1000), pytest.raises(OSError, match=str(tmp_path / "a.pt")) as caught:
        checkpoint.save(tmp_path / "a.pt", {"weights": torch.zeros(10_000)})
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimiser", {}), ("batches", "[]"), ("batches", "{"), ("torch_random", torch.zeros(3)), ("iteration", 3.5),
     ("iteration", -1), ("best_score", "high"), ("network", {}), ("optimiser", {"state": 1, "param_groups": []})],
)  # fmt: skip
def test_a_state_that_no_training_can_go_on_from(data, tmp_path, capsys, key, value):
    run = tmp_path / "run"
    assert cli.main(start(data, run, "iterations=1")) == 0
    saved = checkpoint.load(run / "last.pt")
    checkpoint.save(run / "last.pt", {**saved, key: value})
    assert f"{run / 'last.pt'}" in mistake(capsys, "train", "--resume", "--out", run, "--set", "iterations=2")


def test_fewer_iterations_than_have_run_are_refused(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(start(data, run, "iterations=7")) == 0
    before = everything(run)
    for n in (6, 5, 1):
        line = mistake(capsys, "train", "--resume", "--out", run, "--set", f"iterations={n}")
        assert f"is at iteration 7, past iterations={n}" in line
    assert everything(run) == before


# ------------------------------------------------------------------------------------------------------------- compare

SCORES = "case,method,class,dice,jaccard,hd95,asd,hd95_mm,asd_mm\n"
LINE = "A,decoder 1,1,0.5,0.4,1.0,2.0,,\n"
DAMAGED = {
    "empty": "",
    "no columns": "A,B\n1,2\n",
    "short line": SCORES + "A,decoder 1,1\n",
    "long line": SCORES + LINE.strip() + ",7\n",
    "text": SCORES + LINE.replace("0.5", "half"),
    "above 1": SCORES + LINE.replace("0.5", "1.5"),
    "negative": SCORES + LINE.replace("2.0", "-2.0"),
    "infinite": SCORES + LINE.replace("2.0", "inf"),
    "twice": SCORES + LINE + LINE,
    "NUL": SCORES + LINE.replace("0.5", "0.5\0"),
    "huge field": SCORES + LINE.replace("A", "A" * 200_000),
    "open quote": SCORES + '"A,decoder 1',
    "Latin-1": b"case,m\xe9thod\n",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_scores(trained, tmp_path, capsys, text):
    run = tmp_path / "run"
    (run / "evaluation-test").mkdir(parents=True)
    (run / "config.toml").write_bytes((trained / "config.toml").read_bytes())
    path = run / "evaluation-test" / "scores.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in mistake(capsys, "compare", run)
    path.write_text(SCORES + LINE)
    assert cli.main(["compare", str(run)]) == 0


# ------------------------------------------------------------------------------------------------------------- signals


def test_sigterm_writes_a_checkpoint_and_the_training_resumes_to_the_same_bits(data, tmp_path, capsys, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(start(data, whole)) == 0
    genuine, calls = trainer.training_step, iter(range(1, 100))

    def step(*arguments):
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return genuine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", step)
        assert cli.main(start(data, run)) == cli.EXIT_TERMINATED == 143
    err = capsys.readouterr().err
    assert f"stopped after iteration 7, saved in {run / 'last.pt'}; resume with: rplib train --resume --out {run}" in err
    assert "Traceback" not in err and "rplib: terminated" in err
    assert checkpoint.load(run / "last.pt")["iteration"] == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    ends = [torch.load(folder / "last.pt", weights_only=True)["network"] for folder in (whole, run)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_while_a_command_is_imported(number, code, said):
    """The command's own modules take seconds; here one of them sends the signal itself."""
    program = f"""
import os, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
from rplib import cli
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == "rplib.reference.data":
            os.kill(os.getpid(), {int(number)})
            for _ in range(1000): pass
sys.meta_path.insert(0, Sender())
sys.exit(cli.main(["data", "--help"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (code, f"rplib: {said}\n")
