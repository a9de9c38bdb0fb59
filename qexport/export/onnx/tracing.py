"""A model's graph, traced once, without weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.lazy_model import compute_buffers
from qexport.architectures.naming import Naming
from qexport.errors import CompatibilityError, QexportError
from qexport.export.onnx.interception import intercepted, refuse_dynamic_frequencies
from qexport.export.onnx.nodes import compute_in_float32, simplify
from qexport.export.onnx.traced_cache import CacheTensor, Handover, TracedCache, cache_tensors

OPSET: Final = 21
"""The version of ONNX's operators."""

MINIMUM_RUNTIME: Final = "1.24"
"""The oldest ONNX Runtime with which these graphs were tested."""

NARROW_2_BIT_RUNTIME: Final = "1.31"
"""The same for 2-bit codes with float16 inputs, which 1.24 refuses; versions in between were not tested."""

_SAMPLE: Final = {"batch": 3, "sequence": 7, "past": 5}
"""No size is 0 or 1, which torch.export would take for constants, or the sum of the two others."""

PAST: Final = "past_key_values."
"""What the names of the graph's inputs for the cache begin with."""

Cache = Sequence[tuple[CacheTensor, ...]]


@dataclass(frozen=True)
class Trace:
    """A model's graph.

    Attributes:
        model: the graph. Its inputs are tokens, mask, positions and the cache, then the model's parameters, under their
            names in files, in the activations' dtype. Linears, attention, rotary embeddings and scans are nodes of
            `qexport.export.onnx.nodes`.
        cache: the tensors of each layer's cache.
    """

    model: ir.Model
    cache: Cache


def layer_caches(architecture: Architecture, activations: torch.dtype) -> Cache:
    """The tensors of each layer's cache.

    Raises:
        CompatibilityError: see `cache_tensors` and `refuse_dynamic_frequencies`.
    """
    with _trace_errors(architecture.config):
        return cache_tensors(_built(architecture, activations))


def trace(architecture: Architecture, activations: torch.dtype) -> Trace:
    """The graph of a model.

    Parameters are fake tensors and never allocated, so memory and time grow with the number of layers, not with their
    size.

    Args:
        architecture: the model's.
        activations: what the model computes in.

    Raises:
        CompatibilityError: see `layer_caches`; or the family's forward cannot be traced.
    """
    with _trace_errors(architecture.config):
        model, naming = _built(architecture, activations), architecture.naming
        cache = cache_tensors(model)
        compute_buffers(model, torch.device("cpu"))
        traced = _exported(model, cache)
        _name_inputs_and_outputs(traced.graph, cache)
        _parameters_to_inputs(traced.graph, naming)
        simplify(traced)
        compute_in_float32(traced.graph)
    return Trace(traced, cache)


def _exported(model: PreTrainedModel, cache: Cache) -> ir.Model:
    mode, handover = FakeTensorMode(allow_non_fake_inputs=True), Handover()
    _make_fake(model, mode)
    with _quiet_exporter():
        with intercepted(model, handover), mode, torch.no_grad():
            exported = torch.export.export(
                _Traced(model, cache, handover), _sample(cache), dynamic_shapes=_dynamic(cache), strict=False
            )
        program = torch.onnx.export(exported, args=(), opset_version=OPSET, optimize=False, verbose=False)
    assert program is not None
    return program.model


def _built(architecture: Architecture, activations: torch.dtype) -> PreTrainedModel:
    """The model with parameters in the activations' dtype. Buffers keep theirs: float16 would change the angles."""
    refuse_dynamic_frequencies(architecture.parsed)
    model = architecture.empty_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(activations)
    return model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppresses the exporter's remarks on missing packages and on its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(previous)


@contextmanager
def _trace_errors(config: Mapping[str, Any]) -> Iterator[None]:
    """Turns any error of the tracer into one that names the family, with the first line of torch's long message."""
    try:
        yield
    except QexportError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CompatibilityError(
            f"the model cannot be traced: {type(error).__name__}: {reason}",
            where=f"export: onnx, model_type {config.get('model_type')}",
            mend="leave this layout out; docs/onnx.md says what it requires of a family",
        ) from error


