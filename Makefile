# make setup   a virtual environment in .venv, with the versions of constraints.txt
# make demo    the main job on a real model: five minutes on two CPU cores with bfloat16 instructions
# make test    every test
# make check   lint, types, and the tests that take seconds
# make docs    the documentation site, into site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: setup demo test check quick lint format-check types docs format clean

setup: $(INSTALLED)

# torch comes first and pinned: asked for by name alone, pip would take its newest build, with gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "folora-q needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV) (about two minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/folora-q train recipes/demo.yaml --overwrite

# Lint, and the tests that need no training, in two lanes.
check: setup
	@$(MAKE) --no-print-directory -j2 format-check types quick docs

quick: setup
	@$(BIN)/python -m pytest tests/core tests/rules tests/recipe tests/memory tests/docs tests/architecture_test.py

# Two processes, whatever the machine: each holds a torch, and files of tests share their models.
test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: format-check types docs

format-check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/basedpyright --level error

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs site
