"""Training curves: losses and validation Dice over the iterations."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rplib.reference.checkpoint import CONFIG
from rplib.reference.config import Config, load_config
from rplib.reference.datasets.layouts import LAYOUTS
from rplib.reference.files import write_atomically
from rplib.reference.reporting.run_log import METRICS_FILE, LogRow, read_metrics

CURVES = "curves.png"
_POINTS = 60  # points per curve; losses are noisy, so each point averages a range, whose spread is drawn as a band
_LINES = ("#2E86C1", "#D9822B", "#159A6C", "#B44FA0")
_LINE, _WEIGHT = "#2E86C1", "#159A6C"  # legible on white and on black
_INK = "#010203"  # placeholder for the page's text colour


def write_curves(run: Path) -> None:
    """Write curves.png: the loss terms, and the validation Dice if there is one, over the iterations of metrics.csv."""
    picture = curves_png(read_metrics(run / METRICS_FILE), load_config(run / CONFIG))
    write_atomically(run / CURVES, lambda file: file.write(picture))


def curves_png(rows: Sequence[LogRow], config: Config) -> bytes:
    """On a white background, for curves.png."""
    content = io.BytesIO()
    _figure(rows, config, "black").savefig(content, format="png", dpi=110, facecolor="white")
    return content.getvalue()


def curves_svg(rows: Sequence[LogRow], config: Config) -> str:
    """With a transparent background and the page's text colour, for the HTML page."""
    content = io.StringIO()
    # A fixed salt makes the output reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rplib", "font.family": "sans-serif"}):
        figure = _figure(rows, config, _INK)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _figure(rows: Sequence[LogRow], config: Config, ink: str) -> Figure:
    validated = [(row.iteration, row.validation_dice) for row in rows if row.validation_dice is not None]
    watched = [row for row in rows if row.pseudo_labels]
    height = 1 + bool(validated) + bool(watched)
    figure = Figure(figsize=(11, (3.5, 6.4, 9.3)[height - 1]), layout="constrained")
    axes = figure.subplots(height, 2, squeeze=False)
    _curve(axes[0, 0], rows, "dice", "supervised loss, sum of both decoders")
    _curve(axes[0, 1], rows, "mutual", "mutual loss")
    weight = axes[0, 1].twinx()
    weight.plot([row.iteration for row in rows], [row.consistency_weight for row in rows], color=_WEIGHT, linewidth=1.2)
    weight.set_ylabel("weight of the mutual loss", color=_WEIGHT)
    weight.set_ylim(0, max(1e-9, *(1.05 * row.consistency_weight for row in rows)) if rows else None)
    for side in ("left", "bottom"):  # already drawn by the other axis
        weight.spines[side].set_visible(False)
    axes[0, 0].legend(frameon=False, labelcolor=ink, fontsize=9)
    drawn = [*axes[0], weight]
    if validated:
        _validation(axes[1, 0], validated, config)
        _curve(axes[1, 1], rows, "total", "total loss")
        drawn += [*axes[1]]
    if watched:
        _pseudo_labels(axes[-1], watched, ink)
        drawn += [*axes[-1]]
    for axis in drawn:
        axis.tick_params(colors=ink, which="both")
        axis.set_facecolor("none")
        axis.title.set_color(ink)
        axis.xaxis.label.set_color(ink)
        for spine in axis.spines.values():
            spine.set_color(ink)
        axis.spines["top"].set_visible(False)
    weight.tick_params(axis="y", colors=_WEIGHT)
    for axis in (*axes[0, :1], *axes[1:].flat):
        axis.spines["right"].set_visible(False)
    return figure


def _curve(axis: Any, rows: Sequence[LogRow], name: str, title: str) -> None:
    iterations, mean, low, high = binned([row.iteration for row in rows], [getattr(row, name) for row in rows])
    axis.fill_between(iterations, low, high, color=_LINE, alpha=0.25, linewidth=0)
    axis.plot(iterations, mean, color=_LINE, linewidth=1.5, label=f"mean and range of {_width(len(rows))} iterations")
    axis.set(title=title, xlabel="iteration")


def _pseudo_labels(axes: Any, rows: Sequence[LogRow], ink: str) -> None:
    """What the decoders teach: how often and how strongly, and which classes."""
    at = [row.iteration for row in rows]
    lines = {"decoder 1 teaches": "taught_by_1", "decoder 2 teaches": "taught_by_2", "mean weight": "mean_weight"}
    for k, (label, name) in enumerate({**lines, "decoders disagree": "disagreement"}.items()):
        axes[0].plot(*binned(at, [getattr(row, name) for row in rows])[:2], color=_LINES[k], linewidth=1.3, label=label)
    axes[0].set(title="pseudo-labels: share of the voxels, and mean weight", xlabel="iteration", ylim=(0, None))
    classes = min(len(shares) for row in rows for shares in row.pseudo_labels or ())
    for decoder, style in ((0, "-"), (1, "--")):
        for k in range(1, classes):
            shares = [row.pseudo_labels[decoder][k] for row in rows if row.pseudo_labels]
            label = f"class {k}, decoder {decoder + 1}"
            axes[1].plot(*binned(at, shares)[:2], style, color=_LINES[(k - 1) % len(_LINES)], linewidth=1.3, label=label)
    axes[1].set(title="share of each class among the pseudo-labels", xlabel="iteration", ylim=(0, None))
    for axis in axes:
        axis.legend(frameon=False, labelcolor=ink, fontsize=8, ncols=2)


def _validation(axis: Any, validated: Sequence[tuple[int, float]], config: Config) -> None:
    where = "validation cases"
    if config.protocol == "paper":
        where = f"the {LAYOUTS[config.dataset].paper_split.upper()} list"
    axis.plot(*zip(*validated, strict=True), color=_LINE, marker="o", markersize=3, linewidth=1.2)
    best = max(validated, key=lambda point: point[1])  # the first of equals, as in training
    axis.plot(*best, color=_WEIGHT, marker="o", markersize=7, fillstyle="none", linestyle="none", markeredgewidth=1.6)
    axis.set(title=f"Dice of decoder 1 on {where}; best {100 * best[1]:.2f} % at {best[0]:,}", xlabel="iteration")


def _width(iterations: int) -> int:
    return max(1, iterations // _POINTS)


def binned(iterations: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """(iteration, mean, minimum, maximum) over equal ranges; non-finite values are skipped.

    >>> binned([1, 2], [3.0, 4.0])
    ([1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0])
    """
    width = _width(len(values))
    at, mean, low, high = [], [], [], []
    for first in range(0, len(values), width):
        there = np.array(values[first : first + width], dtype=np.float64)
        there = there[np.isfinite(there)]
        if there.size:
            at.append(float(np.mean(iterations[first : first + width])))
            mean.append(float(there.mean()))
            low.append(float(there.min()))
            high.append(float(there.max()))
    return at, mean, low, high
