"""Where and how the tests run: Triton's interpreter without a GPU, fixed seeds, memory that shows when nobody wrote it."""

import gc
import importlib.util
import inspect
import os
import re

import pytest
import quick_interpreter
import torch
from hypothesis import HealthCheck, settings

# Triton reads this once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        quick_interpreter.install()

# The interpreter costs about a millisecond per program instance, so few examples by default, and the same ones on every run.
# HYPOTHESIS_PROFILE=thorough looks further, with new examples each time.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("repeatable", max_examples=6, derandomize=True, database=None, **_common)
settings.register_profile("thorough", max_examples=200, **_common)
settings.register_profile("long", max_examples=300, **_common)  # 10,200 problems in test_loss_properties.py
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def _call_with_room(function, keywords):
    return function(**keywords)


# Python keeps the frames of calls in chunks of 16 KB, and returns a chunk as soon as it is empty. Where a loop in a deep test
# calls across the end of a chunk, each call asks the system for memory: a fifth of the suite's time. A frame of 560 KB gets a
# chunk of 1 MB, in which there is room for all calls below it.
_call_with_room.__code__ = _call_with_room.__code__.replace(co_stacksize=70_000)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """As pytest calls a test, with room for the frames of what it calls."""
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        return None  # pytest refuses it; called here it would pass without having run
    names = pyfuncitem._fixtureinfo.argnames
    _call_with_room(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})
    return True


def pytest_collection_finish(session):
    """What the imports left behind is there to stay: it is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # the interpreter makes many short-lived objects, which need no search


def pytest_terminal_summary(terminalreporter):
    """Near-ties, where an implementation's own mask was taken: counted and shown."""
    counted = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if name == "near_ties" and not value.startswith("0 ")
    ]
    if counted:
        terminalreporter.section("near-ties")
        for nodeid, value in sorted(counted):
            terminalreporter.line(f"{value:>16}  {nodeid}")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m "not slow"
def pytest_collection_modifyitems(config, items):
    """Of a test marked slow_cases(IDS), the cases of those ids are slow; * stands for any text.

    An id that fits no case is an error. RPLIB_ALL_CASES=1 ignores the marker: the mutants face all cases.
    """
    if os.environ.get("RPLIB_ALL_CASES"):
        return
    unused = {}
    for item in items:
        marker = item.get_closest_marker("slow_cases")
        if marker is None:
            continue
        left = unused.setdefault((item.path, item.originalname), set(marker.args))
        fitting = {name for name in marker.args if re.fullmatch(re.escape(name).replace(r"\*", ".*"), item.callspec.id)}
        left -= fitting
        if fitting:
            item.add_marker(pytest.mark.slow)
    if any("::" in argument for argument in config.args):  # the caller chose some of the cases
        return
    for (path, name), left in unused.items():
        if left:
            raise pytest.UsageError(f"{path.name}::{name}: slow_cases names {sorted(left)}, which fit none of its cases")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1337)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(request):
    """In the tests of the loss, torch.empty and its kin hand out NaN (integers: the largest): an unwritten output shows."""
    module = request.module.__name__.rpartition(".")[2]
    if not module.startswith("test_loss_") or module == "test_loss_compile":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
