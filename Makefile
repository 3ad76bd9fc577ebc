# Two commands do everything on a fresh machine with Python 3.11: `make train` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup train test test-slow test-chaos lint report

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m blpo_rllib.train cartpole --stop-timesteps 100000

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Ten minutes; CHAOS_SECONDS=90 make test-chaos for a first look.
test-chaos: $(STAMP)
	$(BIN)/python -m pytest -m chaos --capture=no

# Figures and tables from the runs in studies/comparison/results, and the table in README.md.
report: $(STAMP)
	$(BIN)/python -m studies.comparison.report --readme README.md

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
