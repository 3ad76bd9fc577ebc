# `make` lists what there is to make; everything but `help` and `clean` sets up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup train test test-slow test-conformance test-chaos report format lint private-names docs build clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with everything that the other targets use

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# An interrupted run goes on. No mean return exceeds 500: the number of steps is what ends it.
train: $(STAMP)  ## BLPO on CartPole-v1: a checkpoint, a results file, a learning curve
	$(BIN)/python -m blpo_rllib.train cartpole --stop-timesteps 100000 --stop-reward 501 --output results/cartpole --resume

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that train for minutes
	$(BIN)/python -m pytest -m slow

test-conformance: $(STAMP)  ## RLlib's example scripts with BLPO in PPO's place; more than half an hour
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[conformance]"
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_conformance.py

# CHAOS_SECONDS=90 make test-chaos for a first look.
test-chaos: $(STAMP)  ## ten minutes of faults
	$(BIN)/python -m pytest -m chaos --capture=no

report: $(STAMP)  ## the comparison's tables and figures from the runs in studies/comparison/results
	$(BIN)/python -m studies.comparison.report --pages studies/comparison --readme README.md

format: $(STAMP)  ## formats the code and mends what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)  ## format, lint and types, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

private-names: $(STAMP)  ## private names of Ray that the package uses
	$(BIN)/python tests/private_names.py

docs: $(STAMP)  ## the site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(STAMP)  ## wheel and source distribution in dist/
	rm -rf build dist
	$(BIN)/python -m build

clean:  ## removes what was built and cached; .venv and results stay
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
