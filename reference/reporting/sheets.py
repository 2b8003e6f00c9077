"""The picture sheets of an evaluation: predictions and reliability maps, worst cases first."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rplib.reference.datasets.cases import Case, voxel_sizes
from rplib.reference.evaluation.metrics import Scores
from rplib.reference.evaluation.reliability import ReliabilityMaps
from rplib.reference.evaluation.scoring import Report
from rplib.reference.inference.windows import DECODER_1
from rplib.reference.reporting.pictures import PREDICTION, TRUTH, Outline, Overlay, Panel, Scale, three_planes, write_sheet
from rplib.reference.reporting.tables import shown, weight

TRUTH_ON_MAP, TAUGHT = "#FFFFFF", "#00D5FF"  # not colours of the maps


def scores_of(report: Report, name: str) -> dict[int, Scores]:
    """Scores of decoder 1 in one case, by class."""
    return {row.klass: row.scores for row in report.rows if row.method == DECODER_1 and row.case == name}


def case_panels(report: Report, case: Case) -> list[Panel]:
    """Three planes through the truth (one for a 2-D image), with truth and prediction outlined."""
    found = report.predictions[case.name]
    image = case.image if case.image.ndim == found.ndim else case.image[0]  # show the first channel
    edges = report.spacing or voxel_sizes(case)
    return [panel._replace(spacing=edges) for panel in three_planes(image, case.label, found, report.dataset.axes)]


def map_panels(report: Report, case: Case) -> tuple[list[Panel], list[Panel]]:
    """The same slices with the maps, which and how; truth and pseudo-label outlined."""
    maps = report.maps[case.name]
    outlines = [] if case.label is None else [Outline(case.label, TRUTH_ON_MAP, 2.4)]
    outlines.append(Outline(maps.taught, TAUGHT, 1.1))
    planes = [panel._replace(outlines=outlines) for panel in case_panels(report, case)]
    which, how = scales(report)
    return (
        [panel._replace(overlay=Overlay(maps.which, which)) for panel in planes],
        [panel._replace(overlay=Overlay(maps.how, how)) for panel in planes],
    )


def scales(report: Report) -> tuple[Scale, Scale]:
    """Colour scales of both maps, the same for all cases of a report."""
    low = min((_low(maps) for maps in report.maps.values()), default=0.0)
    return (
        Scale("PRGn", -1.0, 1.0, "which: the teacher", ("decoder 2", "decoder 1")),
        Scale("YlOrRd_r", low, 1.0, "how: weight of its pseudo-label", (f"{low:.2f} or less", "1.00"), True),
    )


def write_pictures(report: Report, path: Path, number: int) -> None:
    """The sheet of the worst cases, with truth and prediction outlined."""
    names = report.worst_first()[:number]
    rows = []
    for name in names:
        rows.append((_caption(name, scores_of(report, name)), case_panels(report, report.case(name))))
    write_sheet(path, rows, _title(report, names), {"truth": TRUTH, "prediction": PREDICTION})


def write_reliability(report: Report, path: Path) -> None:
    """The sheet of the reliability maps: one row for which, one for how; 2-D images have both in one row."""
    verdicts, rows = report.verdicts(), []
    for name, found in verdicts.items():
        which, how = map_panels(report, report.case(name))
        beside = (
            f"{name}\n\nWHICH teaches\ndecoders differ at\n{found.disagreement:,} voxels;\npseudo-label right\n"
            f"in {percent(found.right_there)} of them",
            f"HOW reliable\nmean weight of\nright labels {weight(found.weight_right)}\nwrong labels {weight(found.weight_wrong)}",
        )
        if len(which) == 1:
            rows.append(("\n\n".join(beside), [which[0]._replace(title="which"), how[0]._replace(title="how")]))
        else:
            rows += [(beside[0], which), (beside[1], how)]
    legend = {"truth (white)": "0.75", "pseudo-label": TAUGHT}
    write_sheet(path, rows, _title(report, list(verdicts)), legend, scales=scales(report))


def percent(share: float) -> str:
    """A fraction as a whole percentage, a dash if missing."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def _low(maps: ReliabilityMaps) -> float:
    """A low quantile of the weights, rounded down, so that outliers do not dominate the colour scale."""
    there = maps.how[~np.isnan(maps.how)]
    return min(0.95, math.floor(20 * float(np.percentile(there, 1))) / 20) if there.size else 0.0


def _title(report: Report, names: Sequence[str]) -> str:
    every = len(report.predictions)
    what = f"the {len(names)} worst of {every} cases" if len(names) < every else f"all {every} cases"
    return f"{report.config.name}, {DECODER_1}: {what}, worst first\n{report.notes[0]}"


def _caption(name: str, scores: dict[int, Scores]) -> str:
    if len(scores) > 1:
        return f"{name}\n\nDice %" + "".join(f"\nclass {k:3} {shown(s.dice, 'dice'):>6}" for k, s in scores.items())
    (s,) = scores.values()
    mm = "" if math.isnan(s.hd95_mm) else f"\n95HD    {shown(s.hd95_mm, 'hd95')} mm\nASD     {shown(s.asd_mm, 'asd')} mm"
    return (
        f"{name}\n\nDice    {shown(s.dice, 'dice')} %\nJaccard {shown(s.jaccard, 'jaccard')} %\n"
        f"95HD    {shown(s.hd95, 'hd95')} voxel\nASD     {shown(s.asd, 'asd')} voxel{mm}"
    )
