"""Picture sheets: image slices with outlines of masks and overlaid maps."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from rplib.reference.files import write_atomically

AXES = ("x", "y", "z")
TRUTH, PREDICTION, OTHER = "#56B4E9", "#E69F00", "#CC79A7"  # Okabe-Ito palette, distinguishable with colour blindness
_ROW, _COLUMN, _BESIDE = 2.5, 2.9, 1.9  # inches: height and width of a panel, width of the text beside the panels
_BAR = 2.3  # inches of a colour bar
_BAR_TITLE, _BAR_LABELS = 0.15, 0.2  # inches above and below the bars, clear of the sheet's and the panels' titles
_SCREEN = 100  # dots per inch, for line widths in points
_LEAST_WIDTH = 9.0  # inches, for the title
_TEXT = 9
_OVERLAY = 0.6  # opacity of a map


class Outline(NamedTuple):
    """A mask to outline, its colour, and line width in points (wide lines show under narrow ones)."""

    mask: NDArray  # (X, Y, Z) or (X, Y), nonzero is inside
    colour: str
    width: float = 1.3


class Scale(NamedTuple):
    """The colour scale of a map."""

    colours: str  # a matplotlib colormap
    low: float
    high: float
    title: str  # meaning of the colours
    ends: tuple[str, str]  # labels of the ends
    fades: bool = False  # higher values are more transparent

    def rgba(self, values: NDArray) -> NDArray[np.float64]:
        """Colours with opacity, (..., 4); NaN is transparent."""
        where = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        colours = matplotlib.colormaps[self.colours](np.nan_to_num(where))
        colours[..., 3] = 0.9 * (1 - where) if self.fades else _OVERLAY
        colours[np.isnan(values), 3] = 0
        return colours


class Overlay(NamedTuple):
    """A map over an image; transparent where NaN."""

    values: NDArray[np.float32]  # (X, Y, Z) or (X, Y)
    scale: Scale


class Panel(NamedTuple):
    """One slice: an image, masks to outline, the slice position, and a title."""

    image: NDArray[np.float32]  # (X, Y, Z) or (X, Y)
    outlines: Sequence[Outline]
    axis: int  # 2 for a 2-D image, which is shown in full
    position: int
    title: str = ""
    spacing: Sequence[float] | None = None  # edge lengths of a voxel, for the aspect ratio; None uses the sheet's
    overlay: Overlay | None = None


def truth_and_prediction(truth: NDArray | None, prediction: NDArray) -> list[Outline]:
    """A wide line for the truth under a narrow one for the prediction, so that both show where they agree."""
    outlines = [] if truth is None else [Outline(truth, TRUTH, 2.8)]
    return [*outlines, Outline(prediction, PREDICTION)]


def largest_slice(mask: NDArray, axis: int) -> int:
    """Index of the slice across `axis` with the most mask voxels; the middle one for an empty mask.

    >>> mask = np.zeros((4, 4, 4)); mask[1:3, 1:3, 3] = 1
    >>> largest_slice(mask, 2), largest_slice(np.zeros((4, 4, 4)), 2)
    (3, 2)
    """
    area = np.count_nonzero(mask, axis=tuple(a for a in range(mask.ndim) if a != axis))
    return int(area.argmax()) if area.any() else mask.shape[axis] // 2


def three_planes(
    image: NDArray[np.float32], truth: NDArray | None, prediction: NDArray, names: Sequence[str] = AXES
) -> list[Panel]:
    """Slices across each axis, the last one first (x, y, z: axial), where the truth (or else the prediction) is largest.

    A 2-D image is one panel. Several classes get one joint outline.
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
    scales: Sequence[Scale] = (),
) -> None:
    """Writes a sheet of slices as PNG.

    Args:
        path: file to write.
        rows: text (a few short lines) and panels of each row; all rows have the same number of panels.
        title: may have several lines.
        legend: {text: colour} of the outlines.
        spacing: edge lengths of a voxel, for the aspect ratio; None is isotropic.
        scales: of the overlays, each with a colour bar beside the legend.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("rows is empty; expected at least one")
    with plain_text():
        content = _png(_sheet(rows, title, legend, spacing, scales))
    write_atomically(path, lambda file: file.write(content))


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Make matplotlib draw names as plain text: `$` begins no formula, and missing glyphs give no warning."""
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _sheet(
    rows: Sequence[tuple[str, Sequence[Panel]]],
    title: str,
    legend: Mapping[str, str],
    spacing: Sequence[float] | None,
    scales: Sequence[Scale],
) -> Figure:
    columns = max(len(panels) for _, panels in rows)
    width = max(_BESIDE + _COLUMN * columns, _LEAST_WIDTH)
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, int(12.5 * width))]
    legend_end = 0.45 + 0.2 * len(lines) + (_BAR_TITLE if scales else 0.0)  # inches for title and legend
    head = legend_end + (_BAR_LABELS if scales else 0.0)
    height = head + _ROW * len(rows)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows),
        columns + 1,
        width_ratios=[_BESIDE, *[_COLUMN] * columns],
        left=0.01,
        right=0.995 * (_BESIDE + _COLUMN * columns) / width,
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
    figure.text(0.01, 1 - 0.08 / height, "\n".join(lines), fontsize=_TEXT + 1, va="top", ha="left", linespacing=1.4)
    handles = [Line2D([], [], color=colour, linewidth=2.5, label=text) for text, colour in legend.items()]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - (legend_end - 0.42) / height),
        ncols=len(handles),
        frameon=False,
        fontsize=_TEXT,
        labelcolor="black",
    )
    for place, scale in enumerate(scales):
        beside_legend = 0.2 + sum(0.6 + 0.075 * len(text) for text in legend)
        left = (beside_legend + (_BAR + 0.4) * place) / width
        box = figure.add_axes((left, 1 - (legend_end - 0.16) / height, _BAR / width, 0.1 / height))
        draw_scale(box, scale)
    return figure


