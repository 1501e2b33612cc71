# Everything runs in .venv, which is made once and again when the project's dependencies change.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench ledger clean

demo: .venv/.demo
	$(BIN)/stillroom run kd --out runs/demo

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

bench: .venv/.test
	$(BIN)/python -m bench

ledger: .venv/.test
	$(BIN)/stillroom ledger

.venv/.base: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/.demo: .venv/.base pyproject.toml
	$(PIP) -e .
	touch $@

.venv/.test: .venv/.base pyproject.toml
	$(PIP) -e '.[test]'
	touch $@ .venv/.demo

clean:
	rm -rf .venv runs
