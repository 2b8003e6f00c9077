"""The API pages build from the docstrings without a warning, by the command of `make docs`, and hold every public name."""

import html
import os
import re
import shlex
import subprocess
import sys

import pytest
from package_tools import ROOT

import rplib

pytest.importorskip("pdoc")


def command(output):
    """The recipe of `make docs`, for this interpreter and another folder."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^docs:.*\n\t@\$\(BIN\)/python (.*)$", makefile, flags=re.MULTILINE)
    argv = shlex.split(recipe)
    argv[argv.index("--output-directory") + 1] = str(output)
    return [sys.executable, *argv]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Page -> (ids in it, its text)."""
    output = tmp_path_factory.mktemp("docs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(output), cwd=output, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    found = {}
    for file in output.rglob("*.html"):
        source = file.read_text(encoding="utf-8")
        text = html.unescape(re.sub(r"<[^>]+>", "", source))
        found[file.relative_to(output).as_posix()] = set(re.findall(r'id="([\w.]+)"', source)), text
    return found


def test_warnings_are_errors():
    argv = command("anywhere")
    assert argv[1:3] == ["-W", "error"]


def test_every_public_name_is_there(pages):
    names, _ = pages["rplib.html"]
    assert set(rplib.__all__) - {"functional"} <= names
    names, _ = pages["rplib/functional.html"]
    assert {"reliable_mutual_loss", "reliability"} <= names


def test_sections_of_docstrings_are_headings(pages):
    for page in ("rplib.html", "rplib/functional.html"):
        ids, text = pages[page]
        assert {"arguments", "returns", "raises", "example"} <= ids, page
        assert "Args:" not in text, page


def test_every_public_name_says_what_it_is():
    for name in rplib.__all__:
        thing = getattr(rplib, name)
        assert name.startswith("__") or (thing.__doc__ or "").strip(), name
