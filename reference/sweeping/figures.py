"""Pictures of a sweep: Dice case by case, and over the iterations, cell by cell."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

# Distinct in hue and in lightness, in the order of the cells (Okabe and Ito's palette).
COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")


def cases_png(
    dice: Mapping[str, Mapping[int, Mapping[str, float]]], baseline: str, coloured: Sequence[str] | None = None
) -> bytes:
    """Mean and range over the seeds of every case's Dice, cases sorted by the baseline's mean, worst first.

    Args:
        dice: cell -> seed -> case -> Dice, as returned by `results.dice_by_seed`.
        coloured: all cells, if only some are shown, so that each has the same colour in every picture.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axis = figure.subplots()
    means = {cell: _over_seeds(seeds) for cell, seeds in dice.items()}
    order = means[baseline if baseline in means else next(iter(means))]
    names = sorted(order, key=lambda case: statistics.fmean(order[case]))
    places = {cell: k for k, cell in enumerate(coloured or list(means))}
    for n, (cell, cases) in enumerate(means.items()):
        k = places[cell]
        there = [(at, [100 * v for v in cases[name]]) for at, name in enumerate(names) if name in cases]
        shift = 0.5 * (n / (len(means) - 1) - 0.5) if len(means) > 1 else 0.0
        at = [place + shift for place, _ in there]
        mean = [statistics.fmean(values) for _, values in there]
        spread = [
            [m - min(v) for m, (_, v) in zip(mean, there, strict=True)],
            [max(v) - m for m, (_, v) in zip(mean, there, strict=True)],
        ]
        seeds = len(dice[cell])
        label = f"{cell} ({seeds} seed{'s' * (seeds > 1)}, mean {statistics.fmean(mean):.1f} %)"
        axis.errorbar(at, mean, spread, color=COLOURS[k % 8], fmt=MARKS[k % 8], markersize=4.5, elinewidth=1, label=label)
    for n in range(len(names) - 1):
        axis.axvline(n + 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
    axis.set_xticks(range(len(names)), [str(n + 1) for n in range(len(names))])
    axis.set(xlabel=f"case, sorted by {baseline}, worst first", ylabel="Dice of decoder 1, %", xlim=(-0.6, len(names) - 0.4))
    return _finished(figure, axis)


def curves_png(curves: Mapping[str, Mapping[int, Sequence[float]]], title: str) -> bytes:
    """Mean and range over the seeds of the Dice over the iterations.

    Args:
        curves: cell -> iteration -> Dice of every seed.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    for k, (cell, points) in enumerate(curves.items()):
        at = sorted(points)
        values = [[100 * value for value in points[t]] for t in at]
        axis.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=COLOURS[k % 8], alpha=0.15, linewidth=0)
        mean = [statistics.fmean(v) for v in values]
        label = f"{cell} (mean and range of {len(values[-1])} seed{'s' * (len(values[-1]) > 1)})"
        axis.plot(at, mean, color=COLOURS[k % 8], marker=MARKS[k % 8], markersize=4.5, linewidth=1.6, label=label)
    axis.set(xlabel="iteration", ylabel="Dice of decoder 1, %", title=title)
    return _finished(figure, axis)


def _over_seeds(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, list[float]]:
    cases: dict[str, list[float]] = {}
    for scores in seeds.values():
        for case, value in scores.items():
            cases.setdefault(case, []).append(value)
    return cases


def _finished(figure: Figure, axis: Any) -> bytes:
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, facecolor="white")
    return content.getvalue()
