"""The front page keeps its word: its examples run as written, and its names, commands, keywords and links exist."""

import importlib
import inspect
import re
import subprocess
import sys
from ast import literal_eval

import pytest
from package_tools import PYPROJECT, ROOT

import rplib
from rplib import cli, options

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
OPTIONS = (ROOT / "rplib" / "README.md").read_text(encoding="utf-8")
EXAMPLES = [text for language, text in BLOCKS if language == "python"]


def test_there_are_examples():
    assert len(EXAMPLES) == 2
    first = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert len(first) <= 12, "the drop-in example is to be taken in at a glance"


@pytest.mark.parametrize("example", EXAMPLES, ids=["drop-in", "monai"])
def test_example_runs_as_written(example, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(script)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "nan" not in done.stdout


def rows(*header: str) -> list[list[str]]:
    """Cells of the table of options whose header starts with these cells."""
    lines = OPTIONS.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(header) + " |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().replace("\\*", "*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def test_options_table_is_the_signature():
    signature = inspect.signature(rplib.functional.reliable_mutual_loss).parameters
    keywords = {name: p.default for name, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    table = {row[0].strip("`"): [value.strip("` ") for value in row[1].split(",")] for row in rows("keyword", "values")}
    assert list(table) == list(keywords)
    for name, values in table.items():
        assert literal_eval(values[0]) == keywords[name], f"{name}: the default comes first"
        if name in options._ALLOWED:
            assert sorted(map(str, map(literal_eval, values))) == sorted(map(str, options._ALLOWED[name]))


def test_every_implementation_is_in_the_table():
    named = {row[0].strip('`"') for row in rows("`impl`", "description")}
    assert named == set(options._ALLOWED["impl"])


def test_every_field_of_the_maps_is_named():
    section = OPTIONS[OPTIONS.index("\nFields: ") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert named == set(rplib.Reliability._fields) - {"student", "teacher"}


def test_pictures_are_small_and_say_what_they_show():
    pictures = re.findall(r"^!\[([^\]]*)\]\(([^)]+)\)$", README, flags=re.MULTILINE)
    assert len(pictures) == 3
    for said, target in pictures:
        assert len(said.split()) > 8, f"{target} needs an alternative text"
        assert (ROOT / target).stat().st_size < 300_000


def test_commands_exist():
    code = "\n".join([text for language, text in BLOCKS if language == "sh"] + re.findall(r"`([^`\n]+)`", README))
    named = set(re.findall(r"^rplib ([a-z]+)", code, flags=re.MULTILINE))
    assert named == set(cli.COMMANDS)
    targets = set(re.findall(r"^make ([a-z]+)", code, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_extras_exist():
    named = set(re.findall(r"\.\[([a-z]+)\]", README))
    assert named == set(PYPROJECT["project"]["optional-dependencies"])


def test_recipes_exist():
    on_disk = {file.stem for file in (ROOT / "reference" / "recipes").glob("*.toml")}
    named = set(re.findall(r"`((?:la|pancreas|brats)-\d+|generic)`", README))
    assert named == {name for name in on_disk if not name.endswith(("-supervised", "-robust")) and name != "base"}
    robust = {name for name in on_disk if name.endswith("-robust")}
    assert robust == {f"{name}-robust" for name in named if name.startswith("la-")}
    assert {f"{name}-supervised" for name in named} <= on_disk


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README)
    local = [target for target in targets if "://" not in target]
    assert "LICENSE" in local
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing


def test_the_map_of_the_trainer_names_every_file():
    text = (ROOT / "reference" / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Where things are") :].split("\nNames that have moved")[0]
    named, folder = [], ""
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| folder"):
            first, files, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            folder = "" if first == "top" else re.sub(r"\[(\w+)\]\(\1\).*", r"\1/", first) or folder
            named += [folder + file for file in re.findall(r"`(\w+\.py)`", files)]
    assert len(named) == len(set(named))
    reference = ROOT / "reference"
    files = {file.relative_to(reference).as_posix() for file in reference.rglob("*.py") if file.name != "__init__.py"}
    assert set(named) == {file for file in files if not file.startswith("examples/")}  # those: examples/README.md


def test_links_of_the_trainers_pages_lead_somewhere():
    pages = sorted((ROOT / "reference").rglob("*.md"))
    assert len(pages) == 7
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert "://" in target or file.exists(), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_moved_names_are_where_the_page_says():
    text = (ROOT / "reference" / "README.md").read_text(encoding="utf-8")
    moves = re.findall(r"^\| `(rplib\.[\w.]+)` \| (?:`(rplib\.[\w.]+)`|unchanged) \|$", text, flags=re.MULTILINE)
    assert len(moves) == 5
    for old, new in moves:
        module, _, name = (new or old).rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
