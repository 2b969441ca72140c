# Two commands, each doing all its set-up on a bare machine with Python >= 3.11 and pip:
#   make quickstart   install into .venv and run the default suite (about three minutes on two cores)
#   make test         install with the development tools, then lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# waiting OpenMP threads must sleep, not spin: spinning costs 10 to 200 times beside other work
export OMP_WAIT_POLICY := PASSIVE

.PHONY: quickstart test lint types clean

quickstart: $(VENV)/.installed
	$(BIN)/metabench run

# one torch thread in the tests: their tensors are tiny (workers that they start set their own); a process for each core, up to
# four, for no test decides by a time
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("metabench needs Python 3.11 or newer; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist
