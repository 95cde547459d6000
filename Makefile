# Two commands: `make train` (trains, evaluates, draws and saves an adapter) and `make test` (the whole suite).
# Tests run in two processes of one thread each; `make test WORKERS=8` in more.
# `make test-versions` runs the suite with other versions of Python, PEFT and transformers.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test test-versions
train: $(VENV)/installed
	$(BIN)/accelerate launch recipes/train.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# Python, and the versions that it gets; an interpreter that is not here is left out, and said so.
AXES ?= 3.10:constraints-transformers-oldest.txt 3.11:constraints-peft-oldest.txt 3.12:constraints.txt 3.13:constraints.txt
test-versions:
	for axis in $(AXES); do \
	  python=python$${axis%%:*}; \
	  $$python --version || { echo "LEFT OUT: $$axis, there is no $$python"; continue; }; \
	  rm -rf .venv-$${axis%%:*}; \
	  $(MAKE) test VENV=.venv-$${axis%%:*} PYTHON=$$python CONSTRAINTS=$${axis#*:} || exit 1; \
	done

# PyTorch first and alone, at the exact pin: any later resolution then finds it in place.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(PIP) --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $@
