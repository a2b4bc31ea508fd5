PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.demo
	$(BIN)/realign demo --out runs/demo

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.test
	REALIGN_EXAMPLES=5000 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(wildcard csrc/*)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[pipeline,report]"
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[pipeline,report,test]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
