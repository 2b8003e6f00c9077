"""The files for a public host: valid by their schemas, in step with the project, without secrets."""

import re
import subprocess
import sys

import pytest
from package_tools import PYPROJECT, ROOT

import rplib

pytest.importorskip("check_jsonschema")
from ruamel.yaml import YAML

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.github-issue-forms": FORMS,
    "vendor.github-issue-config": [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


def read(path):
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def valid(schema, *files):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, "--force-filetype", "yaml", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_are_valid_by_their_schema(schema, tmp_path):
    assert SCHEMAS[schema]
    done = valid(schema, *SCHEMAS[schema])
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wrong.yml").write_text("nonsense: [1]\n")
    assert valid(schema, tmp_path / "wrong.yml").returncode == 1


def test_issue_forms_ask_for_the_versions():
    assert len(FORMS) >= 2
    for form in FORMS:
        required = [f["attributes"]["label"] for f in read(form)["body"] if f.get("validations", {}).get("required")]
        assert any("`rplib info`" in label for label in required), form.name


def test_workflows_need_no_secret_and_may_only_read():
    assert WORKFLOWS
    for workflow in WORKFLOWS:
        assert "secrets." not in workflow.read_text(encoding="utf-8")
        assert read(workflow)["permissions"] == {"contents": "read"}
        for name, job in read(workflow)["jobs"].items():
            assert job["timeout-minutes"] <= 180, f"{workflow.name}: {name}"


def test_workflows_run_what_the_makefile_has():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [
        target
        for workflow in WORKFLOWS
        for line in re.findall(r"run: make (.*)", workflow.read_text(encoding="utf-8"))
        for target in re.findall(r"(?<!\S)[a-z][a-z-]*(?!\S)", line)
    ]
    assert {"lint", "docs", "test", "test-torch", "test-all"} <= set(targets)
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, flags=re.MULTILINE)] == []


def test_workflows_cover_the_lowest_torch_and_systems_without_triton():
    jobs = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    (lowest,) = re.findall(r"torch>=(\d+\.\d+)", " ".join(PYPROJECT["project"]["dependencies"]))
    tested = jobs["torch"]["strategy"]["matrix"]["torch"]
    assert any(f"torch=={lowest}.0" in one.split() for one in tested)
    assert "torch" in tested  # the newest
    assert any("macos" in job["runs-on"] for job in jobs.values())


def test_citation_is_of_this_version_and_names_the_article():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == rplib.__version__
    heading = f"## [{rplib.__version__}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    article = citation["preferred-citation"]
    assert (article["doi"], article["year"], article["volume"]) == ("10.1016/j.media.2024.103111", 2024, 94)
    assert article["doi"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_precommit_runs_the_ruff_of_the_development_extra():
    (ruff,) = (pin for pin in PYPROJECT["project"]["optional-dependencies"]["dev"] if pin.startswith("ruff"))
    repos = {repo["repo"].rpartition("/")[2]: repo for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]}
    assert repos["ruff-pre-commit"]["rev"] == "v" + ruff.partition("~=")[2]
    assert [hook["id"] for hook in repos["ruff-pre-commit"]["hooks"]] == ["ruff-check", "ruff-format"]
