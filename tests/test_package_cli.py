"""`rplib`: every command is there, and every mistake is one line on stderr with exit code 2."""

import errno
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from package_tools import ROOT, run_python

import rplib
from rplib import cli
from rplib.errors import UserError


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with the given `run` behind the command `check`."""

    def put(run, add_arguments=lambda parser: None):
        module = SimpleNamespace(__doc__="A stand-in.", add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, "stand_in_command", module)
        monkeypatch.setitem(cli.COMMANDS, "check", cli.Command("stand_in_command", "stand-in"))

    return put


def raising(error):
    def run(args):
        raise error

    return run


def mistake(capsys, *arguments) -> str:
    """The one line that these arguments give, without its `rplib: error: `."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rplib: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("rplib: error: ").strip()


def test_no_command(capsys):
    assert "rplib --help" in mistake(capsys)


@pytest.mark.parametrize("word", ["trian", "--recipe", "predictions", ""])
def test_unknown_command(capsys, word):
    message = mistake(capsys, word, "--out", "somewhere")
    assert "rplib --help" in message


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rplib {rplib.__version__}\n"


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(capsys, name):
    assert cli.main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: rplib {name}")
    assert err == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_refuses_an_unknown_option(capsys, name):
    assert "--help" in mistake(capsys, name, "--no-such-option")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_modules_keep_the_contract(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.add_arguments)
    assert callable(module.run)
    assert (module.__doc__ or "").strip()


def test_exit_code_is_the_commands(stand_in):
    stand_in(lambda args: 3)
    assert cli.main(["check"]) == 3


def test_arguments_reach_the_command(stand_in):
    seen = []
    stand_in(lambda args: seen.append(args.set) or 0, lambda parser: parser.add_argument("--set", action="append"))
    assert cli.main(["check", "--set", "a=1", "--set", "b=-2"]) == 0
    assert seen == [["a=1", "b=-2"]]


def test_an_output_without_the_tables_characters_gets_question_marks(stand_in, monkeypatch):
    """As behind a pipe on Windows, or with PYTHONIOENCODING=ascii."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    stand_in(lambda args: print("\u2503 89.9 \u00b1 1.2") or 0)
    assert cli.main(["check"]) == 0
    assert written.getvalue().decode("ascii").strip() == "? 89.9 ? 1.2"


def test_mistake_of_several_lines_becomes_one(stand_in, capsys):
    stand_in(raising(UserError("case A has no key `label`;\n  add it")))
    assert mistake(capsys, "check") == "case A has no key `label`; add it"


def test_denied_file_is_one_line(stand_in, capsys):
    stand_in(raising(PermissionError(13, "Permission denied", "/some/run/last.pt")))
    assert mistake(capsys, "check") == "Permission denied: /some/run/last.pt; change its permissions or choose another place"


def test_interruption(stand_in, capsys):
    stand_in(raising(KeyboardInterrupt()))
    assert cli.main(["check"]) == 130
    assert capsys.readouterr().err == "rplib: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code", "message"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_while_torch_is_imported(tmp_path, number, code, message):
    """A stand-in for torch sends it, as a user does in the first seconds, and would go on for ever."""
    (tmp_path / "torch.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{number})\nwhile True: pass\n")
    program = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
runpy.run_module("rplib", run_name="__main__")
"""
    done = run_python(program, cwd=tmp_path, path=[tmp_path, ROOT])
    assert done.returncode == 2 and "rplib --help" in done.stderr  # no word reached it: torch is not asked for
    done = run_python(f"sys.argv[1:] = ['info']\n{program}", cwd=tmp_path, path=[tmp_path, ROOT])
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"rplib: {message}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code", "message"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_inside_a_destructor_is_not_lost(stand_in, capsys, number, code, message):
    """Python drops an exception there: the command would run to its end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Dropped:
        def __del__(self):
            signal.raise_signal(getattr(signal, number))
            _ = [None] * 10  # the handler runs here

    def run(_args):
        Dropped()
        for _ in range(3000):
            time.sleep(0.01)
        return 0

    stand_in(run)
    try:
        assert cli.main(["check"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"rplib: {message}\n"


class FullDisk(io.StringIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_behind_stderr_keeps_the_exit_code(stand_in, monkeypatch):
    stand_in(raising(UserError("a mistake")))
    monkeypatch.setattr(sys, "stderr", FullDisk())
    assert cli.main(["check"]) == 2


def test_help_and_mistakes_need_no_torch(tmp_path):
    """So that they take no seconds."""
    for arguments, expected in ((["--help"], 0), (["--version"], 0), (["trian"], 2)):
        code = f"from rplib.cli import main; sys.exit(main({arguments!r}))"
        assert run_python(code, cwd=tmp_path, path=[ROOT], blocked=["torch"]).returncode == expected, arguments


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError("no errno"), ModuleNotFoundError(name="rplib.gone")])
def test_bugs_are_not_dressed_up_as_mistakes(stand_in, error):
    stand_in(raising(error))
    with pytest.raises(type(error)):
        cli.main(["check"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "phantom", "set"],
        ["data", "check", "set"],
        ["train", "--recipe", "la-8", "--data", "set", "--out", "run"],
        ["evaluate", "run", "--data", "set"],
        ["demo"],
    ],
    ids=" ".join,
)
@pytest.mark.slow_cases("data check set", "evaluate run --data set", "demo")
def test_missing_extra_is_one_line_with_the_remedy(arguments, tmp_path):
    """As after `pip install rplib`: whichever package of the extra is asked for first."""
    code = f"from rplib.cli import main; sys.exit(main({arguments!r}))"
    done = run_python(code, cwd=tmp_path, path=[ROOT], blocked=cli.EXTRAS["reference"])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]  # above it torch itself may warn that NumPy is missing
    assert last.startswith("rplib: error: ")
    assert 'pip install "rplib[reference]"' in last


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_scripts_of_a_checkout_accept_the_same_options(name, tmp_path):
    """`python reference/train.py` from anywhere, with nothing installed and no PYTHONPATH."""
    script = ROOT / "reference" / f"{name}.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [sys.executable, str(script)]
    done = subprocess.run([*arguments, "--help"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(f"usage: rplib {name}"), done.stderr
    done = subprocess.run([*arguments, "--no-such"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("rplib: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["check", "info"])
def test_core_commands_need_no_extra(name, tmp_path):
    code = f"from rplib.cli import main; sys.exit(main([{name!r}, '--help']))"
    done = run_python(code, cwd=tmp_path, path=[ROOT], blocked=[*cli.EXTRAS["reference"], *cli.EXTRAS["triton"]])
    assert done.returncode == 0, done.stderr


def test_missing_module_inside_a_command_names_its_extra(stand_in, capsys):
    stand_in(raising(ModuleNotFoundError(name="monai.transforms")))
    assert 'pip install "rplib[reference]"' in mistake(capsys, "check")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("arguments", [["--help"], ["info"]])
def test_reader_that_leaves_early(arguments):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    arguments = [sys.executable, "-m", "rplib", *arguments]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=buffered)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "rplib", "info"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
