# Two commands set up everything: `make quickstart` and `make test`. Both need only Python 3.10+, make and git.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test sandbox clean

help:
	@echo "make quickstart   install into $(VENV) and train the sandbox policy (a few minutes, CPU is enough)"
	@echo "make test         install into $(VENV) and run the tests"
	@echo "make sandbox      train the sandbox's models anew (under an hour on two cores)"
	@echo "make clean        remove $(VENV), runs and samples"

quickstart: $(VENV)/.installed
	$(BIN)/tdpo train --preset quickstart

test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

sandbox: $(VENV)/.installed
	$(BIN)/python -m tdpo_cli.sandbox.build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("tdpo needs Python 3.10 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) runs samples
