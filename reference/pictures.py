"""Picture sheets: slices of an image with the outlines of masks drawn on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

AXES = ("x", "y", "z")
TRUTH, PREDICTION, OTHER = "#56B4E9", "#E69F00", "#CC79A7"  # of Okabe and Ito: told apart by the colour-blind too
_ROW, _COLUMN = 2.5, 2.9  # inches of a panel
_LEAST_WIDTH = 9.0  # inches, for the title
_TEXT = 9


class Outline(NamedTuple):
    """A mask to draw around, its colour, and its line width in points (a wide one shows under a narrow one)."""

    mask: NDArray  # (X, Y, Z) or (X, Y), nonzero is inside
    colour: str
    width: float = 1.3


class Panel(NamedTuple):
    """One slice: an image, masks to outline, where to cut, and what to write above it."""

    image: NDArray[np.float32]  # (X, Y, Z) or (X, Y)
    outlines: Sequence[Outline]
    axis: int  # 2 for a 2-D image, which is shown whole
    position: int
    title: str = ""
    spacing: Sequence[float] | None = None  # edge lengths of a voxel, for the proportions; None takes the sheet's


def truth_and_prediction(truth: NDArray | None, prediction: NDArray) -> list[Outline]:
    """The truth wide and below, the prediction narrow and above: both show where they agree."""
    outlines = [] if truth is None else [Outline(truth, TRUTH, 2.8)]
    return [*outlines, Outline(prediction, PREDICTION)]


def largest_slice(mask: NDArray, axis: int) -> int:
    """The slice across `axis` with the largest part of the mask in it; the middle one for an empty mask.

    >>> mask = np.zeros((4, 4, 4)); mask[1:3, 1:3, 3] = 1
    >>> largest_slice(mask, 2), largest_slice(np.zeros((4, 4, 4)), 2)
    (3, 2)
    """
    area = np.count_nonzero(mask, axis=tuple(a for a in range(mask.ndim) if a != axis))
    return int(area.argmax()) if area.any() else mask.shape[axis] // 2


def three_planes(
    image: NDArray[np.float32], truth: NDArray | None, prediction: NDArray, names: Sequence[str] = AXES
) -> list[Panel]:
    """Across the last axis first (x, y, z: axial), each cut where the truth (without one, the prediction) is largest.

    A 2-D image is one panel. Of several classes the outline of all together is drawn.
    """
    if image.ndim == 2:
        return [Panel(image, truth_and_prediction(truth, prediction), 2, 0)]
    guide = truth if truth is not None and np.any(truth) else prediction
    panels = []
    for axis in (2, 1, 0):
        position = largest_slice(guide, axis)
        title = f"{names[axis]} = {position}"
        panels.append(Panel(image, truth_and_prediction(truth, prediction), axis, position, title))
    return panels


def write_sheet(
    path: Path,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    title: str,
    legend: Mapping[str, str],
    spacing: Sequence[float] | None = None,
) -> None:
    """Writes a sheet of slices as PNG.

    Args:
        path: file to write.
        rows: for each row what to write beside it (a few short lines) and its panels, equally many in every row.
        title: above the sheet; may have several lines.
        legend: what each line colour means, {text: colour}.
        spacing: edge lengths of a voxel, for the panels' proportions; None takes cubes.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("rows is empty; expected at least one")
    columns = max(len(panels) for _, panels in rows)
    head = 0.45 + 0.2 * (title.count("\n") + 1)  # inches for title and legend
    height, width = head + _ROW * len(rows), max(1.9 + _COLUMN * columns, _LEAST_WIDTH)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows),
        columns + 1,
        width_ratios=[1.9, *[_COLUMN] * columns],
        left=0.01,
        right=0.995,
        top=1 - head / height,
        bottom=0.01,
        wspace=0.03,
        hspace=0.13,
    )
    for row, (caption, panels) in enumerate(rows):
        beside = figure.add_subplot(grid[row, 0])
        beside.axis("off")
        beside.text(0.02, 0.5, caption, fontsize=_TEXT, va="center", ha="left", linespacing=1.5, family="monospace")
        for column, panel in enumerate(panels):
            _draw(figure.add_subplot(grid[row, column + 1]), panel, spacing)
    figure.text(0.01, 1 - 0.08 / height, title, fontsize=_TEXT + 1, va="top", ha="left", linespacing=1.4)
    lines = [Line2D([], [], color=colour, linewidth=2.5, label=text) for text, colour in legend.items()]
    figure.legend(
        handles=lines,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - (head - 0.42) / height),
        ncols=len(lines),
        frameon=False,
        fontsize=_TEXT,
    )
    figure.savefig(path, pil_kwargs={"optimize": True})


def _cut(volume: NDArray, panel: Panel) -> NDArray:
    return volume if volume.ndim == 2 else np.take(volume, panel.position, panel.axis)


def _draw(axes: Any, panel: Panel, spacing: Sequence[float] | None) -> None:
    spacing = panel.spacing if panel.spacing is not None else spacing
    across, up = (a for a in range(3) if a != panel.axis)  # transposed below: the first axis runs to the right
    aspect = spacing[up] / spacing[across] if spacing is not None else 1.0
    picture = _cut(panel.image, panel).T
    dark, bright = np.percentile(picture, (1, 99.5))
    axes.imshow(
        picture,
        cmap="gray",
        vmin=dark,
        vmax=max(bright, dark + 1e-6),
        origin="lower",
        aspect=aspect,
        interpolation="nearest",
    )
    for outline in panel.outlines:
        mask = _cut(outline.mask, panel).T != 0
        if mask.any():
            # One voxel of margin: a mask that reaches the image's border is closed there.
            edge = np.pad(mask.astype(float), 1)
            ticks = [np.arange(-1, n + 1) for n in reversed(mask.shape)]
            axes.contour(*ticks, edge, levels=[0.5], colors=[outline.colour], linewidths=[outline.width])
    axes.set(xticks=[], yticks=[], xlim=(-1, picture.shape[1]), ylim=(-1, picture.shape[0]))
    axes.set_title(panel.title, fontsize=_TEXT - 1, pad=2)
    for side in axes.spines.values():
        side.set_visible(False)
