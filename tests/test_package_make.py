"""The commands of the front page: what they would run, and what they say where they cannot."""

import shutil
import subprocess

import data_paths
import pytest
from package_tools import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_target():
    done = make()
    assert done.returncode == 0
    for target in ("demo", "test", "test-all", "test-torch", "lint", "docs", "gpu", "clean", "setup"):
        assert f"make {target}" in done.stdout


def test_no_usable_python_is_one_line_with_the_remedy(tmp_path):
    done = make("setup", "PYTHON=false", f"VENV={tmp_path}/venv")
    assert done.returncode == 2
    first = done.stderr.splitlines()[0]
    assert "Python >= 3.11" in first
    assert "PYTHON=" in first
    assert not (tmp_path / "venv").exists()


def test_python_without_venv_is_one_line_with_the_remedy(tmp_path):
    """As on Debian and Ubuntu without python3-venv: new enough, but no ensurepip."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", f"VENV={tmp_path}/venv")
    assert done.returncode == 2
    assert "python3-venv" in done.stderr.splitlines()[0]


def test_setup_runs_again_only_when_pyproject_changed(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    stamp = venv / ".ready"
    stamp.touch()
    assert make("--question", "setup", f"VENV={venv}").returncode == 0
    assert make("--question", "setup", f"VENV={venv}", "--what-if=pyproject.toml").returncode == 1


def test_ci_runs_the_tests_with_the_data_required():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100, "not executable"
    text = script.read_text()
    assert text.index("export RPLIB_REQUIRE_DATA=1") < text.index("make test")
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize(
    ("variable", "find"),
    [("RPLIB_GOLDEN", data_paths.golden_dir), ("RPLIB_LEFT_ATRIUM", data_paths.left_atrium_dir)],
    ids=["golden", "left-atrium"],
)
def test_missing_data_skips_at_home_and_fails_in_ci(variable, find, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    monkeypatch.delenv("RPLIB_REQUIRE_DATA", raising=False)
    with pytest.raises(pytest.skip.Exception, match=variable):
        find()
    monkeypatch.setenv("RPLIB_REQUIRE_DATA", "1")
    with pytest.raises(pytest.fail.Exception, match=variable):
        find()
    monkeypatch.setenv(variable, str(tmp_path))
    assert find() == tmp_path
