"""The command `rplib`: imports and runs the module of a subcommand, and prints each user error as one line."""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn

from rplib import __version__
from rplib.errors import Terminated, UserError, explained, printable


class Command(NamedTuple):
    """A subcommand; its module has `add_arguments(parser)` and `run(args) -> exit code`."""

    module: str
    summary: str


COMMANDS = {
    "bench": Command("rplib.bench.benchmark", "time, memory and bytes of every implementation of the loss on this machine"),
    "check": Command("rplib.check", "compare the implementations with the naive form in float64 on this machine"),
    "info": Command("rplib.info", "versions, devices, and the implementation that `auto` selects; for bug reports"),
    "data": Command("rplib.reference.data", "convert a raw release; generate, downsample or check a data set"),
    "train": Command("rplib.reference.train", "train the two-decoder V-Net with a recipe"),
    "evaluate": Command("rplib.reference.evaluate", "evaluate a trained run: CSV, NIfTI, pictures, and an HTML report"),
    "compare": Command("rplib.reference.compare", "compare evaluated runs: seeds averaged, recipes case by case"),
    "sweep": Command("rplib.reference.sweep", "train and compare recipes x settings x seeds from one file; resumable"),
    "predict": Command("rplib.reference.predict", "segment new NIfTI or h5 images: one label map each, on the image's grid"),
    "demo": Command("rplib.reference.demo", "train and evaluate on generated data in one to two minutes"),
}

# Import names by extra, so that a missing one is reported with the extra to install.
EXTRAS = {
    "triton": ("triton",),
    "reference": (
        "filelock",
        "h5py",
        "matplotlib",
        "monai",
        "nibabel",
        "numpy",
        "rich",
        "scipy",
        "SimpleITK",
        "tensorboard",
        "tomlkit",
        "tqdm",
    ),
}

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM


class Parser(argparse.ArgumentParser):
    """argparse that reports errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rplib` with these arguments (default: those of the process) and return the exit code.

    A user error prints one line on stderr and returns 2. Ctrl-C returns 130, SIGTERM 143 (training writes a checkpoint
    first), a closed pipe (`rplib info | head`) 141.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # replace characters that the encoding lacks by "?"
            stream.reconfigure(errors="replace")
    with _termination():
        if argv is None:
            code = _explained(sys.argv[1:], importing=_at_once)
        else:  # called from Python: do not end the caller's process
            code = _explained(list(argv), importing=contextlib.nullcontext)
    try:
        sys.stdout.flush()  # a closed pipe or a full disk shows here, and not at interpreter exit
    except OSError as error:
        # Python flushes again at exit, where the remaining buffer would fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        return code or _mistake(f"writing to standard output failed: {error.strerror}")
    return code


def _explained(arguments: list[str], importing: Callable[[], AbstractContextManager[None]]) -> int:
    try:
        return _run(arguments, importing)
    except SystemExit as leaving:  # --help and --version
        if not isinstance(leaving.code, int):
            raise
        return leaving.code
    except UserError as error:
        return _mistake(str(error))
    except ModuleNotFoundError as error:
        extra = _extra_of(error.name)
        if extra is None:
            raise
        return _mistake(f'{error.name} is not installed; install it with: pip install "rplib[{extra}]"')
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except Terminated:
        _report("rplib: terminated")
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        _report("rplib: interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        text = explained(error)
        if text is None:
            raise
        return _mistake(str(text))


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Make SIGTERM end a command as Ctrl-C does, so that it cleans up, for example temporary files."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    hook = sys.unraisablehook

    def again(unraisable: Any) -> None:
        """Send the signal again: Python drops exceptions raised inside a destructor or the callback of a weak reference."""
        number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(unraisable.exc_type)
        if number is None:
            hook(unraisable)
        else:
            timer = threading.Timer(0.02, signal.raise_signal, [number])  # its thread, so that this callback ends first
            timer.daemon = True
            timer.start()

    before, sys.unraisablehook = signal.signal(signal.SIGTERM, end), again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """While libraries are imported, let SIGINT and SIGTERM end the process immediately.

    There is nothing to clean up yet, and an exception would be raised inside the initialisation of their C++ code.
    """

    def leave(number: int, _: object) -> None:
        text, code = ("interrupted", EXIT_INTERRUPTED) if number == signal.SIGINT else ("terminated", EXIT_TERMINATED)
        os.write(2, f"rplib: {text}\n".encode())
        os._exit(code)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` and background jobs of a shell ignore it
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: list[str], importing: Callable[[], AbstractContextManager[None]]) -> int:
    top = Parser(
        prog="rplib",
        description="Mutual learning with reliable pseudo-labels for semi-supervised segmentation.",
        epilog=_command_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"rplib {__version__}")
    top.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    name = top.parse_args(arguments[:1]).command  # the rest belongs to the subcommand

    with importing():
        module = importlib.import_module(COMMANDS[name].module)
    parser = Parser(
        prog=f"rplib {name}",
        description=(module.__doc__ or "").strip() or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    with importing():
        importlib.import_module("torch")  # every command needs it, and it takes seconds
    return int(module.run(args))


def _command_list() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["commands:", *lines, "", "Run `rplib COMMAND --help` for the options of a command."])


def _extra_of(module: str | None) -> str | None:
    root = (module or "").partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if root in modules), None)


def _mistake(message: str) -> int:
    _report(f"rplib: error: {printable(message)}")
    return EXIT_MISTAKE


def _report(line: str) -> None:
    """Print on stderr. If stderr is a file on a full disk, the exit code must not change."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
