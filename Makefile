# make train | make test | make bench | make fuzz | make pretrain | make mutants | make soak | make clean
#
#   PYTHON=python3.12                  the Python that the environment is made from (3.10 or newer)
#   ARGS="training.iterations=5"       settings for `make train` and `make pretrain`, options for the others
#   TORCH_ARGS="--index-url URL"       where pip finds torch, such as a CPU-only build on Linux

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_MUTANTS := $(VENV)/.installed-mutants

.PHONY: help train test bench fuzz pretrain mutants soak install install-dev clean
.DEFAULT_GOAL := help

help:
	@echo "make train     train the embedded model and write a report (ARGS=\"training.iterations=5\" changes settings)"
	@echo "make test      the whole test suite, the linter and the type checker"
	@echo "make bench     seconds per iteration, stage by stage"
	@echo "make fuzz      20,000 damaged image files and manifests: each must be read, or refused in one sentence"
	@echo "make pretrain  train the weights of the embedded model from scratch (about two hours); re-run to resume"
	@echo "make mutants   can the tests fail? they are run on a sample of small changes of the source (about an hour)"
	@echo "make soak      2,000 of the smallest iterations: does memory stay flat? (about ten minutes)"
	@echo "make clean     remove $(VENV) and caches; runs/ stays"

train: $(INSTALLED)
	@$(BIN)/cgrpo train $(ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	@$(BIN)/python -m customized_grpo.benchmark $(ARGS)

fuzz: $(INSTALLED)
	@$(BIN)/python tools/fuzz.py $(ARGS)

pretrain: $(INSTALLED)
	@$(BIN)/python -m tools.pretrain $(ARGS)

mutants: $(INSTALLED_MUTANTS)
	@$(BIN)/python tools/mutants $(ARGS)

soak: $(INSTALLED)
	@$(BIN)/python tools/soak.py $(ARGS)

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment stays as it is until what it is made from changes. torch comes first and alone: it is the big one.
$(CREATED):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "'$(PYTHON)' was not found; install Python 3.10 or newer, or name yours: make PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without the venv module; install it (Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V 2>&1)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing torch (the first time this takes a few minutes)"
	@$(PIP) install -qq --constraint constraints.txt $(TORCH_ARGS) torch
	@echo "Installing customized-grpo and what it needs"
	@$(PIP) install -qq --constraint constraints.txt --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing the test tools"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(INSTALLED_MUTANTS): $(INSTALLED_DEV)
	@echo "Installing mutmut"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[dev,mutants]'
	@touch $@
