"""The HTML report of an evaluation and its training: one self-contained file without scripts."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import rplib
from rplib.errors import UserError
from rplib.reference.config import Config, differences, load_recipe, recipe_names
from rplib.reference.datasets.cases import Case
from rplib.reference.evaluation.metrics import Scores
from rplib.reference.evaluation.reliability import Verdict, map_stride
from rplib.reference.evaluation.scoring import BOX, Report
from rplib.reference.inference.windows import DECODER_1, MEAN
from rplib.reference.reporting.curves import curves_svg
from rplib.reference.reporting.markup import STYLE, line, planes, scale_key, table
from rplib.reference.reporting.pictures import PREDICTION, TRUTH
from rplib.reference.reporting.run_log import METRICS_FILE, read_metrics, read_sessions
from rplib.reference.reporting.sheets import TAUGHT, TRUTH_ON_MAP, case_panels, map_panels, percent, scales, scores_of
from rplib.reference.reporting.tables import TITLES, mean_cell, shown, shown_metrics, weight

PLANES = 3  # slices side by side


def page(report: Report, pictures: int = 6) -> str:
    """The whole page.

    Args:
        report: the evaluation, with or without reliability maps.
        pictures: number of worst cases to show.
    """
    config = report.config
    title = f"{config.title}: {len(report.predictions)} {report.split} cases"
    sections = {
        "results": ("Results", _results(report)),
        "cases": ("Case by case", _cases(report)),
        "pictures": ("Pictures, worst cases first", _pictures(report, pictures)),
        "reliability": ("Which decoder is reliable, and how reliable it is", _reliability(report)),
        "curves": ("Training", _training(report)),
        "settings": ("Settings", _settings(config)),
    }
    there = {name: section for name, section in sections.items() if section[1]}
    links = " ".join(f'<a href="#{name}">{escape(heading)}</a>' for name, (heading, _) in there.items())
    body = "\n".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>\n{content}</section>' for name, (heading, content) in there.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_protocol(report)}
<nav>{links}</nav>
{body}
<p class="soft">Written by rplib {escape(rplib.__version__)}.</p>
</body>
</html>
"""


def _protocol(report: Report) -> str:
    first = report.notes[0]
    loud = "TEST LIST" in first
    text = f'<p class="{"loud" if loud else ""}">{escape(first)}</p>'
    if loud:
        text += "<p>Such scores are optimistic: compare them only with scores selected in the same way.</p>"
    return text


def _results(report: Report) -> str:
    figures = "".join(
        f'<li><span class="soft">{escape(TITLES[metric])}</span><b>{escape(mean_cell(report, DECODER_1, metric))}</b></li>'
        for metric in shown_metrics(report)
    )
    means = _means(report, "cases")
    if (patients := report.over_patients) is not None:
        means += _means(patients, f"{len(patients.names)} patients")
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes[1:])
    explained = (
        "<p>95HD pools the surface distances of both directions, ASD is measured from the prediction to the truth. "
        f"{DECODER_1} is the reported output.</p>"
    )
    return f'<ul class="figures" aria-label="{DECODER_1}">{figures}</ul>{means}{explained}{notes}'


def _means(report: Report, over: str) -> str:
    several, rows = report.config.classes > 2, []
    for method in report.methods:
        for klass in [*range(1, report.config.classes), *([None] if several else [])]:
            label = method if not several else f"{method}, {'all classes' if klass is None else f'class {klass}'}"
            rows.append([label, *(mean_cell(report, method, metric, klass) for metric in shown_metrics(report))])
    return table(
        ["method", *(TITLES[m] for m in shown_metrics(report))],
        rows,
        f"mean \u00b1 standard deviation over the {over} (missing: no distance, excluded from the mean)",
    )


def _cases(report: Report) -> str:
    several, metrics = report.config.classes > 2, shown_metrics(report)
    others = [method for method in (MEAN, BOX) if method in report.methods]
    dice = {(row.case, row.klass, row.method): row.scores.dice for row in report.rows}
    rows = []
    for row in report.rows:
        if row.method == DECODER_1:
            cells = [row.case, *([str(row.klass)] if several else [])]
            cells += [shown(getattr(row.scores, metric), metric) for metric in metrics]
            cells += [shown(dice.get((row.case, row.klass, method), math.nan), "dice") for method in others]
            rows.append(cells)
    heading = ["case", *(["class"] if several else []), *(TITLES[m] for m in metrics), *(f"Dice % {m}" for m in others)]
    return table(heading, rows, f"{DECODER_1}, in the order of the list", bars=heading.index("Dice %"))


def _pictures(report: Report, number: int) -> str:
    names = report.worst_first()[:number]
    if not names:
        return ""
    text = f'<div class="key">{line(TRUTH, "truth")}{line(PREDICTION, "prediction")}</div>'
    return text + "".join(_case(report, report.case(name)) for name in names)


