"""`rplib info`: what it reports is what this environment has, as text and as JSON."""

import importlib.metadata
import json
import platform

import pytest
import torch
from package_tools import ROOT, output_of, run_python

import rplib
from rplib import cli, dispatch, info


def test_versions_are_those_in_use(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == info.report()
    assert found["versions"]["rplib"].startswith(f"{rplib.__version__} in ")
    assert platform.python_version() in found["versions"]["python"]
    assert torch.__version__ in found["versions"]["torch"]
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")


def test_text_holds_every_value(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for section in info.report().values():
        for name, value in section.items():
            assert f"  {name} " in out
            assert value in out


def test_every_device_is_listed_with_what_auto_takes():
    found = info.report()
    assert list(found["auto"]) == list(found["devices"])
    assert sum(name.startswith("cuda:") for name in found["devices"]) == torch.cuda.device_count()
    assert found["auto"]["cpu"].startswith("torch: ")


def test_auto_is_asked_of_the_dispatch(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda *tensors, explicit=False: None)
    assert info.report()["auto"]["cpu"].startswith("triton: ")


@pytest.mark.parametrize("blocked", [["triton"], ["numpy", "monai", "h5py", "triton"]], ids=str)
def test_works_where_nothing_but_torch_can_be_imported(blocked, tmp_path):
    code = "from rplib.cli import main; sys.exit(main(['info']))"
    assert "impl=" in output_of(run_python(code, cwd=tmp_path, path=[ROOT], blocked=blocked))


def test_environment_shows_what_changes_results(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert info.report()["environment"]["CUDA_VISIBLE_DEVICES"] == "3,1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in info.report()["environment"]
