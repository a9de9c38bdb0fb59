"""Tiny models through the layouts safetensors and onnx, fed by the same records; each model is traced once."""

from __future__ import annotations

import json
import pickle
import tempfile
from atexit import register
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import factories
from disk_cache import kept
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.naming import name_parameters
from qexport.architectures.structure import Structure
from qexport.export import OnnxSettings, SafetensorsSettings
from qexport.export.layouts import Layout, SafetensorsLayout
from qexport.export.onnx import layout as layout_module
from qexport.export.onnx.layout import OnnxLayout
from qexport.export.onnx.tracing import Trace, trace
from qexport.export.tensor_writer import WrittenWeights
from qexport.formats import Outputs
from qexport.formats.bitsandbytes.four_bit_tensors import dequantize
from qexport.quantizing import AnyMethod
from qexport.quantizing.method import PassInputs
from qexport.reading.onnx.graph import Graph
from qexport.reading.onnx.model import OnnxCausalLM
from qexport.reading.onnx.weights import OnnxWeights
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.tensors import BlockQuantized, CalibrationSet, Origin, TensorRecord
from quantized_models import Tensors

# torch's exporter makes its table of operators again for each trace, out of the source of five hundred functions: a
# fifth of the time of a tiny model's trace.
ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]

FAMILIES = [name for name in factories.FAMILIES if name not in ("mixtral", "qwen3 moe")]
SEVERAL_BLOCKS = ("llama", "falcon 7b", "falcon h1", "gpt-2", "gemma 2", "gemma 3")
"""Two kinds of cache, blocks that differ, and what tests/artifact_cases.py traces."""

CONFIGS: Mapping[str, PretrainedConfig] = {
    name: factories.FAMILIES[name] if name in SEVERAL_BLOCKS else factories.with_blocks(factories.FAMILIES[name], 1)
    for name in FAMILIES
}
"""The others have one block: the time of a trace grows with the blocks."""

CPU = torch.device("cpu")
GREEDY: Mapping[str, Any] = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
"""More tokens than the sliding windows of the tiny models, which are 16 long."""


@dataclass(frozen=True)
class Method:
    """How a tiny model is quantized, and what it was merged in."""

    quantize: Mapping[str, Any]
    merged: torch.dtype = torch.bfloat16


def gptq(**changes: Any) -> Method:
    return Method({"method": "gptq", "group_size": 32, "calibration": {"source": "unused"}} | changes)


def act_order(**changes: Any) -> Method:
    return gptq(desc_act=True, static_groups=False, **changes)


METHODS: dict[str, Method] = {
    "none bf16": Method({"method": "none"}),
    "none fp16": Method({"method": "none"}, torch.float16),
    "none fp32": Method({"method": "none"}, torch.float32),
    "gptq": gptq(),
    "gptq asymmetric": gptq(sym=False),
    "gptq act-order": act_order(),
    "gptq act-order asymmetric": act_order(sym=False, group_size=16),
    "gptq 8 bits": gptq(bits=8, sym=False),
    "gptq 2 bits": gptq(bits=2, sym=False, group_size=16),
    "gptq rows": gptq(group_size=-1, sym=False),
    "nf4": Method({"method": "nf4"}, torch.float32),
    "nf4 bf16": Method({"method": "nf4"}),
    "nf4 double": Method({"method": "nf4", "double_quant": True}, torch.float32),
    "fp4": Method({"method": "nf4", "quant_type": "fp4", "block_size": 32}, torch.float32),
    "int8": Method({"method": "int8"}),
    "w8a8": Method({"method": "w8a8"}),
}


@dataclass(frozen=True)
class Pass:
    """A tiny model and all that its pass yields."""

    checkpoint: Checkpoint
    structure: Structure
    outputs: Outputs
    records: tuple[TensorRecord, ...]


