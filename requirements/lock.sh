#!/bin/sh
# Writes the locks; `make lock` calls it. Usage: lock.sh UV [OPTION...]
# Without an option the versions in the locks stay where they still fit; with --upgrade all move.
set -eu
cd "$(dirname "$0")/.."
uv=$1
shift
options=$*

compile() { # NAME, then what goes into the lock
    lock=requirements/$1.txt
    shift
    # shellcheck disable=SC2086 # options are words
    "$uv" --config-file requirements/uv.toml pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --no-emit-package torch --constraint requirements/torch.txt $options \
        --output-file "$lock" "$@"
    cat requirements/header.txt "$lock" > "$lock.new"
    mv "$lock.new" "$lock"
}

extra() { # the requirements of one extra, without those of qexport
    sed -n "s/^$1 = \[\"\(.*\)\"\]\$/\1/p" pyproject.toml
}

compile dev --extra dev --extra onnx --extra ray --extra release pyproject.toml requirements/tests.in
compile tasks --extra dev --extra tasks pyproject.toml requirements/tests.in
compile mlflow --extra dev --extra mlflow pyproject.toml
compile genai requirements/genai.in
compile llama requirements/llama.in
compile fuzz requirements/fuzz.in
compile gemma --no-deps requirements/gemma.in
compile launch requirements/launch.in
BUILD_CUDA_EXT=0 compile readers requirements/readers.in
extra docs | compile docs -