class _Traced(nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: PreTrainedModel, cache: Cache, handover: Handover) -> None:
        super().__init__()
        self.model, self._cache, self._handover = model, cache, handover

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        layers = [
            {tensor.name: value for tensor, value in zip(tensors, values, strict=True)}
            for tensors, values in zip(self._cache, past, strict=True)
        ]
        cache = TracedCache(layers, self._handover)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        self._handover.finish()
        return logits, cache.outputs()


def _make_fake(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    """Replaces parameters and buffers on the meta device by fake tensors on the CPU, without storage."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta and id(tensor) not in known:
                with mode:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                known[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            if tensor.is_meta:
                setattr(module, name, known[id(tensor)])


def _sample(cache: Cache) -> tuple[Any, ...]:
    batch, sequence, past = _SAMPLE["batch"], _SAMPLE["sequence"], _SAMPLE["past"]
    ids = torch.zeros((batch, sequence), dtype=torch.int64)
    mask = torch.ones((batch, past + sequence), dtype=torch.int64)
    layers = [
        [
            torch.empty((batch, *(past if size is None else size for size in tensor.shape)), dtype=tensor.dtype)
            for tensor in tensors
        ]
        for tensors in cache
    ]
    return ids, mask, torch.zeros_like(ids), layers


def _dynamic(cache: Cache) -> tuple[Any, ...]:
    free = torch.export.Dim.AUTO
    layers = [
        [{0: free} | {1 + axis: free for axis, size in enumerate(tensor.shape) if size is None} for tensor in tensors]
        for tensors in cache
    ]
    return {0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, layers


def past_name(layer: int, tensor: CacheTensor) -> str:
    """The name of the graph's input for a tensor of the cache."""
    return f"{PAST}{layer}.{tensor.name}"


def present_name(layer: int, tensor: CacheTensor) -> str:
    """The name of the graph's output for a tensor of the cache."""
    return f"present.{layer}.{tensor.name}"


def _name_inputs_and_outputs(graph: ir.Graph, cache: Cache) -> None:
    """Gives inputs and outputs the names and axes that optimum and onnxruntime-genai use."""
    layers = [(layer, tensor) for layer, tensors in enumerate(cache) for tensor in tensors]
    tokens = [("input_ids", "sequence"), ("attention_mask", "total"), ("position_ids", "sequence")]
    ends: list[tuple[ir.Value, str, list[int | str]]] = []
    for value, (name, axis) in zip(graph.inputs, tokens, strict=False):
        ends.append((value, name, ["batch", axis]))
    for value, (layer, tensor) in zip(graph.inputs[len(tokens) :], layers, strict=True):
        ends.append((value, past_name(layer, tensor), _axes(tensor, "past")))
    ends.append((graph.outputs[0], "logits", ["batch", "sequence", _last_size(graph.outputs[0])]))
    for value, (layer, tensor) in zip(graph.outputs[1:], layers, strict=True):
        ends.append((value, present_name(layer, tensor), _axes(tensor, "total")))
    for value, name, axes in ends:
        _refuse_fixed(name, axes, value)
        value.name, value.shape = name, ir.Shape(axes)


def _refuse_fixed(name: str, axes: Sequence[int | str], value: ir.Value) -> None:
    assert value.shape is not None
    if any(isinstance(size, str) and isinstance(found, int) for size, found in zip(axes, value.shape, strict=True)):
        raise CompatibilityError(
            f"the traced graph works only for the sizes of its sample: {name} {value.shape}", where="export: onnx"
        )


def _axes(tensor: CacheTensor, tokens: str) -> list[int | str]:
    return ["batch", *(tokens if size is None else size for size in tensor.shape)]


def _last_size(value: ir.Value) -> int:
    assert value.shape is not None
    size = value.shape[-1]
    assert isinstance(size, int)
    return size


def _parameters_to_inputs(graph: ir.Graph, naming: Naming) -> None:
    """Makes parameters inputs, since they have no values, named as in files; tied weights are the original."""
    found: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        file_name = naming.files.get(name.removeprefix("model."))
        if file_name is None:
            continue
        del graph.initializers[name]
        value.const_value, value.name = None, naming.tied.get(file_name, file_name)
        if value.name in found:
            value.replace_all_uses_with(found[value.name])
        else:
            found[value.name] = value
            graph.inputs.append(value)
