"""Outputs of an evaluation: tables, NIfTI volumes, pictures, and the HTML report."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rplib.reference.datasets.cases import Case
from rplib.reference.datasets.nifti_writing import diagonal_affine, with_spacing, write_nifti
from rplib.reference.evaluation.scoring import OnCase, Report
from rplib.reference.files import LOCK, output_path, write_text_atomically
from rplib.reference.inference.windows import DECODER_1, Segmentation
from rplib.reference.reporting.page import page
from rplib.reference.reporting.sheets import write_pictures, write_reliability
from rplib.reference.reporting.tables import reliability_csv, render, scores_csv, summary_csv

SCORES, SUMMARY, TEXT, SHEET, VOLUMES = "scores.csv", "summary.csv", "report.txt", "pictures.png", "nifti"
PATIENTS = "patients.csv"
RELIABILITY, MAPS, PAGE = "reliability.csv", "reliability.png", "report.html"


def write(report: Report, out: Path, pictures: int = 6) -> None:
    """Print the tables and write them to `out`: scores.csv, summary.csv, report.txt, and patients.csv if patients are scored.
    Also write pictures of the worst cases, their reliability maps if the report has them, and the HTML report (report.html).

    The scores are written first: an error in a picture does not lose them.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / SCORES, scores_csv(report))
    write_text_atomically(out / SUMMARY, summary_csv(report))
    if (patients := report.over_patients) is not None:
        write_text_atomically(out / PATIENTS, scores_csv(patients))
    if report.maps:
        write_text_atomically(out / RELIABILITY, reliability_csv(report))
    text = render(report, per_case=True)
    write_text_atomically(out / TEXT, text)
    print(text, end="")
    write_text_atomically(out / PAGE, page(report, pictures))
    if pictures:
        write_pictures(report, out / SHEET, pictures)
    if report.maps:
        write_reliability(report, out / MAPS)
    print(f"written: {out}/ ({', '.join(sorted(path.name for path in out.iterdir() if path.name != LOCK))})")


def nifti_writer(folder: Path, spacing: Sequence[float] | None, everything: bool = False) -> OnCase:
    """For `evaluate(on_case=...)`: writes `<case>_prediction.nii.gz`; with `everything`, also image, truth and score."""

    def write(case: Case, found: dict[str, Segmentation]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        known = spacing is not None or case.affine is not None
        affine = diagonal_affine(spacing) if case.affine is None else with_spacing(case.affine, spacing)
        volumes: dict[str, NDArray] = {"prediction": found[DECODER_1].label}
        if everything:
            channels_last = np.moveaxis(case.image, 0, -1) if case.image.ndim > found[DECODER_1].label.ndim else case.image
            volumes |= {"score": found[DECODER_1].score, "image": channels_last}
            volumes |= {} if case.label is None else {"truth": case.label}
        for what, volume in volumes.items():
            write_nifti(output_path(folder, f"{case.name}_{what}.nii.gz"), volume, affine, millimetres=known)

    return write
