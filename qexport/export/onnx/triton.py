"""The inputs and outputs of a graph, as Triton is told of them."""

from __future__ import annotations

from typing import Final

import torch

from qexport.export.onnx.launch import TritonValue
from qexport.export.onnx.traced_cache import CacheTensor
from qexport.export.onnx.tracing import Cache, past_name, present_name

_TYPES: Final = {torch.int64: "TYPE_INT64", torch.float32: "TYPE_FP32", torch.float16: "TYPE_FP16"}
_FREE: Final = -1
_TOKENS: Final = [_FREE, _FREE]


def triton_inputs(cache: Cache) -> list[TritonValue]:
    """Tokens, their mask and positions, and the cache."""
    tokens = [_value(name, torch.int64, _TOKENS) for name in ("input_ids", "attention_mask", "position_ids")]
    return tokens + [_value(past_name(layer, each), each.dtype, _dims(each)) for layer, each in _tensors(cache)]


def triton_outputs(cache: Cache, activations: torch.dtype, vocab_size: int) -> list[TritonValue]:
    """Logits, and the cache.

    Args:
        cache: the tensors of each layer's cache.
        activations: the dtype of the logits.
        vocab_size: logits per token.
    """
    logits = _value("logits", activations, [*_TOKENS, vocab_size])
    return [
        logits,
        *(_value(present_name(layer, each), each.dtype, _dims(each)) for layer, each in _tensors(cache)),
    ]


def _value(name: str, dtype: torch.dtype, dims: list[int]) -> TritonValue:
    return TritonValue(name=name, type=_TYPES[dtype], dims=dims)


def _tensors(cache: Cache) -> list[tuple[int, CacheTensor]]:
    return [(layer, tensor) for layer, tensors in enumerate(cache) for tensor in tensors]


def _dims(tensor: CacheTensor) -> list[int]:
    return [_FREE, *(_FREE if size is None else size for size in tensor.shape)]
