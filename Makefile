# Two commands for everybody: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-portable lint format docs bench clean

help:
	@echo "make demo    run the quickstart: immunize a small model, audit it, write the report"
	@echo "make test    run the tests"
	@echo "make test-portable  run those that train, on other instruction sets and with one and two threads (fifty minutes)"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff format the code"
	@echo "make docs    build the documentation into site/"
	@echo "make bench   measure speed and memory ratios into benchmarks/results.json"
	@echo "make clean   remove the environment and everything that was made"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Holdfast needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/holdfast run quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-portable: $(VENV)/.installed-dev
	$(BIN)/python tests/portable.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/suppression_loop.py
	$(BIN)/python benchmarks/suppression_memory.py
	$(BIN)/python benchmarks/spectral.py
	$(BIN)/python benchmarks/audit.py

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
