"""Scores of a trained network over a list of cases, with the fixed-box baseline and notes on the protocol."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rplib.errors import UserError
from rplib.reference import checkpoint
from rplib.reference.config import Config
from rplib.reference.datasets.cases import Case, Dataset, voxel_sizes
from rplib.reference.datasets.layouts import open_for, split_training
from rplib.reference.devices import find_device
from rplib.reference.evaluation.fixed_box import FixedBox, fit_box
from rplib.reference.evaluation.metrics import Scores, score
from rplib.reference.evaluation.patients import patient_of, per_patient
from rplib.reference.evaluation.reliability import ReliabilityMaps, Verdict, map_stride, reliability_maps, verdict
from rplib.reference.inference.components import largest_components
from rplib.reference.inference.window_bar import window_bar
from rplib.reference.inference.windows import DECODER_1, LAST_WEIGHTS, Segmentation, segment_outputs, window_overlap
from rplib.reference.network import MutualVNet
from rplib.reference.progress import progress

BOX = "fixed box"
METRICS = tuple(field.name for field in fields(Scores))
OnCase = Callable[[Case, dict[str, Segmentation]], None]


@dataclass(frozen=True)
class CaseScores:
    """Scores of one method (an output of the network, or the fixed box) for one class of one case."""

    case: str
    method: str
    klass: int
    scores: Scores
    voxels: tuple[int, int, int] = (0, 0, 0)  # in both prediction and truth, in the prediction, in the truth


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over the cases that have the score, and the number of missing ones."""

    mean: float
    deviation: float
    missing: int


