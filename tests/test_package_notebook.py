"""The notebook runs from top to bottom, learns something in its minute, and is committed without outputs."""

import json

import matplotlib
import pytest
from package_tools import ROOT

NOTEBOOK = ROOT / "reference" / "examples" / "phantoms.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]


def run(**numbers):
    """Runs every cell in one namespace, figures drawn and not shown; `numbers` replace constants of the first cell."""
    import matplotlib.pyplot as plt

    namespace = {}
    with matplotlib.rc_context({"backend": "agg"}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "show", lambda: plt.gcf().canvas.draw())
        for position, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {position}", "exec"), namespace)
            if position == 0:
                assert numbers.keys() <= namespace.keys()
                namespace |= numbers
        figures = [plt.figure(number) for number in plt.get_fignums()]
        plt.close("all")
    return namespace, figures


def test_it_is_a_notebook_without_outputs():
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CONTENT["cells"]}) == len(CONTENT["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_every_cell_runs():
    found, figures = run(ITERATIONS=2, UNLABELLED=2)
    assert len(found["history"]) == 2
    assert found["which"].shape == found["how"].shape == found["truth"].shape
    assert len(figures) == 2
    assert {ax.get_title() for ax in figures[1].axes} >= {"how: weight", "image, truth"}


@pytest.mark.slow
def test_a_minute_is_enough_to_learn():
    found, _ = run()
    assert found["dice"] > 0.4  # the best threshold has less
    first, last = found["history"][:20], found["history"][-20:]
    assert sum(d for d, _ in last) < 0.8 * sum(d for d, _ in first)
