"""Wheel and sdist contain the whole tree under the right names; pyproject is consistent with it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from package_tools import LOSS_CALL, PYPROJECT, ROOT, copy_source, distribution_name, tree_files, tree_packages

import rplib
from rplib.cli import EXTRAS


def build(source: Path, out: Path, *kinds: str) -> list[Path]:
    """Runs the build backend of this environment; no network."""
    for kind in kinds:
        code = f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.iterdir())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist) of a copy of the source."""
    base = tmp_path_factory.mktemp("build")
    source = copy_source(base / "source")
    sdist, wheel = sorted(build(source, base / "dist", "wheel", "sdist"), key=lambda file: file.suffix)
    assert wheel.suffix == ".whl"
    return wheel, sdist


def test_packages_of_pyproject_are_those_of_the_tree():
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(tree_packages())
    for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        assert tree_packages()[name] == ROOT / folder


def test_wheel_holds_exactly_the_tree(built):
    wheel, _ = built
    expected = {name: file.read_bytes() for name, file in tree_files().items()}
    assert "rplib/py.typed" in expected
    assert sorted(contents(wheel)) == sorted(expected)
    assert contents(wheel) == expected


def test_wheel_puts_nothing_but_rplib_at_the_top(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert top == {"rplib", f"rplib-{rplib.__version__}.dist-info"}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_from_the_sdist_is_the_same(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # from Python 3.11.4 on
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    (again,) = build(unpacked, tmp_path / "dist", "wheel")
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_released_as_the_guide_says(tmp_path):
    """`python -m build`, `twine check --strict`, and the wheel in an environment without access to the checkout."""
    pytest.importorskip("twine")
    source = copy_source(tmp_path / "source")
    out = tmp_path / "dist"
    for command in (["build", "--no-isolation", "--outdir", str(out), str(source)], ["twine", "check", "--strict"]):
        files = map(str, sorted(out.iterdir())) if command[0] == "twine" else ()
        done = subprocess.run([sys.executable, "-m", *command, *files], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    shutil.rmtree(source)

    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    # torch and the rest come from here; without its .pth files an editable rplib of this environment is not seen.
    (here,) = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    (here / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    rplib_command = python.with_name("rplib")
    for command, said in (
        ([rplib_command, "info"], str(here / "rplib")),
        ([python, "-c", LOSS_CALL], "loss "),
        ([rplib_command, "data", "phantom", "data", "--cases", "2", "--test-cases", "1", "--size", "32", "32", "32"], "data"),
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout


def test_metadata(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        info = f"rplib-{rplib.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == rplib.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [distribution_name(line) for line in required] == ["torch"]
    assert re.search(r"^rplib = rplib\.cli:main$", entry_points, flags=re.MULTILINE)


def test_version_is_written_once_and_the_changelog_knows_it():
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert re.search(rf"^## \[?{re.escape(rplib.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def test_command_line_knows_every_module_of_the_extras():
    declared = PYPROJECT["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert sorted(map(str.lower, modules)) == sorted(map(distribution_name, declared[extra]))


def test_development_pins_the_tested_pair():
    pins = [line for line in PYPROJECT["project"]["optional-dependencies"]["dev"] if "==" in line]
    assert any(line.startswith("torch==") for line in pins)
    assert any(line.startswith("triton==") and "linux" in line for line in pins)


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git checkout")
def test_links_are_committed_as_links():
    listed = subprocess.run(
        ["git", "ls-files", "-s", "rplib"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    links = {line.split("\t")[1] for line in listed if line.startswith("120000")}
    assert links == {"rplib/kernels", "rplib/reference", "rplib/bench"}
