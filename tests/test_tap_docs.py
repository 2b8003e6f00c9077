"""The examples of rplib/README.md run as written, and its tables name what exists."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rplib
from rplib import dispatch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "rplib" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_examples_run_as_written(tmp_path):
    """All in one process: importing torch is most of it."""
    pytest.importorskip("matplotlib")
    assert len(EXAMPLES) == 7
    (tmp_path / "all.py").write_text("\n".join(f"def example_{k}():\n" + _indented(e) for k, e in enumerate(EXAMPLES)))
    calls = "; ".join(f"example_{k}()" for k in range(len(EXAMPLES)))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, '.'); from all import *; {calls}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(EXAMPLES) and "nan" not in done.stdout
    assert done.stdout.startswith("FeatureTap(networks[0]: '2', networks[1]: '2')")


def _indented(example: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in example.splitlines())


def test_tables_name_what_exists():
    fields = re.findall(r"^\| `(\w+)` \| \([\w, ]*\) \|", TEXT, flags=re.MULTILINE)
    assert tuple(fields) == rplib.ObjectiveStatistics._fields
    keywords = re.findall(r"^\| `(\w+)` \| (?:`|every|a call)", TEXT, flags=re.MULTILINE)
    known = {
        *inspect.signature(rplib.MutualObjective).parameters,
        *inspect.signature(rplib.MutualObjective.forward).parameters,
    }
    assert {"mask", "students", "labelled"} <= set(keywords) <= known | {"VNet", "HighResNet"}
    last = TEXT[TEXT.index("## Which form computes it") :]
    assert all(f"`{name}`" in last for name in dispatch.BEYOND_KERNELS)
