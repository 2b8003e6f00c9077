"""The planted faults still fit the code that they change; whether the tests find them is for planted_faults.py."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import faults_loss
import faults_trainer
import mutation
import pytest
from faults import Fault

ROOT = Path(__file__).resolve().parent.parent
PLANTED = [
    fault
    for module in (faults_loss, faults_trainer)
    for value in vars(module).values()
    if isinstance(value, (list, tuple))
    for fault in value
    if isinstance(fault, Fault)
]


def test_there_are_faults():
    assert len(PLANTED) > 40


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_each_text_occurs_once(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    for old, new in fault.substitutions:
        assert text.count(old) == 1, f"{fault.file} holds {old!r} {text.count(old)} times; change the fault with the code."
        assert new != old


TESTS = sorted({fault.test for fault in PLANTED} | {test for stages in mutation.TESTS.values() for test in chain(*stages)})


@pytest.mark.parametrize("test", [test for test in TESTS if "::" in test])
def test_the_tests_that_faults_and_mutants_are_given_exist(test):
    file, name = test.split("[")[0].split("::", 1)
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}; was it renamed?"


def test_the_cases_that_faults_are_given_exist():
    """With their parameters: pytest collects every one of them."""
    tests = sorted({fault.test for fault in PLANTED})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def test_every_equivalent_mutant_can_still_be_drawn():
    present = {mutant.key for _, files in mutation.SAMPLE.values() for file in files for mutant in mutation.mutants_of(file)}
    assert mutation.equivalents()
    assert set(mutation.equivalents()) <= present, "the code around these mutants has changed: judge them once more"