@dataclass(frozen=True)
class Export:
    """Two folders from one pass."""

    passed: Pass
    layout: OnnxLayout
    written: WrittenWeights
    safetensors: Path
    onnx: Path
    scratch: Path = field(repr=False)

    def stored(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Every parameter, as qexport reads the safetensors artifact."""
        with SafetensorsWeights(self.safetensors, dtype=dtype) as source:
            return {name: source.read(name) for name in source.specs()}

    def weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Every parameter that the graph multiplies with."""
        source = OnnxWeights(self.onnx, dtype=dtype)
        source.check_complete()
        return {name: source.read(name) for name in source.specs()}

    def reference(self, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
        """transformers with these weights, those of the safetensors artifact if none are given, all in float32."""
        tensors = self.stored() if weights is None else weights
        return transformers_model(self.passed.checkpoint.config, tensors, self.scratch / "dense")

    def graph(self) -> Graph:
        """What lies in model.onnx."""
        return Graph(self.onnx)

    def model(self) -> OnnxCausalLM:
        """The graph in ONNX Runtime."""
        return open_graph(self.onnx)


def open_graph(folder: Path) -> OnnxCausalLM:
    """The graph of an artifact in ONNX Runtime, as `qexport.load` opens it."""
    weights = OnnxWeights(folder, dtype=torch.float32)
    weights.check_complete()
    return weights.model(device=CPU)


def transformers_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> PreTrainedModel:
    """A dense model, loaded by transformers itself from a folder that holds these tensors in float32."""
    folder.mkdir(exist_ok=True)
    wide = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def checkpoint(config: PretrainedConfig, dtype: torch.dtype) -> Checkpoint:
    """A tiny model as the loader would hand it on."""
    model = factories.build(config, dtype=dtype)
    state = model.state_dict()
    tensors = {name: part.of(state[part.parameter]).contiguous() for name, part in name_parameters(model).parts.items()}
    return Checkpoint(
        Architecture(json.loads(model.config.to_json_string())), Tensors(tensors), {}, Origin("folder", "tiny")
    )


def run_pass(config: PretrainedConfig, method: Method) -> Pass:
    """Quantizes a tiny model."""
    windows = torch.randint(1, factories.VOCABULARY, (8, 48), generator=torch.Generator().manual_seed(0))
    return passed(checkpoint(config, method.merged), method, windows)


def passed(given: Checkpoint, method: Method, windows: Tensor) -> Pass:
    """Quantizes a model in memory, with these tokens where the method wants any."""
    settings = TypeAdapter[Any](AnyMethod).validate_python(dict(method.quantize))
    structure = given.architecture.structure
    outputs = settings.plan(given)
    calibration, scratch = CalibrationSet(windows, "0" * 64, "test"), Path(tempfile.gettempdir())
    stream = settings.quantize(PassInputs(given, outputs, calibration, method.merged, CPU, scratch))
    return Pass(given, structure, outputs, tuple(stream))


@cache
def exported(family: str, method: str, **settings: Any) -> Export:
    """A tiny model of a family that is known by name, exported once in a session of tests."""
    folder = tempfile.TemporaryDirectory()
    register(folder.cleanup)
    return export(passed_once(family, method), Path(folder.name), **settings)


@cache
def passed_once(family: str, method: str) -> Pass:
    return run_pass(CONFIGS[family], METHODS[method])


def export(done: Pass, folder: Path, *, max_shard_size: str = "5GB", **settings: Any) -> Export:
    """Both layouts in the order of `qexport.pipeline.running`: prepared, fed, completed, read back, checked."""
    outputs, structure, given = done.outputs, done.structure, done.checkpoint
    chosen = OnnxSettings(layout="onnx", max_shard_size=max_shard_size, **settings)
    stock = SafetensorsLayout(
        SafetensorsSettings(layout="safetensors", max_shard_size=max_shard_size), outputs, structure
    )
    with traced_once():
        graph = OnnxLayout(chosen, outputs, structure, given)
        graph.prepare()
    layouts: tuple[Layout, ...] = (stock, graph)
    folders = (folder / "safetensors", folder / "onnx")
    for each in folders:
        each.mkdir(parents=True)
    writers = [layout.weights.writer(each) for layout, each in zip(layouts, folders, strict=True)]
    for record in done.records:
        for writer in writers:
            writer.write(record)
    written = [writer.finish() for writer in writers]
    for writer in writers:
        writer.__exit__(None, None, None)
    for layout, each, tensors in zip(layouts, folders, written, strict=True):
        layout.write_files(each, given)
        layout.weights.read_back(each, tensors)
        layout.check(each)
    return Export(done, graph, written[1], *folders, folder)


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside, the layout gets a copy of the trace that was made first for the same model."""
    with patch.object(layout_module, "trace", copied_trace):
        yield


def copied_trace(architecture: Architecture, activations: torch.dtype) -> Trace:
    """By what transformers reads from the config, so that a model in memory and its folder share a trace."""
    left_out = ("dtype", "architectures", "transformers_version", "_name_or_path")
    keys = {key: value for key, value in architecture.parsed.to_dict().items() if key not in left_out}
    found = _trace(json.dumps(keys, sort_keys=True), activations)
    return Trace(found.model.clone(), found.cache)


@cache
def _trace(config: str, activations: torch.dtype) -> Trace:
    """From the disk even where it was made just now, so that it is the same in every session."""
    model, states = pickle.loads(kept(f"trace of {config} in {activations}", lambda: _traced(config, activations)))
    return Trace(ir.from_proto(onnx.ModelProto.FromString(model)), states)


def _traced(config: str, activations: torch.dtype) -> bytes:
    found = trace(Architecture(json.loads(config)), activations)
    return pickle.dumps((ir.to_proto(found.model).SerializeToString(), found.cache))


def prompts(length: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Three rows with ragged padding on the left."""
    ids = torch.randint(1, factories.VOCABULARY, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, : length // 6], mask[2, : length * 3 // 4] = 0, 0
    return ids, mask


@torch.no_grad()
def steps(model: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> list[Tensor]:
    """The logits of each real token of the prompt, then those of each of the tokens [rows, steps], one by one."""
    found: list[Tensor] = []
    given, real, past = ids, mask.bool(), None
    for step in range(tokens.shape[1] + 1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
        output = model(
            input_ids=given, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        found.append(output.logits[real] if step == 0 else output.logits[:, -1])
        past = output.past_key_values
        given = tokens[:, step : step + 1]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return found


def greedy(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The tokens that follow, [rows, 20]."""
    found: Tensor = model.generate(ids, attention_mask=mask, **GREEDY)
    return found[:, ids.shape[1] :]


def greedy_logits(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The tokens that follow, [rows, 20], and the logits [rows, vocabulary] that each was taken from."""
    found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY)
    return found.sequences[:, ids.shape[1] :], list(found.logits)


def deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any step, relative to the step's largest logit."""
    assert len(found) == len(expected)
    return max(
        float((own.float() - other.float()).abs().max() / other.float().abs().max())
        for own, other in zip(found, expected, strict=True)
    )


def assert_same_weights(made: Export, dtype: torch.dtype = torch.float32) -> None:
    """The parameters in the graph and those in the safetensors artifact, bit for bit."""
    expected, found = made.stored(dtype), made.weights(dtype)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_model(made: Export, *, tolerance: float = 1e-4) -> None:
    """Logits of a ragged batch, then of eight tokens with a cache, and 20 tokens of `generate`."""
    (tokens, expected), model = said_by_transformers(made), made.model()
    ids, mask = prompts()
    assert deviation(steps(model, ids, mask, tokens[:, :8]), expected) < tolerance, "deviation"
    assert torch.equal(greedy(model, ids, mask), tokens)


_SAID: dict[str, tuple[Tensor, list[Tensor]]] = {}


def said_by_transformers(made: Export) -> tuple[Tensor, list[Tensor]]:
    """Tokens and logits, computed once for the same weights: most artifacts differ only in where these lie."""
    weights = unrounded(made)
    parts = [json.dumps(dict(made.passed.checkpoint.config), sort_keys=True).encode()]
    for name, tensor in weights.items():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts += [name.encode(), str((tensor.dtype, tensor.shape)).encode(), content]
    key = sha256(b"\0".join(parts)).hexdigest()
    if key not in _SAID:
        (ids, mask), reference = prompts(), made.reference(weights)
        tokens = greedy(reference, ids, mask)
        _SAID[key] = tokens, steps(reference, ids, mask, tokens[:, :8])
    return _SAID[key]


def unrounded(made: Export) -> dict[str, Tensor]:
    """The safetensors artifact's weights; those of 4-bit blocks before they are rounded to a narrower dtype."""
    stored = made.stored()
    for record in made.passed.records:
        if isinstance(record.value, BlockQuantized):
            wide = replace(record.value, spec=replace(record.value.spec, dtype=torch.float32))
            weight = dequantize(wide)
            stored[record.name] = weight.t() if wide.spec.transposed else weight
    return stored
