"""Runs on tiny models whose bytes are on record, see `test_artifact_bytes.py`.

The input is the same on every processor: weights are sums of random integers, not drawn from a normal distribution with
torch's vectorized logarithm, and the adapter's values have so few bits that every product of the merge is exact. So the
methods that round each weight on its own give the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import factories

MODELS: Mapping[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (factories.llama_config(), ["q_proj", "v_proj", "down_proj"]),
    "falcon 7b": (factories.falcon_config(), ["query_key_value"]),
    "gpt-2": (factories.gpt2_config(), ["c_attn"]),
    "qwen3 moe": (factories.qwen3_moe_config(), ["q_proj", "o_proj"]),
    "falcon h1": (factories.falcon_h1_config(), ["q_proj", "in_proj"]),
}
"""Config and the adapter's target modules. The head is tied in falcon 7b and gpt-2."""


def gptq(**changes: Any) -> dict[str, Any]:
    return {"method": "gptq", "group_size": 32} | changes


DENSE = {"modules": "*.0.*.down_proj", "dense": True}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "gptq": gptq(),
    "gptq asymmetric": gptq(sym=False),
    "gptq act-order": gptq(desc_act=True, static_groups=False),
    "gptq 8 bits, rows, head": gptq(bits=8, group_size=-1, lm_head=True),
    "gptq 3 bits": gptq(bits=3),
    "gptq 2 bits, asymmetric": gptq(bits=2, sym=False, group_size=16),
    "gptq other bits, plain order": gptq(
        static_groups=False, true_sequential=False, mse=False, damp_percent=0.05,
        overrides=[{"modules": "*.v_proj", "bits": 8, "group_size": 64}, DENSE],
    ),
    "gptq dense": gptq(overrides=[{"modules": "*.down_proj", "dense": True}]),
    "nf4": {"method": "nf4"},
    "nf4 double": {"method": "nf4", "double_quant": True, "compute_dtype": "float16"},
    "nf4 blocks of 128": {"method": "nf4", "block_size": 128},
    "fp4 blocks of 32": {"method": "nf4", "quant_type": "fp4", "block_size": 32, "skip_modules": ["*.down_proj"]},
    "int8": {"method": "int8"},
    "int8 dense": {"method": "int8", "skip_modules": ["*.down_proj"], "threshold": 5.0},
    "w8a8": {"method": "w8a8"},
    "nvfp4": {"method": "nvfp4"},
    "mxfp4": {"method": "mxfp4", "skip_modules": ["*.down_proj"]},
    "none": {"method": "none"},
    "none float16": {"method": "none", "dtype": "float16"},
}  # fmt: skip
"""The recipe's `quantize`, and the dtype of the merge where it is not bfloat16."""

SHARDS = {"max_shard_size": "60KB"}
LAYOUTS: Mapping[str, list[dict[str, Any]]] = {
    "safetensors": [{"layout": "safetensors"}],
    "tgi": [{"layout": "tgi"}],
    "vllm": [{"layout": "vllm"}],
    "onnx": [{"layout": "onnx"}],
    "gguf": [{"layout": "gguf"}],
    "vllm compressed-tensors": [{"layout": "vllm", "format": "compressed-tensors"}],
    "onnx fused, accuracy level 4": [{"layout": "onnx", "attention": "fused", "accuracy_level": 4}],
    "onnx float16": [{"layout": "onnx", "activations": "float16"}],
    "shared": [{"layout": "safetensors"}, {"layout": "onnx", "share_weights": True, "attention": "fused"}],
    "safetensors shards": [{"layout": "safetensors"} | SHARDS],
    "tgi shards": [{"layout": "tgi"} | SHARDS],
    "vllm shards": [{"layout": "vllm"} | SHARDS],
    "onnx shards": [{"layout": "onnx"} | SHARDS],
}
"""The recipe's `export`."""

TOGETHER = (
    ["safetensors", "tgi", "vllm", "onnx"],
    ["safetensors", "tgi", "onnx"],
    ["vllm compressed-tensors", "safetensors"],
    ["safetensors", "gguf"],
)
"""Several layouts in one recipe: each folder has the bytes that it has alone."""

TOGETHER_METHODS = ("gptq", "gptq act-order", "nf4 double", "int8", "w8a8", "none")
"""One of each kind of codes, and one that some layouts refuse."""

CASES = [("llama", method) for method in METHODS] + [
    (model, method) for model in list(MODELS)[1:] for method in ("gptq", "nf4 double", "int8", "w8a8", "nvfp4")
]
"""Model and method."""


def layouts_of(model: str) -> list[str]:
    """The first model has whole files, the other families have shards."""
    return [name for name in LAYOUTS if name.endswith("shards") != (model == "llama")]


def prepare(name: str, folder: Path) -> None:
    """A base, an adapter and calibration text. The version of transformers that base configs name is made constant."""
    config, targets = MODELS[name]
    model = factories.build(config)
    _fill(model)
    factories.save(model, folder / "base")
    for path in (folder / "base").glob("*config.json"):
        content = json.loads(path.read_text())
        if "transformers_version" in content:
            path.write_text(json.dumps(content | {"transformers_version": "5.0.0"}))
    _save_adapter(model, targets, folder / "adapter")
    factories.write_text(folder / "calibration.jsonl", seed=1)


def recipe(folder: Path, method: str, exports: list[dict[str, Any]]) -> dict[str, Any]:
    """A recipe without verification, which writes nothing but the report and its summary in the manifest."""
    quantize = dict(METHODS[method])
    dtype = quantize.pop("dtype", "bfloat16")
    if quantize["method"] == "gptq":
        source = str(folder / "calibration.jsonl")
        quantize["calibration"] = {"source": source, "samples": 4, "sequence_length": 32}
    return {
        "load": {"base": str(folder / "base"), "adapter": str(folder / "adapter")},
        "merge": {"dtype": dtype},
        "quantize": quantize,
        "export": exports,
    }


def _fill(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(torch.stack([_integers(shape, 127, generator) for _ in range(4)]).sum(0) / 2048)
            else:
                parameter.copy_(_integers(shape, 4, generator) / 64 + (not name.endswith("bias")))


def _save_adapter(model: PreTrainedModel, targets: list[str], folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    transposed = False
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            transposed = isinstance(module, Conv1D)
            outputs, inputs = model.get_parameter(f"{name}.weight").shape[:: -1 if transposed else 1]
            tensors[f"base_model.model.{name}.lora_A.weight"] = _integers((4, inputs), 8, generator) / 64
            tensors[f"base_model.model.{name}.lora_B.weight"] = _integers((outputs, 4), 8, generator) / 64
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    config |= {"target_modules": targets, "fan_in_fan_out": transposed}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _integers(shape: tuple[int, ...], largest: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()
