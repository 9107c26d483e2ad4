# `make demo` and `make test` are all the set-up there is: each makes .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-slow test-cluster lint format clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/python -m examples.demo.run

# Two processes, each with one thread: most tests wait or use one core. A file stays in one of them.
test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow

# Three hosts on this machine, made of network namespaces: needs root, iproute2 and util-linux, and skips without.
test-cluster: .venv/.ready
	$(BIN)/python -m pytest -m cluster tests/cluster -s

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
