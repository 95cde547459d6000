# Two commands: `make train` (trains, evaluates, draws and saves an adapter) and `make test` (the whole suite).
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test
train: $(VENV)/installed
	$(BIN)/accelerate launch recipes/train.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(ARGS)

# PyTorch first and alone, at the exact pin: any later resolution then finds it in place.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --constraint constraints.txt --editable ".[test]"
	touch $@
