"""No network: import, loss and training open no socket; checkpoints are data and run no code."""

import ast

import pytest
from package_tools import LOSS_CALL, ROOT, output_of, run_python, tree_files

# Audit hooks see every socket of the interpreter, whichever library opens it, before the system does.
BLOCKED = """
import sys
refused = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
def refuse(event, arguments):
    if event in refused:
        raise PermissionError(f"network: {event} {arguments}")
sys.addaudithook(refuse)
"""
COMMANDS = """
from rplib.cli import main
settings = "filters=2 patch=32,32,32 stride=32,32,32 iterations=1 labelled=2 batch_size=2 labelled_per_batch=1 amp=off".split()
def rplib(*argv):
    assert main(list(argv)) == 0, argv
rplib("data", "phantom", "data", "--cases", "3", "--test-cases", "1", "--size", "32", "32", "32")
rplib("train", "--recipe", "la-8", "--data", "data", "--out", "run", *(word for s in settings for word in ("--set", s)))
import rplib.reference.evaluate, rplib.reference.predict
print("trained")
"""


def test_the_hook_notices_a_connection(tmp_path):
    code = "import urllib.request; urllib.request.urlopen('http://localhost:9')"
    done = run_python(BLOCKED + code, cwd=tmp_path)
    assert done.returncode == 1
    assert "PermissionError: network: " in done.stderr


def test_import_and_loss_open_no_connection(tmp_path):
    assert output_of(run_python(BLOCKED + LOSS_CALL, cwd=tmp_path, path=[ROOT])).startswith("loss ")


def test_training_opens_no_connection(tmp_path):
    pytest.importorskip("monai")
    assert output_of(run_python(BLOCKED + COMMANDS, cwd=tmp_path, path=[ROOT])).endswith("trained\n")


def test_every_checkpoint_is_loaded_as_data():
    calls = []
    for name, file in tree_files().items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                    calls.append((name, ast.unparse(node)))
    assert calls
    assert [(name, call) for name, call in calls if "weights_only=True" not in call] == []
