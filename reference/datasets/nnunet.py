"""A raw data set of nnU-Net (v2; v1 and the Medical Segmentation Decathlon): imagesTr, labelsTr, dataset.json."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rplib.errors import UserError, reading
from rplib.reference.datasets.cases import MOST_CLASSES
from rplib.reference.datasets.nifti import NiftiFolder, group_channels, image_files


class Description(NamedTuple):
    """Contents of dataset.json; None or empty where a key is missing."""

    channels: int | None
    labels: dict[int, str]  # without 'ignore'
    unlabelled: frozenset[str]  # cases whose label files are ignored


class NnunetFolder(NiftiFolder):
    """nnU-Net's folder; the recipe `generic` reads it.

        DIR/imagesTr/<case>_0000.nii.gz, <case>_0001...  one file per channel, or one file with the channels as last axis
        DIR/labelsTr/<case>.nii.gz                       a case without one is unlabelled
        DIR/imagesTs, DIR/labelsTs                       optional: the test cases, where they have labels
        DIR/dataset.json                                 channels and labels; "unlabelled": cases whose labels are ignored
        DIR/train.list, DIR/test.list                    optional, as in `NiftiFolder`

    Arguments and methods are those of `NiftiFolder`.

    Raises:
        UserError: see `NiftiFolder`; also settings that contradict dataset.json.
    """

    images_folder, labels_folder = "imagesTr", "labelsTr"
    expected = "imagesTr/ and labelsTr/ of NIfTI files and dataset.json, as nnU-Net has them"

    def __init__(
        self,
        root: str | Path,
        classes: int = 2,
        channels: int | None = None,
        dims: int | None = None,
        normalisation: str = "z-score",
    ) -> None:
        file = Path(root) / "dataset.json"
        stated = described(file) if file.is_file() else Description(None, {}, frozenset())
        needed = max(stated.labels, default=0) + 1
        if channels is not None and stated.channels not in (None, channels):
            raise UserError(f"{file} lists {stated.channels} channels; set in_channels={stated.channels}.")
        if classes == MOST_CLASSES and needed > 1:  # `rplib data check` accepts any class otherwise
            classes = needed
        if classes < needed:
            raise UserError(f"{file} lists the labels {_shown(stated.labels)}; set classes={needed}.")
        super().__init__(root, classes, stated.channels or channels, dims, normalisation)
        self.label_names = stated.labels
        for name in stated.unlabelled:
            self._labels.pop(name, None)
        images, labels = image_files(self.root / "imagesTs"), image_files(self.root / "labelsTs", series=False)
        grouped = group_channels(images, labels, self.channels, self.root / "imagesTs") if images else {}
        self._bare = sorted(set(grouped) - set(labels))  # for `rplib predict`
        self._tests = {name: files for name, files in grouped.items() if name in labels}
        both = sorted(set(self._tests) & set(self._images))
        if both:
            raise UserError(f"case {both[0]} is in both imagesTr and imagesTs of {self.root}; rename one of them.")
        self._images |= self._tests
        self._labels |= {name: labels[name] for name in self._tests}

    def _held_out(self, labelled: list[str]) -> list[str]:
        return sorted(self._tests) if self._tests and self._list("test") is None else super()._held_out(labelled)

    def remarks(self) -> list[str]:
        remarks = super().remarks()
        if self._tests and self._list("test") is None:
            remarks[0] = f"{len(self._tests)} cases of imagesTs have a label in labelsTs: they are the test cases."
        if self._bare:
            remarks.append(
                f"{len(self._bare)} images in imagesTs have no label and are not used; segment them with "
                f"`rplib predict RUN {self.root / 'imagesTs'}/* --out DIR`."
            )
        return remarks


def described(file: Path) -> Description:
    """dataset.json of nnU-Net v2, v1 or the Decathlon.

    Raises:
        UserError: not JSON, labels that are not integers (regions), or images that are not NIfTI.
    """
    with reading(file, "dataset.json", "write it as described in nnU-Net's documentation"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(content, dict), "expected a JSON object"
        channels = content.get("channel_names", content.get("modality"))
        labels = _numbers(content.get("labels", {}))
        assert channels is None or isinstance(channels, (dict, list)), "channel_names is not a mapping or list"
        unlabelled = frozenset(map(str, content.get("unlabelled", ())))
    ending = content.get("file_ending", ".nii.gz")
    if ending not in (".nii.gz", ".nii"):
        raise UserError(f"{file} has file_ending {ending!r}; expected .nii.gz or .nii: convert the images to NIfTI.")
    regions = [name for name, value in labels.items() if not isinstance(value, int)]
    if regions:
        raise UserError(
            f"{file} gives the label {regions[0]!r} as {labels[regions[0]]!r}; expected one integer per label: regions are "
            "not supported, list the labels they consist of."
        )
    return Description(len(channels) if channels else None, {v: k for k, v in labels.items() if k != "ignore"}, unlabelled)


def _numbers(labels: dict[str, Any]) -> dict[str, Any]:
    """Name -> value; version 1 maps values to names."""
    if labels and all(key.isdecimal() for key in labels):
        return {str(name): int(key) for key, name in labels.items()}
    return labels


def _shown(labels: dict[int, str]) -> str:
    return ", ".join(f"{value} ({name})" for value, name in sorted(labels.items()))
