"""Where the truth vectors and the real Left Atrium cases lie; neither is part of the repository."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


def _find(variable: str, fallback: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable) or fallback)
    if not folder.is_dir():
        reason = f"{what} not found: {folder} is no folder; set {variable}"
        if os.environ.get("RPLIB_REQUIRE_DATA"):  # set by .ci/run: there a skipped test would prove nothing
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason, allow_module_level=True)
    return folder


def golden_dir() -> Path:
    """Folder of the truth vectors (``*.npz``); skips the calling test where it is absent, fails it in CI."""
    return _find("RPLIB_GOLDEN", _ROOT.parent / "shared" / "golden", "golden vectors")


def left_atrium_dir() -> Path:
    """Folder with ``unpack_left_atrium.py`` and ``left_atrium/*.xz``; skips the calling test where it is absent."""
    return _find("RPLIB_LEFT_ATRIUM", _ROOT.parent / "shared" / "data", "packed Left Atrium cases")
