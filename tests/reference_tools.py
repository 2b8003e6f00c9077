"""Small data sets and runs for the tests of the reference trainer."""

from pathlib import Path

import h5py
import numpy as np

from rplib import cli
from rplib.reference.datasets.layouts import LeftAtrium

TINY = [  # a training of a few milliseconds per iteration
    "filters=2",
    'norm="batch"',  # at the deepest level such a crop has one voxel
    "patch=16,16,16",
    "stride=16,16,16",
    "batch_size=3",
    "labelled_per_batch=1",
    "labelled=3",
    "ramp_every=2",
    "log_every=3",
    "checkpoint_every=5",
    "iterations=12",
]


def write_case(root: Path, name: str, **arrays: np.ndarray) -> Path:
    """One h5 file of the Left Atrium layout with the given keys."""
    path = root / LeftAtrium.cases_folder / name / LeftAtrium.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip")
    return path


def write_dataset(root: Path, train: int = 5, test: int = 2, shape: tuple[int, ...] = (20, 18, 17)) -> list[str]:
    """Noise with a bright box, labelled; returns the names, training cases first."""
    random = np.random.default_rng(0)
    names = [f"CASE{index:02d}" for index in range(train + test)]
    for name in names:
        label = np.zeros(shape, np.uint8)
        corner = random.integers(0, 8, 3)
        label[tuple(slice(c, c + 9) for c in corner)] = 1
        write_case(root, name, image=random.standard_normal(shape).astype(np.float32) + 2 * label, label=label)
    (root / "train.list").write_text("".join(f"{name}\n" for name in names[:train]))
    (root / "test.list").write_text("".join(f"{name}\n" for name in names[train:]))
    return names


def mistake(capsys, *arguments: object) -> str:
    """Runs `rplib` with these arguments, which must end with exit code 2 and one line; returns that line's text."""
    code = cli.main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("rplib: error: ")]
    assert code == 2, out + err
    assert len(lines) == 1, err
    assert "Traceback" not in out + err
    return lines[0].removeprefix("rplib: error: ")
