"""The launch files: a script that generates text with ONNX Runtime alone, and a Triton repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from qexport.export.onnx.traced_cache import CacheTensor
from qexport.export.onnx.tracing import Cache, past_name, present_name

FOLDER: Final = "launch"
SCRIPT: Final = "generate.py"

_TRITON_TYPES: Final = {torch.int64: "TYPE_INT64", torch.float32: "TYPE_FP32", torch.float16: "TYPE_FP16"}
_FREE: Final = -1


@dataclass(frozen=True)
class Figures:
    """What the launch files are made from.

    Attributes:
        name: of the model, as `qexport.export.vllm.launch.served_name` makes it.
        cache: what each layer keeps.
        activations: the dtype of the logits.
        vocab_size: tokens of the logits.
        data_files: the files with the weights, as model.onnx names them.
        ends: the tokens that end a text.
        tokenizer: whether the folder has a tokenizer.json, without which there is no script.
    """

    name: str
    cache: Cache
    activations: torch.dtype
    vocab_size: int
    data_files: Sequence[str]
    ends: tuple[int, ...]
    tokenizer: bool


def launch_files(figures: Figures) -> dict[str, bytes]:
    """The content of the folder `launch`, by the name inside the artifact."""
    triton = f"triton/{figures.name}"
    files = {
        "README.md": _readme(figures),
        f"{triton}/config.pbtxt": _triton_config(figures),
        f"{triton}/1/README.md": "`model.onnx/`, with the graph and its weights, goes here: see `launch/README.md`.\n",
    }
    if figures.tokenizer:
        files[SCRIPT] = _SCRIPT.replace("set()", _set(figures.ends))
    return {f"{FOLDER}/{name}": text.encode("utf-8") for name, text in files.items()}


def _set(tokens: tuple[int, ...]) -> str:
    return f"{{{', '.join(map(str, tokens))}}}" if tokens else "set()"


_SCRIPT: Final = '''\
"""Continues a text, the likeliest token each time: python launch/generate.py "TEXT" [TOKENS]."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

folder, ends = Path(__file__).resolve().parent.parent, set()
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.no_truncation(), tokenizer.no_padding()  # of training, if the file has them
providers = [name for name in ort.get_available_providers() if name.startswith(("CUDA", "CPU"))]
session = ort.InferenceSession(str(folder / "model.onnx"), providers=providers)
device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
cache = {}
for value in session.get_inputs()[3:]:
    shape = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
    dtype = np.float16 if value.type == "tensor(float16)" else np.float32
    cache[value.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))

tokens, new, answer = [], tokenizer.encode(" ".join(sys.argv[1:2])).ids, []
new or sys.exit(__doc__)
while len(answer) < (int(sys.argv[2]) if len(sys.argv) > 2 else 128):
    tokens += new
    binding = session.io_binding()
    binding.bind_cpu_input("input_ids", np.array([new], np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, len(tokens)), np.int64))
    binding.bind_cpu_input("position_ids", np.arange(len(tokens) - len(new), len(tokens), dtype=np.int64)[None])
    for name, value in cache.items():
        binding.bind_ortvalue_input(name, value)
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu" if value.name == "logits" else device)
    session.run_with_iobinding(binding)
    logits, *present = binding.get_outputs()
    cache, new = dict(zip(cache, present)), [int(logits.numpy()[0, -1].argmax())]
    if new[0] in ends:
        break
    answer += new
print(tokenizer.decode(answer))
'''


def _triton_config(figures: Figures) -> str:
    layers = [(layer, tensor) for layer, tensors in enumerate(figures.cache) for tensor in tensors]
    free = [_FREE, _FREE]
    inputs = [_value(name, torch.int64, free) for name in ("input_ids", "attention_mask", "position_ids")]
    inputs += [_value(past_name(layer, tensor), tensor.dtype, _dims(tensor)) for layer, tensor in layers]
    outputs = [_value("logits", figures.activations, [*free, figures.vocab_size])]
    outputs += [_value(present_name(layer, tensor), tensor.dtype, _dims(tensor)) for layer, tensor in layers]
    return (
        f'backend: "onnxruntime"\nmax_batch_size: 0\n\ninput [\n{_joined(inputs)}]\n\noutput [\n{_joined(outputs)}]\n'
    )


def _value(name: str, dtype: torch.dtype, dims: Sequence[int]) -> str:
    sizes = ", ".join(map(str, dims))
    return f'  {{\n    name: "{name}"\n    data_type: {_TRITON_TYPES[dtype]}\n    dims: [ {sizes} ]\n  }}'


def _dims(tensor: CacheTensor) -> list[int]:
    return [_FREE, *(_FREE if size is None else size for size in tensor.shape)]


def _joined(values: Sequence[str]) -> str:
    return ",\n".join(values) + "\n"


def _readme(figures: Figures) -> str:
    inside = f"REPOSITORY/{figures.name}/1/model.onnx"
    return f"""\
# Running this folder with ONNX Runtime

{_WITH_SCRIPT if figures.tokenizer else _WITHOUT_SCRIPT}
## Triton

`launch/triton` is a model repository for Triton's onnxruntime backend, without the model. The backend opens a model of
several files as a folder named `model.onnx`. ONNX Runtime finds the weights beside the graph, but not behind symbolic
links that lead out of that folder. REPOSITORY stands for a folder outside of this one, whose manifest allows no further
files:

    mkdir -p {inside} && cp -r launch/triton/. REPOSITORY
    cp {" ".join(["model.onnx", *figures.data_files])} {inside}

On one disk, `ln` in place of the second `cp` takes no space. But the package onnx refuses weights whose file has two
names, and would no longer open this folder either; ONNX Runtime does.

    docker run --rm --gpus all -p 8000:8000 -v REPOSITORY:/models:ro \\
        nvcr.io/nvidia/tritonserver:VERSION-py3 tritonserver --model-repository /models

Requests name the model `{figures.name}`. They carry tokens, not text, and the cache: the first one sends
`past_key_values.*` with an axis of size 0 for the tokens (zeros where the size is fixed), each further one what the
last one answered as `present.*`. The batch is the first axis; short prompts are filled up on the left, with zeros in
`attention_mask`.
"""


_WITH_SCRIPT: Final = f"""\
    python launch/{SCRIPT} "Once upon a time" 64

continues a text with the packages onnxruntime, numpy and tokenizers; with onnxruntime-gpu in place of the first, on the
GPU. It takes the likeliest token each time and stops where the model ends a text.
"""
_WITHOUT_SCRIPT: Final = "There is no script: this folder has no tokenizer.json.\n"
