# Needs python3 with venv and pip, and make. Everything else is installed into .venv by the first target that needs it.
#   make demo [IMAGE=disk.qcow2]   make test [PYTEST_ARGS="-k header"]   make check   make bench   make crash
#   make fuzz   make soak   make siege   make journey   make man   make guest [GUEST_ARGS="--rounds 5 --seed 1"]

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
BENCH_ARGS ?=
CRASH_ARGS ?= --budget 600
GUEST_ARGS ?=
FUZZ_ARGS ?= --seconds 600
SOAK_ARGS ?= --seconds 1800
SIEGE_ARGS ?= --seconds 60
IMAGE ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint check bench fuzz soak siege journey man crash guest format clean

help:
	@sed -n '2,3s/^# *//p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

# Again only when pyproject.toml changed: the code itself is installed in place.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python demo/demo.py $(IMAGE)

test: $(STAMP)
	@bash scripts/judges.sh
	$(BIN)/python -m pytest -n 2 -rs $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m bench $(BENCH_ARGS)

fuzz: $(STAMP)
	$(BIN)/python -m fuzz $(FUZZ_ARGS)

soak: $(STAMP)
	$(BIN)/python -m soak $(SOAK_ARGS)

siege: $(STAMP)
	$(BIN)/python -m soak.siege $(SIEGE_ARGS)

man: $(STAMP)
	$(BIN)/python scripts/man.py build/man

journey: $(STAMP)
	COWFENCE_JOURNEY=/usr $(BIN)/python -m pytest -rs tests/interop/test_journey.py

crash: $(STAMP)
	$(BIN)/cowfence crash explore $(CRASH_ARGS)

guest: $(STAMP)
	$(BIN)/python -m guest $(GUEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist demo-work guest-work
