"""Scores per patient: the cases of one patient taken together."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rplib.errors import UserError
from rplib.reference.evaluation.metrics import Scores

if TYPE_CHECKING:
    from rplib.reference.evaluation.scoring import CaseScores


def patient_pattern(text: str) -> re.Pattern[str]:
    """The pattern of ``--patients``.

    Raises:
        UserError: not a regular expression with one group.
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--patients {text!r} is not a regular expression: {error}.") from error
    if pattern.groups != 1:
        raise UserError(
            f"--patients {text!r} has {pattern.groups} groups; expected one, around the part that names the patient, such as "
            "'(patient[0-9]+)_'."
        )
    return pattern


def patient_of(pattern: re.Pattern[str], case: str) -> str:
    """The patient in a case's name.

    Raises:
        UserError: the pattern does not match the name.

    >>> patient_of(re.compile("(patient[0-9]+)_"), "patient007_frame01")
    'patient007'
    """
    match = pattern.search(case)
    if match is None or not match[1]:
        raise UserError(
            f"--patients {pattern.pattern!r} finds no patient in case {case}; expected a pattern that matches every name."
        )
    return match[1]


def per_patient(rows: "Sequence[CaseScores]", pattern: re.Pattern[str]) -> "list[CaseScores]":
    """One row per patient, method and class; ``case`` is then the patient.

    Dice and Jaccard are computed over all voxels of the patient's cases: for slices in separate files, over the stacked
    volume. Distances are means over the cases that have one.
    """
    groups: dict[tuple[str, int, str], list[CaseScores]] = {}
    for row in rows:
        groups.setdefault((patient_of(pattern, row.case), row.klass, row.method), []).append(row)
    return [_together(patient, found) for (patient, _, _), found in groups.items()]


def _together(patient: str, rows: "Sequence[CaseScores]") -> "CaseScores":
    both, predicted, true = (sum(row.voxels[k] for row in rows) for k in range(3))
    distances = {name: _mean([getattr(row.scores, name) for row in rows]) for name in ("hd95", "asd", "hd95_mm", "asd_mm")}
    scores = Scores(_ratio(2 * both, predicted + true), _ratio(both, predicted + true - both), **distances)
    return replace(rows[0], case=patient, scores=scores, voxels=(both, predicted, true))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan  # in neither truth nor prediction


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return statistics.fmean(there) if there else math.nan
