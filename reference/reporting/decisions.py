"""One row of pictures: what the loss decides on one slice, from the image to the prediction.

    python -m rplib.reference.reporting.decisions RUN DATA PICTURE.png

draws it for the test case with the median Dice of a run, for example of `rplib demo` (RUN is then ``demo/mutual``, DATA
``demo/data``). The picture in the root README was made this way.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rplib.reference.evaluation.scoring import Report, evaluate
from rplib.reference.reporting.pictures import PREDICTION, TRUTH, Outline, Panel, write_sheet
from rplib.reference.reporting.sheets import case_panels, map_panels, scales, scores_of
from rplib.reference.reporting.tables import shown, weight


def median_case(report: Report) -> str:
    """The case in the middle by Dice; of an even number the worse of the two."""
    cases = report.worst_first()
    return cases[(len(cases) - 1) // 2]


def decision_panels(report: Report, name: str) -> list[Panel]:
    """Image with truth, which decoder teaches, the weight, prediction with truth: the first plane of one case.

    Raises:
        KeyError: the report has no reliability maps of this case.
    """
    case = report.dataset.load(name, needs_label=True)
    assert case.label is not None
    which, how = (panels[0] for panels in map_panels(report, case))
    plain = case_panels(report, case)[0]
    truth = [Outline(case.label, TRUTH, 1.6)]
    return [
        plain._replace(title="image, true outline", outlines=truth),
        which._replace(title="which decoder teaches", outlines=[]),
        how._replace(title="weight of the pseudo-label", outlines=[]),
        plain._replace(title="prediction of decoder 1"),
    ]


def write_decisions(report: Report, path: Path, name: str | None = None) -> None:
    """Write the row as PNG.

    Args:
        report: result of `evaluate`, with ``maps`` large enough to include the case.
        path: file to write.
        name: which case; None selects the median one.

    Raises:
        KeyError: the report has no reliability maps of this case.
    """
    name = median_case(report) if name is None else name
    dice = "\n".join(f"Dice {shown(scores.dice, 'dice')} %" for scores in scores_of(report, name).values())
    found = report.verdicts()[name]
    caption = (
        f"{name}\n\ndecoder 1: {dice}\n\nmean weight of\nright labels {weight(found.weight_right)}\n"
        f"wrong labels {weight(found.weight_wrong)}"
    )
    rows = [(caption, decision_panels(report, name))]
    title = f"{report.config.name}: what the loss decides on one slice of a {report.split} case"
    write_sheet(path, rows, title, {"truth": TRUTH, "prediction": PREDICTION}, scales=scales(report))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command in the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m rplib.reference.reporting.decisions", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("data", type=Path, help="data set that it is evaluated on")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args(arguments)
    write_decisions(evaluate(args.run, args.data, maps=sys.maxsize), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
