# make setup | test | speedrun | check | records-readme. Override: PYTHON, VENV, TRACK, SEEDS, OPTIMS.
PYTHON ?= python3
VENV ?= .venv
TRACK ?= sotu
# 0: as many as the track's rule asks for.
SEEDS ?= 0
OPTIMS ?= adamw muon
RECORDS ?= records
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup setup-test test test-fast speedrun records-readme check format clean

setup: $(VENV)/.installed

setup-test: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

test: setup-test
	$(BIN)/python -m pytest

test-fast: setup-test
	$(BIN)/python -m pytest -m "not slow"

# train prepares the embedded corpus first and says so.
speedrun: setup
	@set -e; since=$$(date -u +%Y-%m-%dT%H:%M:%S); \
	for optim in $(OPTIMS); do \
		$(BIN)/nanorun train --track $(TRACK) --optim $$optim --seeds $(SEEDS) --records $(RECORDS); \
	done; \
	$(BIN)/nanorun report --track $(TRACK) --records $(RECORDS) --since $$since

# After a record was added, or a merge conflicted in it.
records-readme: setup
	$(BIN)/nanorun report --readme

check: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nanorun report --readme --check
	$(BIN)/python -m pytest -m "not slow"

format: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