def _case(report: Report, case: Case) -> str:
    scores = scores_of(report, case.name)
    panels = case_panels(report, case)
    rows = planes(panels, f"{case.name}, truth and prediction")
    return (
        f'<article class="case"><h3 class="mono">{escape(case.name)}</h3><p class="soft">{escape(_scores_text(scores))}</p>'
        f'<div class="planes" style="--planes: {PLANES}">{rows}</div></article>'
    )


def _reliability(report: Report) -> str:
    if not report.maps:
        return ""
    config, (which, how) = report.config, scales(report)
    used = "This training used both."
    if config.labelled_only or config.consistency == 0:
        used = "This training was labelled-only: it used neither."
    elif None in (config.loss_keywords["confidence"], config.loss_keywords["weighting"]):
        used = f"This training (method {config.method}) did not use both."
    stride = map_stride(config, report.stride)
    text = (
        "<p>Two maps per case. Which: the more confident decoder is the teacher. How: its pseudo-label is weighted by the "
        f"similarity of the voxel's feature to the class prototype. {escape(used)} The maps are means over windows of "
        f"{_times(config.patch)} voxels with stride {_times(stride)}, each window a sample as in training, without dropout.</p>"
        f'<div class="key">{line(TRUTH_ON_MAP, "truth")}{line(TAUGHT, "pseudo-label")}'
        f"{scale_key(which)}{scale_key(how)}</div>"
    )
    verdicts = report.verdicts()
    for name, found in verdicts.items():
        both = map_panels(report, report.case(name))
        rows = "".join(planes(panels, f"{name}, {word}") for word, panels in zip(("which", "how"), both, strict=True))
        text += (
            f'<article class="case"><h3 class="mono">{escape(name)}</h3><p class="soft">{escape(_judged(found))}</p>'
            f'<div class="planes" style="--planes: {PLANES}">{rows}</div></article>'
        )
    return text


def _training(report: Report) -> str:
    run, text = report.run, ""
    if run is None:
        return ""
    try:
        rows = read_metrics(run / METRICS_FILE)
    except (OSError, UserError) as error:
        text += f"<p>No curves: {escape(str(error))}</p>"
    else:
        if rows:
            seconds = sum(row.seconds for row in rows)
            text += f'<div class="curves">{curves_svg(rows, report.config)}</div>'
            text += (
                f"<p>{rows[-1].iteration:,} of {report.config.iterations:,} iterations, {_duration(seconds)} "
                f"({seconds / len(rows):.3f} s each).</p>"
            )
    sessions = read_sessions(run)
    if sessions:
        keys = list(dict.fromkeys(key for session in sessions for key in session))
        cells = [[key, *(_shown_value(session.get(key)) for session in sessions)] for key in keys]
        heads = ["", *("start" if n == 0 else f"resumption {n}" for n in range(len(sessions)))]
        text += f"<details><summary>Machine and versions</summary>{table(heads, cells, kind='text')}</details>"
    return text


def _settings(config: Config) -> str:
    base, known = "the paper's settings", Config()
    if config.name in recipe_names():
        base, known = f"the recipe {config.name}", load_recipe(config.name)
    changed = set(differences(config, known)) - {"name"}
    rows = []
    for f in dataclasses.fields(config):
        usual = _shown_value(getattr(known, f.name)) if f.name in changed else ""
        rows.append([f.name, _shown_value(getattr(config, f.name)), usual, f.metadata["comment"]])
    summary = f"{len(changed)} settings differ from {base} (bold)." if changed else f"All settings are those of {base}."
    marked = [index for index, row in enumerate(rows) if row[0] in changed]
    heads = ["setting", "value", "recipe" if "recipe" in base else "paper", "meaning"]
    return f"<p>{escape(summary)}</p>{table(heads, rows, kind='text', changed=marked)}"


def _scores_text(scores: dict[int, Scores]) -> str:
    if len(scores) > 1:
        return "Dice " + ", ".join(f"class {klass}: {shown(s.dice, 'dice')} %" for klass, s in scores.items())
    (s,) = scores.values()

    def distance(voxel: float, millimetre: float) -> str:
        return f"{shown(voxel, 'hd95')} voxel" + ("" if math.isnan(millimetre) else f" ({shown(millimetre, 'hd95')} mm)")

    overlaps = f"Dice {shown(s.dice, 'dice')} %, Jaccard {shown(s.jaccard, 'jaccard')} %"
    return f"{overlaps}, 95HD {distance(s.hd95, s.hd95_mm)}, ASD {distance(s.asd, s.asd_mm)}"


def _judged(found: Verdict) -> str:
    return (
        f"Dice of the pseudo-label {shown(found.taught_dice, 'dice')} %. Which: the decoders differ at "
        f"{found.disagreement:,} voxels; there the pseudo-label is correct in {percent(found.right_there)}. How: mean weight "
        f"of correct pseudo-labels {weight(found.weight_right)}, of wrong ones {weight(found.weight_wrong)} "
        "(where truth or pseudo-label is foreground)."
    )


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _duration(seconds: float) -> str:
    """
    >>> _duration(59), _duration(3725)
    ('59 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _shown_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
