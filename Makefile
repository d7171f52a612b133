# `make demo` and `make test` set up their own virtual environment in .venv on first use.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-all check bench
.NOTPARALLEL:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(STAMP) ## train a hybrid on real text, then measure it and draw the pictures (runs/demo)
	$(VENV)/bin/seqzoo demo

test: $(STAMP) ## all tests that take seconds
	$(VENV)/bin/python -m pytest -n 2

test-all: $(STAMP) ## the slow ones too
	$(VENV)/bin/python -m pytest -n 2 -m 'not gpu'

check: $(STAMP) ## what CI runs besides the tests: style and types
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: $(STAMP) ## speed and memory of operators, layers and decoding on this machine
	$(VENV)/bin/python scripts/bench.py
