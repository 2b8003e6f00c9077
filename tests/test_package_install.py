"""Every way to install or use the source: from a checkout, a zip of it with or without links, editable, or none."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from package_tools import LINKED, LOSS_CALL, copy_source, links_become_text, output_of, pip_install, run_python

IMPORTS = """
import rplib, rplib.kernels, rplib.reference, rplib.bench
print(*(m.__file__ for m in (rplib, rplib.kernels, rplib.reference, rplib.bench)), sep="\\n")
"""
NOT_ON_TOP = f"""
import importlib.util
for name in {LINKED!r}: assert importlib.util.find_spec(name) is None, name
"""


def keep_links(source: Path) -> None:
    assert all((source / "rplib" / name).is_symlink() for name in LINKED)


def lose_links(source: Path) -> None:
    for name in LINKED:
        (source / "rplib" / name).unlink()


def as_checkout(source: Path, work: Path) -> Path:
    return source


def as_zip(source: Path, work: Path) -> Path:
    """A zip as hosting sites make it: one folder inside; pip unpacks it without knowing links."""
    archive = work / "rplib-main.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(source.rglob("*")):
            name = f"rplib-main/{file.relative_to(source)}"
            if file.is_symlink():
                entry = zipfile.ZipInfo(name)
                entry.external_attr = 0o120777 << 16
                out.writestr(entry, str(file.readlink()))
            elif file.is_file():
                out.write(file, name)
    return archive


def as_tar(source: Path, work: Path) -> Path:
    archive = work / "rplib-main.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        out.add(source, "rplib-main")
    return archive


@pytest.mark.slow_cases("zip", "checkout-links-as-text")
@pytest.mark.parametrize(
    ("links", "form"),
    [(keep_links, as_checkout), (keep_links, as_zip), (links_become_text, as_checkout), (lose_links, as_tar)],
    ids=["checkout", "zip", "checkout-links-as-text", "tar-without-links"],
)
def test_install(links, form, tmp_path):
    source = copy_source(tmp_path / "source")
    links(source)
    target = tmp_path / "target"
    pip_install(form(source, tmp_path), target)

    installed = {path.name for path in target.iterdir()}
    assert {name.partition("-")[0] for name in installed} <= {"rplib", "bin"}, installed
    done = run_python(IMPORTS + NOT_ON_TOP + LOSS_CALL, cwd=tmp_path, path=[target])
    *files, loss = output_of(done).splitlines()
    assert [Path(file).parent for file in files] == [target / "rplib", *(target / "rplib" / name for name in LINKED)]
    assert loss.startswith("loss ")


@pytest.mark.slow_cases("links-as-text")
@pytest.mark.parametrize("links", [keep_links, links_become_text], ids=["links", "links-as-text"])
def test_editable_install_follows_the_source(links, tmp_path):
    source = copy_source(tmp_path / "source")
    links(source)
    target = tmp_path / "target"
    pip_install(source, target, "--editable")

    for name in ("", *LINKED):
        (source / (name or "rplib") / "written_later.py").write_text("HERE = __file__\n")
    modules = [".".join(filter(None, ["rplib", name, "written_later"])) for name in ("", *LINKED)]
    later = f"""
import importlib
for name in {modules!r}: print(importlib.import_module(name).HERE)
"""
    done = run_python(IMPORTS + NOT_ON_TOP + later + LOSS_CALL, cwd=tmp_path, site=[target])
    *files, loss = output_of(done).splitlines()
    assert all(Path(file).resolve().is_relative_to(source.resolve()) for file in files), files
    assert loss.startswith("loss ")


def test_plain_checkout_on_pythonpath(tmp_path):
    source = copy_source(tmp_path / "source")
    output = output_of(run_python(IMPORTS + LOSS_CALL, cwd=tmp_path, environment={"PYTHONPATH": str(source)}))
    assert str(source / "rplib" / "kernels") in output


@pytest.mark.parametrize("name", LINKED)
def test_folder_names_are_refused_as_top_level_imports(name, tmp_path):
    """In the root of a checkout `import kernels` would find the folder, and half of it would work."""
    source = copy_source(tmp_path / "source")
    done = run_python(f"import {name}", cwd=source, path=[source])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"rplib.{name}" in last


def test_scripts_of_the_environment_start_the_command_line():
    script = Path(sys.executable).with_name("rplib")
    if not script.exists():
        pytest.skip(f"rplib is not installed in this environment: {script} is missing")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("rplib ")
