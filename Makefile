# make demo    install into .venv and run a sweep of 20 trials (about two minutes of training)
# make test    install, with everything the tests need, and run them all
# make check   format, lint, types and the fast tests; under a minute

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -q -n 2

.PHONY: demo test check install clean

demo: $(VENV)/.installed
	$(BIN)/python -m sweeper launch +sweep=simple

test: $(VENV)/.installed-dev
	$(PYTHON) slurm/testbed/install || echo "no SLURM: the tests that need one are skipped, and say why"
	$(PYTEST) -n 3 --dist worksteal -p no:cacheprovider

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check sweeper train conf tests bench examples slurm
	$(BIN)/ruff check sweeper train conf tests bench examples slurm
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info
