"""The scripts of reference/examples against the packages that they are written for; absent ones are skipped with a reason."""

import difflib
import importlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rplib

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "reference" / "examples"


@pytest.fixture(autouse=True)
def _as_scripts_see_it(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def needs(package: str) -> None:
    """Skips where the package is absent or does not import beside this torch."""
    try:
        importlib.import_module(package)
    except Exception as error:
        pytest.skip(f"{package} cannot be imported here ({type(error).__name__}: {error}); see the extras examples and nnunet")


def example(name: str):
    return importlib.import_module(name)


def test_every_script_is_short_and_says_what_it_shows():
    scripts = sorted(EXAMPLES.rglob("*.py"))
    assert len(scripts) >= 11
    for script in scripts:
        lines = script.read_text(encoding="utf-8").splitlines()
        assert len(lines) < 60, f"{script.name} has {len(lines)} lines"
        assert lines[0].startswith('"""'), script.name


def test_the_table_names_every_script_and_its_lines():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in [*EXAMPLES.rglob("*.py"), EXAMPLES / "monai_bundle.json", EXAMPLES / "cps.diff"]:
        assert script.name in readme, script.name
    rows = [row for row in readme.splitlines() if row.startswith("|") and row.count("|") == 7 and ".py" in row]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        files = [EXAMPLES / name for name in cells[1].replace("`", "").split(", ")]
        assert cells[2] == ", ".join(str(len(file.read_text(encoding="utf-8").splitlines())) for file in files), row
        module, _, test = cells[4].strip("`").partition("::")
        assert f"def {test}(" in (ROOT / "tests" / module).read_text(encoding="utf-8"), row
    assert len(rows) >= 8


def test_plain_loop():
    assert example("plain_loop").main() > 0.8


def test_monai_trainer_and_bundle_do_the_same():
    needs("ignite")
    expected = example("monai_trainer").main(epochs=2)
    assert expected > 0.5
    assert example("monai_bundle").main(max_epochs=2) == pytest.approx(expected, abs=1e-6)
    assert example("monai_bundle").main(max_epochs=2, consistency=3.0) != pytest.approx(expected, abs=1e-6)


def test_accelerate():
    needs("accelerate")
    from accelerate.state import AcceleratorState

    for precision, epochs in (("no", 3), ("bf16", 1)):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert example("with_accelerate").main(epochs, precision) > (0.8 if precision == "no" else 0)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_accelerate_on_two_processes_learns_what_one_learns(tmp_path):
    """gloo; each process draws its half of the batch, and DDP averages the gradients: both end with the same weights."""
    needs("accelerate")
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys, torch\nsys.path[:0] = [{str(EXAMPLES)!r}, {str(ROOT)!r}]\nimport with_accelerate as example\n"
        "from accelerate import PartialState\nkept = []\nbuild = example.Pair\n"
        "example.Pair = lambda: kept.append(build()) or kept[-1]\n"
        "found = example.main(epochs=4)\nstate = PartialState()\nassert state.num_processes == 2\n"
        f"torch.save((found, kept[0].state_dict()), {str(tmp_path)!r} + f'/{{state.process_index}}.pt')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]  # accelerate launch needs MPI on CPUs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*launch, "--master-port", str(port), script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, ours), (_, theirs) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first > 0.7
    for name, weights in ours.items():
        if "running" not in name:
            torch.testing.assert_close(weights, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_lightning():
    needs("lightning")
    module = example("lightning_module").main(epochs=3)
    assert example("toy").dice(module.networks[0]) > 0.8
    assert module.trainer.callback_metrics["mutual"] > 0


@pytest.mark.slow
def test_lightning_on_two_processes_learns_what_one_learns(tmp_path):
    needs("lightning")
    one = example("lightning_module").main(steps=4).state_dict()
    script = tmp_path / "two.py"  # a file: Lightning starts the second process from it
    script.write_text(
        f"import sys, torch\nsys.path[:0] = [{str(EXAMPLES)!r}, {str(ROOT)!r}]\nfrom lightning_module import main\n"
        f"module = main(2, steps=4)\nif module.global_rank == 0: torch.save(module.state_dict(), {str(tmp_path / 'two.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    start = example("lightning_module").main(steps=1).state_dict()
    for name, weights in one.items():
        moved = (weights - start[name]).abs().max()
        assert (two[name] - weights).abs().max() <= 0.01 * moved + 1e-6, name


def test_cross_pseudo_supervision_as_a_diff(monkeypatch):
    before, after = ((EXAMPLES / name).read_text(encoding="utf-8") for name in ("cps.py", "cps_reliable.py"))
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    assert "".join(difflib.unified_diff(*lines, "cps.py", "cps_reliable.py", n=1)) == (EXAMPLES / "cps.diff").read_text()
    for name in ("cps", "cps_reliable"):
        monkeypatch.setattr(example(name), "ITERATIONS", 40)
        assert example(name).main() > 0.8


def test_mean_teacher():
    student, teacher = example("mean_teacher").main(60)
    assert student > 0.8 and teacher > 0.6 and student != teacher


def test_scribbles():
    module = example("scribbles")
    _, labels = example("toy").discs(4, seed=0)
    scribbles = module.scribbled(labels)
    assert 0.9 < (scribbles == module.UNLABELLED).float().mean() < 0.99
    logits = [torch.randn(4, 2, 48, 48) for _ in range(2)]
    with pytest.raises(ValueError, match="255"):  # what happened silently once
        rplib.MutualObjective(weighting=None)(logits, None, scribbles, 0.1)
    assert module.main(60) > 0.8
