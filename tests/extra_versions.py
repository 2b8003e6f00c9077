"""An environment with the oldest or the newest packages that the trainer's extra allows, beside the torch that is here.

    python tests/extra_versions.py lowest build/lowest-env
    python tests/extra_versions.py newest build/newest-env

Torch, Triton and the tools of the tests are taken from the environment that runs this: its packages come last on the new one's
path, and pip sees them as installed. Prints what was installed.
"""

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def requirements(which: str) -> list[str]:
    """Of the extra `reference`, for pip: ``h5py==3.10`` for ``h5py>=3.10,<4``, or as they are.

    >>> requirements("newest")[0].startswith("filelock>=")
    True
    >>> all(re.fullmatch(r"[a-z0-9]+==[0-9.]+", line) for line in requirements("lowest"))
    True
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(project["optional-dependencies"]["reference"])
    return [re.sub(r">=([0-9.]+),.*", r"==\1", line) for line in found] if which == "lowest" else found


def make(which: str, folder: Path) -> None:
    """The environment; what is in the folder is replaced."""
    if which not in ("lowest", "newest"):
        raise SystemExit(f"expected lowest or newest, got {which}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                          check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
    here = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    # "zz": read after every other .pth; rplib itself is that of this checkout, whatever is installed elsewhere.
    (Path(found) / "zz_rplib_versions.pth").write_text("".join(f"{path}\n" for path in (ROOT, *here)))
    arguments = ["--upgrade", "--upgrade-strategy", "only-if-needed", "--only-binary", ":all:", *requirements(which)]
    subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments], check=True)
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
                            check=True, capture_output=True, text=True).stdout  # fmt: skip
    versions = {package["name"].lower(): package["version"] for package in json.loads(listed)}
    names = [re.split(r"[<>=~!]", line)[0].lower() for line in requirements(which)]
    print(f"{which}:", ", ".join(f"{name} {versions.get(name, '?')}" for name in [*names, "torch"]))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
