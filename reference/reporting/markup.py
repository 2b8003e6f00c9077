"""Building blocks of the HTML page: style, tables, figures, colour keys. All text is escaped here."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from rplib.reference.reporting.pictures import Panel, Scale, panel_png, scale_png

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #ffffff; --raised: #f6f8fa;
  --loud: #b42318; --loud-page: #fef3f2; --bar: #bcd7ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --page: #0d1117;
  --raised: #161b22; --loud: #ff8f85; --loud-page: #2d1514; --bar: #1f4a68; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; } p { margin: .4rem 0; max-width: 60rem; }
a { color: inherit; } nav { color: var(--soft); } nav a { margin-right: .9rem; }
.loud { border: 2px solid var(--loud); background: var(--loud-page); color: var(--loud); font-weight: 600;
  padding: .6rem .9rem; border-radius: 6px; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; padding: 0; list-style: none; }
.figures li { background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; }
.figures b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; } tr.changed td { font-weight: 700; } code, .mono { font-family: ui-monospace, monospace; }
td.bar { background: linear-gradient(var(--bar), var(--bar)) left center / var(--share) 70% no-repeat; }
.case { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 1rem 0; background: var(--raised); }
.planes { display: grid; grid-template-columns: repeat(var(--planes), minmax(0, 1fr)); gap: .6rem; align-items: end; }
.planes figure { margin: 0; } .planes img { width: 100%; height: auto; display: block; border-radius: 3px; background: #000; }
figcaption { font-size: .82rem; color: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center; margin: .5rem 0; }
.key i { display: inline-block; width: 1.6rem; height: .3rem; margin-right: .4rem; vertical-align: middle;
  border: 1px solid var(--soft); } .key img { width: 9rem; height: .7rem; vertical-align: middle; margin: 0 .4rem; }
.curves svg { width: 100%; height: auto; } details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def planes(panels: Sequence[Panel], what: str) -> str:
    """Slices as figures in a grid."""
    figures = []
    for panel in panels:
        data = base64.b64encode(panel_png(panel)).decode()
        alt = f"{what}, {panel.title}" if panel.title else what
        caption = escape(", ".join(part for part in (what.rpartition(", ")[2], panel.title) if part))
        figures.append(
            f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
        )
    return "".join(figures)


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    kind: str = "",
    bars: int | None = None,
    changed: Sequence[int] = (),
) -> str:
    """A table; `kind` "text": text, not numbers; `bars`: index of the percentage column with bars; `changed`: rows in bold."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            bar = column == bars and cell not in ("", "-")
            cells.append(f'<td class="bar" style="--share: {cell}%">{escape(cell)}</td>' if bar else f"<td>{escape(cell)}</td>")
        lines.append(f"{'<tr class=changed>' if number in changed else '<tr>'}{''.join(cells)}</tr>")
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="{kind}">{top}{body}</table></div>'


def line(colour: str, text: str) -> str:
    """Legend entry of an outline colour."""
    return f'<span><i style="background: {colour}"></i>{escape(text)}</span>'


def scale_key(scale: Scale) -> str:
    """Legend entry of a map's colours."""
    data = base64.b64encode(scale_png(scale)).decode()
    low, high = (escape(end) for end in scale.ends)
    bar = f'<img alt="colours from low to high" src="data:image/png;base64,{data}">'
    return f"<span>{escape(scale.title)}: {low}{bar}{high}</span>"