def panel_png(panel: Panel, zoom: float = 2.0) -> bytes:
    """One slice without text, as PNG, with `zoom` pixels for the smallest voxel edge."""
    across, up = _edges(panel, None)
    width, height = _cut(panel.image, panel).shape
    scale = zoom / min(across, up)
    size = width * across * scale, height * up * scale
    figure = Figure(figsize=(size[0] / _SCREEN, size[1] / _SCREEN), dpi=_SCREEN, facecolor="black")
    FigureCanvasAgg(figure)
    _draw(figure.add_axes((0, 0, 1, 1)), panel._replace(title=""), None)
    return _png(figure)


def draw_scale(axes: Any, scale: Scale) -> None:
    """A labelled colour bar of a map over grey, low to high."""
    _colours(axes, scale)
    axes.set(xticks=[-0.5, 255.5], yticks=[])
    axes.set_xticklabels(scale.ends, fontsize=_TEXT - 2)
    axes.tick_params(length=0, pad=1)
    left, right = axes.get_xticklabels()
    left.set_ha("left")
    right.set_ha("right")
    axes.set_title(scale.title, fontsize=_TEXT, pad=2)


def scale_png(scale: Scale) -> bytes:
    """The colour bar without labels."""
    figure = Figure(figsize=(2.4, 0.12), dpi=_SCREEN)
    FigureCanvasAgg(figure)
    _colours(figure.add_axes((0, 0, 1, 1)), scale)
    return _png(figure)


def _colours(axes: Any, scale: Scale) -> None:
    axes.imshow(np.full((1, 256), 0.6), cmap="gray", vmin=0, vmax=1, aspect="auto")
    axes.imshow(scale.rgba(np.linspace(scale.low, scale.high, 256)[None]), aspect="auto")
    for side in axes.spines.values():
        side.set_visible(False)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", pil_kwargs={"optimize": True})
    return content.getvalue()


def _cut(volume: NDArray, panel: Panel) -> NDArray:
    return volume if volume.ndim == 2 else np.take(volume, panel.position, panel.axis)


def _edges(panel: Panel, spacing: Sequence[float] | None) -> tuple[float, float]:
    """Horizontal and vertical edge lengths of a voxel; slices are shown with the first axis to the right."""
    spacing = panel.spacing if panel.spacing is not None else spacing
    across, up = (a for a in range(3) if a != panel.axis)
    return (spacing[across], spacing[up]) if spacing is not None else (1.0, 1.0)


def _draw(axes: Any, panel: Panel, spacing: Sequence[float] | None) -> None:
    across, up = _edges(panel, spacing)
    aspect = up / across
    picture = _cut(panel.image, panel).T
    dark, bright = np.percentile(picture, (1, 99.5))
    axes.set_facecolor("black")
    axes.imshow(
        picture,
        cmap="gray",
        vmin=dark,
        vmax=max(bright, dark + 1e-6),
        origin="lower",
        aspect=aspect,
        interpolation="nearest",
    )
    if panel.overlay is not None:
        values, scale = _cut(panel.overlay.values, panel).T, panel.overlay.scale
        axes.imshow(scale.rgba(values), origin="lower", aspect=aspect, interpolation="nearest")
    for outline in panel.outlines:
        mask = _cut(outline.mask, panel).T != 0
        if mask.any():
            # Pad by one voxel, so that outlines are closed at the image's border.
            edge = np.pad(mask.astype(float), 1)
            ticks = [np.arange(-1, n + 1) for n in reversed(mask.shape)]
            axes.contour(*ticks, edge, levels=[0.5], colors=[outline.colour], linewidths=[outline.width])
    axes.set(xticks=[], yticks=[], xlim=(-1, picture.shape[1]), ylim=(-1, picture.shape[0]))
    axes.set_title(panel.title, fontsize=_TEXT - 1, pad=2)
    for side in axes.spines.values():
        side.set_visible(False)
