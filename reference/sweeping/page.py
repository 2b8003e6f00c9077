"""The page of a sweep: one HTML file with its table and pictures."""

import base64
import math
from collections.abc import Sequence
from html import escape

from rplib.reference.reporting.markup import STYLE, table
from rplib.reference.sweeping.figures import cases_png, curves_png
from rplib.reference.sweeping.plan import Plan
from rplib.reference.sweeping.results import Comparison, Result, compare_cells, dice_by_seed, validation_curves

HEADINGS = ("cell", "seeds", "Dice %", "minus the baseline", "lowest", "p, seeds", "p, cases", "better in")


def comparison_rows(lines: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """The cells of the table; Dice in percent."""
    return [
        (
            line.cell,
            str(len(line.seeds)),
            _percent(line.mean) + _spread(line.deviation),
            "" if math.isnan(line.difference) else f"{100 * line.difference:+.2f}{_spread(line.difference_deviation)}",
            "" if math.isnan(line.lowest) else f"{100 * line.lowest:+.2f}",
            _p(line.p_seeds),
            _p(line.p_cases),
            f"{line.better} of {line.cases}" if line.cases else "",
        )
        for line in lines
    ]


def page(plan: Plan, results: Sequence[Result]) -> str:
    """The whole page, with the runs scored so far."""
    scored = {(row.cell, row.seed) for row in results}
    title = f"Sweep {plan.out.name}: {len(scored)} of {len(plan.runs)} runs scored"
    lines, curves = compare_cells(results, plan.cells, plan.baseline), validation_curves(plan)
    pictures = [("Dice of every case", cases_png(dice_by_seed(results), plan.baseline))] if results else []
    if curves:
        pictures.append(("Dice on the validation cases", curves_png(curves, "validation cases")))
    shown = "".join(
        f"<h2>{escape(name)}</h2><figure><img style='max-width: 100%' alt='{escape(name)}' "
        f"src='data:image/png;base64,{base64.b64encode(content).decode()}'></figure>"
        for name, content in pictures
    )
    every = sorted({row.seed for row in results})
    means = [dict(zip(line.seeds, line.means, strict=True)) for line in lines]
    seeds = [[line.cell, *(_percent(of.get(seed, math.nan)) for seed in every)] for line, of in zip(lines, means, strict=True)]
    by_seed = table(["cell", *map(str, every)], seeds, "Mean Dice % of every seed")
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
{table(HEADINGS, comparison_rows(lines), f"{plan.split} cases, decoder 1; the baseline is {plan.baseline}")}
<p class="soft">Dice: mean and standard deviation of the seeds' means. Minus the baseline, lowest: of the differences seed by
seed. p, seeds: paired t-test over the seeds. p, cases: Wilcoxon test over the cases, each the mean over the seeds. No
correction for multiple comparisons.</p>
{by_seed}
{shown}
</body>
</html>
"""


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _spread(value: float) -> str:
    return "" if math.isnan(value) else f" \u00b1 {100 * value:.2f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
