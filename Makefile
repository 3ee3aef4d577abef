# make train | make test | make bench | make speed | make fuzz | make pretrain | make mutants | make soak | make nodes | make lowest | make clean
#
#   PYTHON=python3.12                  Python used to create the environment (3.10 or newer)
#   ARGS="training.iterations=5"       settings for `make train` and `make pretrain`, options for the others
#   BASELINE=COMMIT                    what `make speed` compares with
#   TORCH_ARGS="--index-url URL"       pip arguments for torch, such as the index of a CPU-only build

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BASELINE ?= HEAD~1
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_MUTANTS := $(VENV)/.installed-mutants
LOWEST := .venv-lowest
INSTALLED_LOWEST := $(VENV)/.installed-lowest
# Without test_decode.py, because Pillow before 12.4 corrupts memory when it writes the damaged TIFF images of that file.
LOWEST_TESTS := tests/cli tests/policies tests/store tests/studies \
  $(filter-out %/test_decode.py %/test_dino.py,$(wildcard tests/data/test_*.py tests/rewards/test_*.py))

.PHONY: help train test bench speed fuzz pretrain mutants soak nodes lowest install install-dev clean
.DEFAULT_GOAL := help

help:
	@echo "make train     train the embedded model and write a report (ARGS=\"training.iterations=5\" changes settings)"
	@echo "make test      run all tests, the linter and the type checker"
	@echo "make bench     measure the seconds per iteration of each stage"
	@echo "make speed     compare the CPU seconds of an iteration with those of the commit BASELINE, the one before this"
	@echo "make fuzz      give 20,000 damaged files and 1,900 bad command lines; each must be read or refused in one sentence"
	@echo "make pretrain  train the weights of the embedded model from scratch (about two hours); re-run to resume"
	@echo "make mutants   mutation testing: run the tests on a sample of small source changes (about an hour)"
	@echo "make soak      check for memory leaks in 2,000 small iterations (about ten minutes)"
	@echo "make nodes     train on two nodes in network namespaces, without a shared file system (Linux, root)"
	@echo "make lowest    install the lowest versions that pyproject.toml allows into $(LOWEST), and try them"
	@echo "make clean     remove $(VENV), $(LOWEST) and caches, but not runs/"

train: $(INSTALLED)
	@$(BIN)/cgrpo train $(ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: $(INSTALLED)
	@$(BIN)/python -m tools.speed $(ARGS)

speed: $(INSTALLED)
	@$(BIN)/python -m tools.speed --baseline $(BASELINE) $(ARGS)

fuzz: $(INSTALLED)
	@$(BIN)/python tools/fuzz.py $(ARGS)
	@$(BIN)/python tools/bad_input.py

pretrain: $(INSTALLED)
	@$(BIN)/python -m tools.pretrain $(ARGS)

mutants: $(INSTALLED_MUTANTS)
	@$(BIN)/python tools/mutants $(ARGS)

soak: $(INSTALLED)
	@$(BIN)/python tools/soak.py $(ARGS)

nodes: $(INSTALLED)
	@tools/two_nodes.sh $(BIN)/python $(ARGS)

lowest:
	@$(MAKE) --no-print-directory VENV=$(LOWEST) $(LOWEST)/.installed-lowest
	@cat $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pytest -n auto --dist worksteal -o filterwarnings=default $(or $(ARGS),$(LOWEST_TESTS))

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

clean:
	rm -rf $(VENV) $(LOWEST) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is rebuilt only if its inputs change. torch is installed first, because it is the largest package.
$(CREATED):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "'$(PYTHON)' was not found; install Python 3.10 or newer, or set its path: make PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); choose another: make PYTHON=python3.12."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module; install it (Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V 2>&1)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing torch (the first time this takes a few minutes)"
	@$(PIP) install -qq --constraint constraints.txt $(TORCH_ARGS) torch
	@echo "Installing customized-grpo and its dependencies"
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

$(INSTALLED_LOWEST): pyproject.toml constraints.txt tools/lowest.py | $(CREATED)
	@echo "Installing torch (the first time this takes a few minutes)"
	@$(PIP) install -qq --constraint constraints.txt $(TORCH_ARGS) torch
	@echo "Installing customized-grpo and the lowest versions of its other dependencies"
	@$(PIP) install -qq --no-deps --editable .
	@$(BIN)/python tools/lowest.py > $(VENV)/lowest.txt
	@grep -E '^(hypothesis|pytest[a-z-]*)==' constraints.txt >> $(VENV)/lowest.txt
	@$(PIP) install -qq --constraint $(VENV)/lowest.txt --editable '.[bench,data,masks,quantized]' \
	  hypothesis pytest pytest-timeout pytest-xdist
	@touch $@
