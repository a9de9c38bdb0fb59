#!/bin/sh
# Everything that one GPU is asked for, within ten minutes: see "On a GPU" in benchmarks/README.md. It builds and installs
# nothing; PYTHON names an environment with torch for CUDA, qexport and its extra `dev`.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
