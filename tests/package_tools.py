"""Copies of the source tree, quick offline installs, and interpreters that do not see this environment's own rplib."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "reference", "bench")
EXAMPLES = "examples"  # scripts to read: data, no package
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "rplib", "tests", *LINKED)

# A loss call with gradient and maps: what every kind of install must be able to do. (B, C, *spatial) = (1, 2, 3, 4).
LOSS_CALL = """
import torch, rplib
torch.manual_seed(0)
logits = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2)]
features = [torch.randn(1, 5, 3, 4) for _ in range(2)]
loss = rplib.ReliableMutualLoss()(logits, features)
loss.backward()
assert loss.isfinite() and logits[0].grad.abs().sum() > 0, loss
assert len(rplib.reliability(logits, features)) == 2
print("loss", float(loss))
"""


def copy_source(destination: Path) -> Path:
    """The source as a checkout has it: links kept, nothing that builds and tests leave."""
    destination.mkdir(parents=True)
    for name in _BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                destination / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
            )
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, destination / name)
    return destination


def links_become_text(source: Path) -> None:
    """What git on Windows makes of links by default: small files that hold the target."""
    for name in LINKED:
        link = source / "rplib" / name
        link.unlink()
        link.write_text(f"../{name}", encoding="utf-8")


def pip_install(source: Path, target: Path, *options: str) -> None:
    """Installs without the network and without dependencies."""
    arguments = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *options, str(source)],
        capture_output=True,
        text=True,
        cwd=target.parent,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_python(
    code: str,
    *,
    cwd: Path,
    path: Sequence[Path] = (),
    site: Sequence[Path] = (),
    blocked: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter.

    ``path`` goes to the front of sys.path; ``site`` holds site-packages folders whose .pth files count (editable).
    This environment's packages follow, without their .pth files: an rplib that is installed here editable is not seen.
    Importing one of ``blocked`` fails as if it were not installed.
    """
    here = dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    prelude = "\n".join(
        [
            "import site, sys",
            f"sys.path[:0] = {[str(p) for p in path]!r}",
            f"for folder in {[str(p) for p in site]!r}: site.addsitedir(folder)",
            f"sys.path += {list(here)!r}",
            f"sys.modules.update(dict.fromkeys({list(blocked)!r}))",
        ]
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-S", "-c", f"{prelude}\n{code}"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a run that must have succeeded."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def distribution_name(requirement: str) -> str:
    """`tensorboard` of ``tensorboard>=2.16; python_version > "3"``."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return found.group().lower()


def tree_packages() -> dict[str, Path]:
    """Every package of the project by its import name, found in the tree: `rplib`, `rplib.kernels`, ..."""
    roots = {"rplib": ROOT / "rplib"} | {f"rplib.{name}": ROOT / name for name in LINKED}
    found = {}
    for name, root in roots.items():
        for folder, folders, files in os.walk(root):  # does not follow rplib/kernels and the other links
            folders[:] = [f for f in folders if f not in ("__pycache__", EXAMPLES)]
            if any(f.endswith(".py") for f in files):
                parts = Path(folder).relative_to(root).parts
                found[".".join([name, *parts])] = Path(folder)
    return found


def tree_files() -> dict[str, Path]:
    """Every file that an install must bring: modules, the typing marker, recipes and READMEs, by path in the wheel."""
    packages = tree_packages()
    files = {}
    for name, folder in packages.items():
        for file in sorted(folder.rglob("*")):
            inner = file.relative_to(folder)
            of_subpackage = any(p != folder and p.is_relative_to(folder) and p in file.parents for p in packages.values())
            in_link = name == "rplib" and inner.parts[0] in LINKED
            if file.is_file() and "__pycache__" not in inner.parts and not of_subpackage and not in_link:
                files["/".join([*name.split("."), *inner.parts])] = file
    return files
