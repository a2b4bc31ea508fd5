PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := pipeline,report,browse,endpoint,retrieval,docs,test
BIN := $(VENV)/bin

# idle processes take tests from the end of the longer queue
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

.PHONY: demo docs test test-full test-slow test-oldest test-browser test-peers lint clean

demo: $(VENV)/.demo
	$(BIN)/realign demo --out runs/demo

test: $(VENV)/.test lint
	REALIGN_EXAMPLES=50 $(PYTEST) -m "not full and not slow and not browser"

# what `test` leaves out
test-full: $(VENV)/.test
	$(PYTEST) -m "(full or drawn) and not slow and not browser"

test-slow: $(VENV)/.test
	REALIGN_EXAMPLES=5000 $(PYTEST) -m "not browser"

# with the oldest versions that the metadata allows, on Python 3.11; Triton 3.6's interpreter warns of NumPy 2
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.test
	PYTEST_ADDOPTS='-W "ignore:Conversion of an array with ndim:DeprecationWarning"' REALIGN_EXAMPLES=50 \
		.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not browser"

test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest -m browser

# tests of another library, from a folder of it: docs/guides/trainers/other-heads.md
test-peers: $(VENV)/.test
	$(BIN)/python -m tests.peers $(PEER) $(if $(SOURCE),"$(SOURCE)")

# the site, in build/site
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(wildcard csrc/*)

$(VENV)/.demo: $(BIN)/python pyproject.toml $(CONSTRAINTS) $(NATIVE)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[pipeline,report]"
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml $(CONSTRAINTS) $(NATIVE)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

$(VENV)/.browser: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[$(EXTRAS),browser]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build dist
