"""The launch files: a script that generates text with ONNX Runtime alone, and a Triton repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from qexport.export.launch import render_launch_files
from qexport.export.onnx.traced_cache import CacheTensor
from qexport.export.onnx.tracing import Cache, past_name, present_name

_TRITON_TYPES: Final = {torch.int64: "TYPE_INT64", torch.float32: "TYPE_FP32", torch.float16: "TYPE_FP16"}
_FREE: Final = -1
_TOKENS: Final = (_FREE, _FREE)


@dataclass(frozen=True)
class TritonValue:
    """One input or output of the graph, as config.pbtxt says it.

    Attributes:
        name: in the graph.
        dtype: of the tensor.
        dims: its axes, -1 where the size is free.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int, ...]

    @property
    def type(self) -> str:
        """Triton's name of the dtype."""
        return _TRITON_TYPES[self.dtype]


@dataclass(frozen=True)
class Figures:
    """What the launch files are made from.

    Attributes:
        name: of the model, as `qexport.export.launch.served_name` makes it.
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

    @property
    def inputs(self) -> list[TritonValue]:
        """The graph's inputs: tokens, their mask and positions, and the cache."""
        tokens = [TritonValue(name, torch.int64, _TOKENS) for name in ("input_ids", "attention_mask", "position_ids")]
        return tokens + [TritonValue(past_name(layer, each), each.dtype, _dims(each)) for layer, each in self._tensors]

    @property
    def outputs(self) -> list[TritonValue]:
        """The graph's outputs: logits, and the cache."""
        logits = TritonValue("logits", self.activations, (*_TOKENS, self.vocab_size))
        present = [TritonValue(present_name(layer, each), each.dtype, _dims(each)) for layer, each in self._tensors]
        return [logits, *present]

    @property
    def _tensors(self) -> list[tuple[int, CacheTensor]]:
        return [(layer, tensor) for layer, tensors in enumerate(self.cache) for tensor in tensors]


def launch_files(figures: Figures) -> dict[str, bytes]:
    """The content of the folder `launch`, by the name inside the artifact."""
    triton = f"triton/{figures.name}"
    templates = {
        "README.md": "README.md.jinja",
        f"{triton}/config.pbtxt": "config.pbtxt.jinja",
        f"{triton}/1/README.md": "place.md.jinja",
    }
    if figures.tokenizer:
        templates["generate.py"] = "generate.py.jinja"
    return render_launch_files("qexport.export.onnx", templates, figures)


def _dims(tensor: CacheTensor) -> tuple[int, ...]:
    return (_FREE, *(_FREE if size is None else size for size in tensor.shape))
