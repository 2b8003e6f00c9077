# make demo and make test need git, make and Python >= 3.11, and nothing else: the first run sets up .venv.
# The interpreter is python3 if it is new enough, else the newest of those below; choose by hand with PYTHON=/path/to/python.

PYTHON ?=
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-torch test-versions mutants fuzz kills lint docs gpu clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## */  make \1	/p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## the environment alone (.venv)

$(STAMP): pyproject.toml
	@set -eu; \
	usable() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	python=; \
	for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if usable "$$candidate"; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python >= 3.11 found; install one and say make PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "error: $$python cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; fi; \
	echo "setting up $(VENV) with $$("$$python" --version) (one to several minutes, once)"; \
	"$$python" -m venv "$(VENV)"; \
	"$(BIN)/python" -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## the main job on generated data: train, evaluate, one picture
	@$(BIN)/rplib demo

# One thread a worker: two workers that each start a thread per core only wait for one another.
test: $(STAMP)  ## the test suite, without the tests marked slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)  ## the test suite and the tests marked slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

# An environment of its own, below build/; the development pins of torch and Triton do not hold in it.
# The interpreter of Triton 3.4, which comes with torch 2.8, does not work with NumPy 2.4.
TORCH     ?= torch
TORCH_ENV := build/torch-env
test-torch: $(STAMP)  ## the loss and the trainer with another torch: make test-torch TORCH="torch==2.8.0 numpy<2.4"
	@rm -rf $(TORCH_ENV)
	@$(BIN)/python -m venv $(TORCH_ENV)
	@$(TORCH_ENV)/bin/python -m pip install -qq --disable-pip-version-check -e '.[reference]' $(TORCH:%='%') \
	  expecttest hypothesis pytest pytest-timeout pytest-xdist setuptools
	@$(TORCH_ENV)/bin/python -c "import torch; print('torch', torch.__version__)"
	@OMP_NUM_THREADS=1 $(TORCH_ENV)/bin/python -m pytest -n auto --maxprocesses 4 -m "not slow" $(PYTEST_ARGS) \
	  tests/test_loss_*.py tests/test_reference_*.py tests/test_package_network.py

# The oldest and the newest release that pyproject.toml allows of each package of the trainer, one environment after the other,
# with the torch that is here (no second one is downloaded).
VERSIONS       ?= lowest newest
VERSIONS_TESTS ?= tests/test_reference_*.py tests/test_own_data.py
test-versions: $(STAMP)  ## the trainer with the oldest and the newest packages that it allows
	@set -e; for which in $(VERSIONS); do \
	  $(BIN)/python tests/extra_versions.py $$which build/$$which-env; \
	  OMP_NUM_THREADS=1 build/$$which-env/bin/python -m pytest -n auto --maxprocesses 4 -m "not slow" $(PYTEST_ARGS) \
	    $(VERSIONS_TESTS); \
	done

# Minutes to hours; what was run before is not run again (build/mutants.jsonl). A sample is part of make test-all.
mutants: $(STAMP)  ## do the tests bite? 300 mutants drawn at random, and which survive
	@$(BIN)/python tests/mutation.py $(MUTANTS_ARGS)

fuzz: $(STAMP)  ## 2,000 damaged files of each format, and 10,000 random problems of the loss
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_files.py --files 2000
	@OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS) \
	  tests/test_loss_properties.py

kills: $(STAMP)  ## commands that are killed, interrupted, out of room, robbed of files or doubled at random moments
	@OMP_NUM_THREADS=1 $(BIN)/python tests/kill_runs.py --runs 50

lint: $(STAMP)  ## ruff (rules and format), mypy, pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# pdoc looks at names that are there; those of rplib come on first use.
docs: $(STAMP)  ## the API pages, from the docstrings: build/docs/index.html
	@$(BIN)/python -W error -c 'import pdoc.__main__ as pages, rplib; [getattr(rplib, name) for name in rplib.__all__]; pages.cli()' --docformat google --no-show-source --output-directory build/docs rplib

# GPU_ARGS="--data DATA --minutes 30" also trains; what succeeded is not run again.
gpu: $(STAMP)  ## everything that needs a CUDA GPU (with a torch built for it): tests, checks, benchmarks
	@$(BIN)/python -m rplib.bench.gpu $(GPU_ARGS)

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
