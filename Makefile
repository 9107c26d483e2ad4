# `make demo` and `make test` are all the set-up there is: each makes .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-slow lint format clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/python -m examples.demo.run

test: .venv/.ready
	$(BIN)/python -m pytest

test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
