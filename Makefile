# Every target sets up what it needs in .venv on first use. `make demo PYTHON=python3.12` picks another Python.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BASE := $(VENV)/.base
TEST := $(VENV)/.test
DEV := $(VENV)/.dev

.PHONY: demo test test-all check bench

demo: $(BASE)
	$(VENV)/bin/seqzoo demo

test: $(TEST)
	$(VENV)/bin/python -m pytest -n 2

test-all: $(TEST)
	$(VENV)/bin/python -m pytest -n 2 -m "not gpu"

check: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: $(BASE)
	$(VENV)/bin/python scripts/bench.py

$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(TEST): $(BASE)
	$(PIP) -e ".[test]"
	touch $@

$(DEV): $(BASE)
	$(PIP) -e ".[dev]"
	touch $@
