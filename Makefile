# Two commands set up everything: `make quickstart` and `make test`. Both need only Python 3.10+, make and git.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARITY_PYTHON ?= python3.11
PARITY_VENV ?= .venv-parity
PARITY_SIZE ?= reduced
PARITY_PIP ?=  # more options for pip; on Linux without a GPU: --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: help quickstart test test-all parity sandbox docs clean

help:
	@echo "make quickstart   install into $(VENV) and train the sandbox policy (a few minutes, CPU is enough)"
	@echo "make test         install into $(VENV) and run the fast tests (a few minutes)"
	@echo "make test-all     install into $(VENV) and run the slow tests too: all that need neither a GPU nor a network"
	@echo "make parity       compare the reward scores with the upstream packages' own code (a second environment, Python 3.11)"
	@echo "make sandbox      train the sandbox's models anew (under an hour on two cores)"
	@echo "make docs         build the documentation site into build/site, strictly: a broken link is an error"
	@echo "make clean        remove the environments, runs, samples, scores and cross-evals"

quickstart: $(VENV)/.installed
	$(BIN)/tdpo train --preset quickstart

test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-all: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu and not network"

parity: $(VENV)/.installed-test $(PARITY_VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/parity/compare.py $(PARITY_VENV)/bin/python $(PARITY_SIZE)

sandbox: $(VENV)/.installed
	$(BIN)/python -m tdpo_cli.sandbox.build

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("tdpo needs Python 3.10 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $(VENV)/.installed $@

# Two repairs: the hpsv2 wheel lacks its vocabulary (open_clip has the same file), and image-reward does not say that it
# needs OpenAI's clip (the package index's `clip` is another one).
$(PARITY_VENV)/.installed: tests/parity/requirements.txt
	@$(PARITY_PYTHON) --version || { echo "make parity needs Python 3.11: set PARITY_PYTHON to one"; exit 1; }
	$(PARITY_PYTHON) -m venv --clear $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PARITY_PIP) -r $<
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps openai-clip==1.0.1
	cd $(PARITY_VENV)/lib/python3.11/site-packages && cp open_clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) runs samples scores cross-evals
