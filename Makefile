# Every target sets up what it needs in .venv on first use. `make demo PYTHON=python3.12` picks another Python.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BASE := $(VENV)/.base
TEST := $(VENV)/.test
DEV := $(VENV)/.dev
NATIVE := $(VENV)/.native

.PHONY: demo test test-all check kernels bench

demo: $(NATIVE)
	$(VENV)/bin/seqzoo demo

test: $(TEST)
	$(VENV)/bin/python -m pytest -n 2

test-all: $(TEST)
	$(VENV)/bin/python -m pytest -n 2 -m "not gpu"

check: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

kernels: $(TEST)
	$(VENV)/bin/python scripts/compile_kernels.py --target sm_80 sm_90 --quick

bench: $(TEST)
	$(VENV)/bin/python scripts/bench.py

$(BASE): pyproject.toml constraints.txt hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

# Installing has built the kernels; after a change of their sources what changed is compiled again.
$(NATIVE): $(BASE) $(wildcard seqzoo/kernels/*/*.cpp seqzoo/kernels/*/*.h) seqzoo/kernels/native/build.py
	$(VENV)/bin/python seqzoo/kernels/native/build.py
	touch $@

$(TEST): $(NATIVE)
	$(PIP) -e ".[test]"
	touch $@

$(DEV): $(BASE)
	$(PIP) -e ".[dev]"
	touch $@