@dataclass(frozen=True)
class Report:
    """Result of `evaluate`; `rows` in the order of the list."""

    rows: list[CaseScores]
    predictions: dict[str, NDArray[np.uint8]]  # case name -> labels of decoder 1
    boxes: dict[int, FixedBox]  # class -> box
    config: Config
    dataset: Dataset
    stride: tuple[int, ...]
    notes: list[str]  # remarks on the scores, for all outputs
    split: str = "test"
    spacing: tuple[float, ...] | None = None  # overrides that of the files
    run: Path | None = None  # the run folder, if given
    maps: dict[str, ReliabilityMaps] = field(default_factory=dict)  # of the N worst cases
    kept: dict[str, Case] = field(default_factory=dict, repr=False)  # the worst cases, in memory
    patients: re.Pattern[str] | None = None  # its group matches the patient in a case's name

    def case(self, name: str) -> Case:
        """A case with its label; read from disk only if it is not in memory."""
        if name not in self.kept:
            self.kept[name] = self.dataset.load(name, needs_label=True)
        return self.kept[name]

    @property
    def over_patients(self) -> "Report | None":
        """This report with a row per patient instead of one per case; None without a pattern for the patients."""
        if self.patients is None:
            return None
        return replace(self, rows=per_patient(self.rows, self.patients), patients=None)

    @property
    def names(self) -> list[str]:
        """Names of the cases (or patients) in the order of the list."""
        return list(dict.fromkeys(row.case for row in self.rows))

    @property
    def methods(self) -> list[str]:
        """Outputs of the network, then the fixed box if there is one."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def values(self, method: str, metric: str, klass: int | None = None) -> list[float]:
        """One score per case and class."""
        chosen = (row for row in self.rows if row.method == method and klass in (None, row.klass))
        return [getattr(row.scores, metric) for row in chosen]

    def mean(self, method: str, metric: str, klass: int | None = None) -> Mean:
        """Mean over all cases (and all foreground classes, unless one is named); NaN are excluded and counted."""
        values = self.values(method, metric, klass)
        there = [value for value in values if not math.isnan(value)]
        if not there:
            return Mean(math.nan, math.nan, len(values))
        return Mean(statistics.fmean(there), statistics.pstdev(there), len(values) - len(there))

    def verdicts(self) -> dict[str, Verdict]:
        """Agreement of the reliability maps with the ground truth, in the order of the maps."""
        found = {}
        for name, maps in self.maps.items():
            truth = self.case(name).label
            assert truth is not None
            found[name] = verdict(maps, truth)
        return found

    def worst_first(self) -> list[str]:
        """Case names by Dice of decoder 1, ascending: mean over the classes for which it is defined.

        A class in neither truth nor prediction has no Dice. A case without any Dice (a slice of background that was segmented as
        such) comes last.
        """
        return _worst_first(self.rows)


def evaluate(
    run: Path,
    data: Path,
    *,
    weights: str | None = None,
    split: str = "test",
    cases: int | None = None,
    stride: Sequence[int] | None = None,
    batch: int | None = None,
    device: str | None = None,
    spacing: Sequence[float] | None = None,
    keep_largest: bool = False,
    on_case: OnCase | None = None,
    maps: int = 0,
    pictures: int = 0,
    patients: re.Pattern[str] | None = None,
) -> Report:
    """Segment the cases of a list; score both outputs of the network and the best fixed box.

    Args:
        run: run folder of a training, or a checkpoint file.
        data: folder of the data set.
        weights: ``"best"``, ``"last"`` or ``"averaged"``; None uses best if it exists. With averaged weights, decoder 1 is
            also evaluated with the last ones.
        split: ``"test"``, ``"train"`` or, if the data set has one, ``"val"``; unlabelled training cases are
            skipped.
        cases: only the first N cases.
        stride, batch: of the windows; None uses the run's settings.
        spacing: voxel size in mm, for distances in mm; None uses that of the files, if they have it.
        keep_largest: keep only the largest component of each class; not in the paper.
        on_case: called with every case and its segmentations, for example to save them.
        maps: number of worst cases with reliability maps.
        pictures: number of worst cases to keep in memory for pictures, so that each is read once.
        patients: pattern whose one group matches the patient in a case's name; adds scores per patient.

    Raises:
        UserError: no readable checkpoint, missing or damaged data, no labels, invalid stride or device.
    """
    where = find_device(device)
    network, config = checkpoint.load_network(run, weights)  # type: ignore[arg-type]
    network = network.to(where)
    last = _last_beside(run, weights, config)
    if last is not None:
        last = last.to(where)
    stride = tuple(stride) if stride is not None else config.stride
    window_overlap(config.patch, stride)  # reject an invalid stride before reading data
    dataset = open_for(config, data)
    if split not in dataset.splits:
        raise UserError(f"data layout {config.dataset!r} has no {split} list; its lists are: {', '.join(dataset.splits)}.")
    if spacing is not None and len(spacing) != len(config.patch):
        raise UserError(f"--spacing has {len(spacing)} numbers; expected one per axis of the image: {len(config.patch)}.")
    names = dataset.names(split)[:cases]
    if patients is not None:  # report mistakes before anything is segmented
        for name in names:
            patient_of(patients, name)
    boxes, box_note = _fit_boxes(dataset, config)

    rows: list[CaseScores] = []
    predictions: dict[str, NDArray[np.uint8]] = {}
    kept: dict[str, Case] = {}
    skipped = unmeasured = 0
    for name in progress(names, "evaluating"):
        case = dataset.load(name, needs_label=split != "train")
        if case.label is None:
            skipped += 1
            continue
        with window_bar(network, case.label.shape, config.patch, stride, name):
            found = segment_outputs(network, case.image, config.patch, stride, batch or config.window_batch, where)
            if last is not None:
                windows = config.patch, stride, batch or config.window_batch
                found[LAST_WEIGHTS] = segment_outputs(last, case.image, *windows, where, (DECODER_1,))[DECODER_1]
        if keep_largest:
            found = {output: one._replace(label=largest_components(one.label)) for output, one in found.items()}
        predictions[name] = found[DECODER_1].label
        edges = spacing if spacing is not None else voxel_sizes(case)
        unmeasured += edges is None
        for klass in range(1, config.classes):
            truth = case.label == klass
            masks = {output: one.label == klass for output, one in found.items()}
            if klass in boxes:
                masks[BOX] = boxes[klass].mask(truth.shape) > 0
            for method, mask in masks.items():
                voxels = int((mask & truth).sum()), int(mask.sum()), int(truth.sum())
                rows.append(CaseScores(name, method, klass, score(mask, truth, edges), voxels))
        kept[name] = case
        if len(kept) > max(maps, pictures):
            del kept[_worst_first([row for row in rows if row.case in kept])[-1]]
        if on_case is not None:
            on_case(case, found)
    if not rows:
        raise UserError(f"none of the {len(names)} {split} cases in {data} has a label; there is nothing to score.")

    notes = [_which_weights(run, weights, config), _which_cases(split, len(names) - skipped, skipped, cases, config)]
    notes.append(f"Windows {_times(config.patch)}, stride {_times(stride)}; ")
    notes[-1] += "largest components only." if keep_largest else "all components kept."
    if unmeasured:
        notes.append(
            f"No distances in mm for {unmeasured} of {len(predictions)} cases: their files have no voxel size; set --spacing."
        )
    notes.append(box_note)
    edges, folder = tuple(spacing) if spacing is not None else None, run if run.is_dir() else None
    report = Report(rows, predictions, boxes, config, dataset, stride, notes, split, edges, folder, kept=kept, patients=patients)
    if not maps:
        return report
    wide, made = map_stride(config, stride), {}
    for name in progress(report.worst_first()[:maps], "reliability maps"):
        image = report.case(name).image
        with window_bar(network, predictions[name].shape, config.patch, wide, name):
            made[name] = reliability_maps(network, image, config, wide, batch or config.window_batch, where)
    return replace(report, maps=made)


def _worst_first(rows: Sequence[CaseScores]) -> list[str]:
    dice: dict[str, list[float]] = {}
    for row in rows:
        if row.method == DECODER_1:
            dice.setdefault(row.case, []).append(row.scores.dice)
    return sorted(dice, key=lambda case: _mean_of(dice[case], nothing=math.inf))


def _mean_of(values: Sequence[float], nothing: float = math.nan) -> float:
    """Mean of the values that are not NaN."""
    there = [value for value in values if not math.isnan(value)]
    return statistics.fmean(there) if there else nothing


def _fit_boxes(dataset: Dataset, config: Config) -> tuple[dict[int, FixedBox], str]:
    """The box of each class and a note; no boxes if there is nothing to fit."""
    try:
        names = split_training(dataset, config).labelled
        labels = [dataset.load(name, needs_label=True).label for name in names]
    except UserError as error:
        return {}, f"No fixed box: {error}"
    boxes = {}
    for klass in range(1, config.classes):
        masks = [label == klass for label in labels if label is not None]
        if any(mask.any() for mask in masks):
            boxes[klass] = fit_box(masks)
    if not boxes:
        return {}, "No fixed box: the labelled training cases have no foreground."
    shown = "; ".join(f"{f'class {k}: ' if len(boxes) > 1 else ''}{box}" for k, box in boxes.items())
    dice = statistics.fmean(box.training_dice for box in boxes.values())
    return boxes, (
        f"Fixed box: the box, in fractions of the volume, with the highest mean Dice ({100 * dice:.2f} %) over the "
        f"{len(names)} labelled training cases: {shown}."
    )


def _last_beside(run: Path, weights: str | None, config: Config) -> MutualVNet | None:
    """The network with the last weights, if averaged ones are scored and the run has both."""
    if weights == "last" or not config.average or not run.is_dir() or not (run / checkpoint.LAST).is_file():
        return None
    return checkpoint.load_network(run, "last")[0]


def _which_weights(run: Path, weights: str | None, config: Config) -> str:
    """One sentence on the protocol and the evaluated weights."""
    if not run.is_dir():
        return f"Recipe {config.title}; weights of {run.name}."
    last = weights in ("last", "averaged") or not (run / checkpoint.BEST).is_file()
    content = checkpoint.load(run / (checkpoint.LAST if last else checkpoint.BEST))
    # last.pt is for resuming; best.pt records how it was selected.
    averaged = ", averaged weights" if weights == "averaged" else ""
    chosen = f"last checkpoint{averaged}" if last else content.get("chosen_by", "unknown selection")
    if "test list" in chosen:
        chosen = f"{chosen}: WEIGHTS SELECTED ON THE TEST LIST"
    return (
        f"Recipe {config.title}, protocol {config.protocol}; weights of iteration {content.get('iteration')} "
        f"of {config.iterations} ({chosen})."
    )


def _which_cases(split: str, scored: int, skipped: int, limit: int | None, config: Config) -> str:
    first = "the first " if limit is not None else ""
    without = f" ({skipped} without a label skipped)" if skipped else ""
    which = f"The first {config.labelled} were" if config.labelled else "All labelled ones were"
    seen = f" {which} used for training with their labels." if split == "train" else ""
    return f"Scored: {first}{scored} cases of the {split} list{without}.{seen}"


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
