"""A raw data set of nnU-Net (v2; v1 and the Medical Segmentation Decathlon): imagesTr, labelsTr, dataset.json."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rplib.errors import UserError, reading
from rplib.reference.datasets.cases import MOST_CLASSES
from rplib.reference.datasets.nifti import NiftiFolder, group_channels, image_files


class Description(NamedTuple):
    """What dataset.json says; None and empty where it says nothing."""

    channels: int | None
    labels: dict[int, str]  # without 'ignore'
    unlabelled: frozenset[str]  # cases whose label files are to be left aside


class NnunetFolder(NiftiFolder):
    """nnU-Net's folder; the recipe `generic` reads it.

        DIR/imagesTr/<case>_0000.nii.gz, <case>_0001...  one file a channel, or one file with the channels at the end
        DIR/labelsTr/<case>.nii.gz                       a case without one is unlabelled
        DIR/imagesTs, DIR/labelsTs                       optional: the test cases, where they have labels
        DIR/dataset.json                                 channels and labels; "unlabelled": names whose labels do not count
        DIR/train.list, DIR/test.list                    optional, as in `NiftiFolder`

    Args and the rest: as `NiftiFolder`.

    Raises:
        UserError: besides what `NiftiFolder` raises, settings that contradict dataset.json.
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
            raise UserError(f"{file} names {stated.channels} channels; set in_channels={stated.channels}.")
        if classes == MOST_CLASSES and needed > 1:  # of `rplib data check`: whatever there is
            classes = needed
        if classes < needed:
            raise UserError(f"{file} names the labels {_shown(stated.labels)}; set classes={needed}.")
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
            raise UserError(f"case {both[0]} is in imagesTr and in imagesTs of {self.root}; name one of them otherwise.")
        self._images |= self._tests
        self._labels |= {name: labels[name] for name in self._tests}

    def _held_out(self, labelled: list[str]) -> list[str]:
        return sorted(self._tests) if self._tests and self._list("test") is None else super()._held_out(labelled)

    def remarks(self) -> list[str]:
        remarks = super().remarks()
        if self._tests and self._list("test") is None:
            remarks[0] = f"the test cases are the {len(self._tests)} of imagesTs that have a label in labelsTs."
        if self._bare:
            remarks.append(
                f"imagesTs holds {len(self._bare)} images without a label: neither trained on nor scored; segment them with "
                f"`rplib predict RUN {self.root / 'imagesTs'}/* --out DIR`."
            )
        return remarks


def described(file: Path) -> Description:
    """dataset.json of nnU-Net v2, v1 or the Decathlon.

    Raises:
        UserError: not JSON, labels that are no whole numbers (regions), or images of another kind than NIfTI.
    """
    with reading(file, "dataset.json", "write it as nnU-Net's documentation says"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(content, dict), "no object in braces"
        channels = content.get("channel_names", content.get("modality"))
        labels = _numbers(content.get("labels", {}))
        assert channels is None or isinstance(channels, (dict, list)), "channel_names is no list of channels"
        unlabelled = frozenset(map(str, content.get("unlabelled", ())))
    ending = content.get("file_ending", ".nii.gz")
    if ending not in (".nii.gz", ".nii"):
        raise UserError(f"{file} has file_ending {ending!r}; expected .nii.gz or .nii: convert the images to NIfTI.")
    regions = [name for name, value in labels.items() if not isinstance(value, int)]
    if regions:
        raise UserError(
            f"{file} gives the label {regions[0]!r} as {labels[regions[0]]!r}; expected one whole number a label: regions are "
            "not trained here, name the labels that they are made of."
        )
    return Description(len(channels) if channels else None, {v: k for k, v in labels.items() if k != "ignore"}, unlabelled)


def _numbers(labels: dict[str, Any]) -> dict[str, Any]:
    """Name -> value; version 1 has it the other way round."""
    if labels and all(key.isdecimal() for key in labels):
        return {str(name): int(key) for key, name in labels.items()}
    return labels


def _shown(labels: dict[int, str]) -> str:
    return ", ".join(f"{value} ({name})" for value, name in sorted(labels.items()))
