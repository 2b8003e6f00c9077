"""Plot the results of `rplib bench`: time, bytes and memory per voxel over the shapes, with the floor as a line.

python -m rplib.bench.plot RESULTS.csv PICTURE.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rplib.bench import rows as r
from rplib.bench.floor import gradient_bytes
from rplib.bench.rows import Measurement
from rplib.bench.shapes import DTYPES, SHAPES, Shape
from rplib.errors import UserError

_FORMATS = ("png", "pdf", "svg")
# name -> (colour, marker, label); ours in strong colours
_STYLES = {
    "naive": ("0.55", "o", "naive (authors' formulation)"),
    "vectorised": ("tab:olive", "s", "vectorised PyTorch"),
    "vectorised-c": ("tab:orange", "s", "vectorised, compiled"),
    "torch": ("tab:cyan", "^", "rplib torch"),
    "torch-c": ("tab:blue", "^", "rplib torch, compiled"),
    "triton": ("tab:red", "D", "rplib triton"),
}


class _Panel(NamedTuple):
    title: str
    unit: str


_PANELS = (_Panel("time", "ns per voxel"), _Panel("bytes moved", "bytes per voxel"), _Panel("extra memory", "bytes per voxel"))


def check_format(path: Path) -> None:
    """Raises UserError for an unknown picture format, and ModuleNotFoundError without matplotlib."""
    import matplotlib  # noqa: F401

    if path.suffix.lstrip(".").lower() not in _FORMATS:
        raise UserError(f"{path.name}: unknown picture format {path.suffix!r}; expected .{', .'.join(_FORMATS)}.")


def draw(rows: Sequence[Measurement], path: Path) -> None:
    """One row of panels per dtype and layout, logarithmic; only the first teacher pattern in the rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    check_format(path)
    teachers = rows[0].teachers if rows else ""
    shown = [row for row in rows if row.teachers == teachers and row.status in (r.MEASURED, r.COUNTED)]
    if not shown:
        raise UserError("there is nothing to plot: no implementation was measured.")
    settings = list(dict.fromkeys((row.dtype, row.layout) for row in shown))
    figure, axes = plt.subplots(len(settings), 3, figsize=(15, 0.8 + 3.6 * len(settings)), squeeze=False, layout="constrained")
    for line, (dtype, layout) in zip(axes, settings, strict=True):
        here = [row for row in shown if (row.dtype, row.layout) == (dtype, layout)]
        for axis, panel in zip(line, _PANELS, strict=True):
            _draw_panel(axis, panel, here)
        line[0].set_ylabel(f"{dtype}, {layout.replace('_', ' ')}\n{_PANELS[0].unit}")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Reliable mutual loss, forward and backward")
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=110, format=path.suffix.lstrip(".").lower())
    plt.close(figure)
    part.replace(path)


def _draw_panel(axis: Any, panel: _Panel, rows: Sequence[Measurement]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shapes = list(dict.fromkeys((row.shape, row.size) for row in rows))
    places = {shape: n for n, shape in enumerate(shapes)}
    floors: dict[int, float] = {}
    for name, (colour, marker, label) in _STYLES.items():
        points = []
        for row in rows:
            if row.implementation != name:
                continue
            place, value = places[row.shape, row.size], _value(panel, row)
            if value is not None:
                points.append((place, value))
            floor = _floor(panel, row)
            if floor is not None:
                floors[place] = floor
        if points:
            strong = name in ("torch", "torch-c", "triton")
            axis.plot(
                *zip(*sorted(points), strict=True),
                color=colour, marker=marker, label=label, linewidth=2 if strong else 1, markersize=6 if strong else 5,
            )  # fmt: skip
    if floors:
        axis.plot(
            *zip(*sorted(floors.items()), strict=True), color="black", linestyle="--", marker="_", markersize=12, label="floor"
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlim(-0.4, len(shapes) - 0.6)
    axis.set_xticks(range(len(shapes)), [_tick(name, size) for name, size in shapes], fontsize=8)
    axis.grid(True, which="major", axis="y", alpha=0.3)


def _tick(name: str, size: str) -> str:
    shape = SHAPES.get(name)
    return name if shape is None or str(shape) != size else f"{name}\nC={shape.classes} F={shape.features}"


def _value(panel: _Panel, row: Measurement) -> float | None:
    voxels = _voxels(row)
    if panel.title == "time":
        return None if row.seconds is None else row.seconds / voxels * 1e9
    if panel.title == "bytes moved":
        return row.lane_bytes_per_voxel
    return None if row.peak_bytes is None else row.peak_bytes / voxels


def _floor(panel: _Panel, row: Measurement) -> float | None:
    """Of time: the floor's bytes at the bandwidth of a copy; of memory: the gradients."""
    if panel.title == "time":
        if row.copy_bandwidth is None or row.floor_bytes_per_voxel is None:
            return None
        return row.floor_bytes_per_voxel / row.copy_bandwidth * 1e9
    if panel.title == "bytes moved":
        return row.floor_bytes_per_voxel
    return gradient_bytes(_shape(row).classes, DTYPES[row.dtype].itemsize)


def _shape(row: Measurement) -> Shape:
    batch, classes, features, *spatial = map(int, row.size.split("x"))
    return Shape(row.shape, batch, classes, features, tuple(spatial))


def _voxels(row: Measurement) -> int:
    return _shape(row).voxels


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rplib.bench.plot", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="files written by `rplib bench --csv`")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    try:
        check_format(args.picture)
        draw([row for path in args.results for row in r.read_csv(path)], args.picture)
    except (UserError, OSError, KeyError, ValueError) as error:
        print(f"rplib: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
