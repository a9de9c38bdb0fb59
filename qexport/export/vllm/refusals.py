"""What vLLM does not serve, refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.architectures.checkpoint import Checkpoint
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError, listed
from qexport.export.vllm.architectures import ARCHITECTURES, VERSION
from qexport.export.vllm.fused import disagreements, joined_modules
from qexport.tensors import FourBit, Gptq, GroupQuantizedSpec, LlmInt8, Outputs, OutputSpec, QuantizedSpec, TensorSpec

GROUP_SIZES: Final = (-1, 32, 64, 128)
"""`vllm/model_executor/layers/quantization/utils/marlin_utils.py`, asked for every GPTQ layer on every platform."""

NO_FLOAT16: Final = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""`vllm/config/model.py`."""

CPU_MULTIPLE: Final = 32
"""`vllm/model_executor/kernels/linear/mixed_precision/cpu.py`."""

TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tekken.json")
"""`vllm/tokenizers`: it reads one of these."""

_FALCON_ACTIVATION: Final = "gelu"


def architecture(config: Mapping[str, Any]) -> str:
    """The class that config.json names, or that transformers would name."""
    named = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""), "")]
    return str(named[0])


def refuse(outputs: Outputs, structure: Structure, checkpoint: Checkpoint, form: str) -> None:
    """Refuses what vLLM would refuse, or serve wrongly.

    Args:
        outputs: what the pass will yield.
        structure: the model's.
        checkpoint: the merged model, of which only config and file names are looked at.
        form: `gptq` or `compressed-tensors`, for GPTQ codes.

    Raises:
        CompatibilityError: with every reason, and the way out of each.
    """
    config = checkpoint.config
    problems = [*_family(config), *_dtype(outputs, structure, config), *_method(outputs, form)]
    if not any(name in checkpoint.files for name in TOKENIZERS):
        problems.append(f"the base has none of {', '.join(TOKENIZERS)}: save its tokenizer into its folder")
    if outputs.quantized:
        problems += [*_layers(outputs, structure), *_conv1d(structure), *_experts(outputs.specs)]
    if problems:
        raise CompatibilityError(f"vLLM {VERSION} would not serve this", where=listed(problems))


def falcon_faults(config: Mapping[str, Any]) -> list[str]:
    """What vLLM's Falcon takes for granted (`vllm/model_executor/models/falcon.py`)."""
    if config.get("model_type") != "falcon":
        return []
    faults = []
    hidden, inner = config.get("hidden_size", 0), config.get("ffn_hidden_size")
    if inner is not None and inner != 4 * hidden:
        faults.append(f"ffn_hidden_size {inner}: vLLM's Falcon has 4 * hidden_size = {4 * hidden}")
    if config.get("activation", _FALCON_ACTIVATION) != _FALCON_ACTIVATION:
        faults.append(f"activation {config['activation']!r}: vLLM's Falcon has {_FALCON_ACTIVATION!r}")
    return faults


def _family(config: Mapping[str, Any]) -> list[str]:
    name = architecture(config)
    known = [] if name in ARCHITECTURES else [f"architectures: {name!r} has no class in vLLM; use another layout"]
    return known + falcon_faults(config)


def _dtype(outputs: Outputs, structure: Structure, config: Mapping[str, Any]) -> list[str]:
    dtype = outputs.dense_dtype(f"{structure.embedding}.weight")
    if dtype == torch.float16 and config.get("model_type") in NO_FLOAT16:
        return [f"vLLM does not run {config['model_type']} in float16: set merge.dtype to bfloat16"]
    if dtype == torch.float32 and isinstance(outputs.method, Gptq):
        return ["vLLM reads GPTQ codes beside 16-bit weights only: set merge.dtype to bfloat16 or float16"]
    return []


def _method(outputs: Outputs, form: str) -> list[str]:
    match outputs.method:
        case FourBit() | LlmInt8():
            return [
                "vLLM has dropped bitsandbytes in 0.28: use method gptq (4 bits) or w8a8 (8 bits), "
                "or layout safetensors for transformers"
            ]
        case Gptq() as method:
            return _gptq(method, outputs, form)
        case _:
            return []


def _gptq(method: Gptq, outputs: Outputs, form: str) -> list[str]:
    specs = {module: spec for module, spec in outputs.quantized.items() if isinstance(spec, GroupQuantizedSpec)}
    problems = []
    if other := sorted({spec.bits for spec in specs.values()} - {4}):
        bits = ", ".join(map(str, other))
        problems.append(f"bits {bits}: vLLM has kernels for 4 bits everywhere; use bits: 4, or method w8a8 for 8 bits")
    if method.desc_act and any(spec.groups > 1 for spec in specs.values()):
        problems.append("desc_act: vLLM no longer reads it; use static_groups: true, which needs no order in the file")
    if form == "compressed-tensors":
        return problems
    if not method.sym:
        problems.append("sym: false is refused in the format gptq; use sym: true, or format: compressed-tensors")
    sizes = {-1 if spec.groups == 1 else spec.group_size for spec in specs.values()} | {method.group_size}
    if other := sorted(sizes - set(GROUP_SIZES)):
        problems.append(f"group_size {', '.join(map(str, other))}: vLLM takes {', '.join(map(str, GROUP_SIZES))}")
    return problems + _unnamed(method, specs)


def _unnamed(method: Gptq, specs: Mapping[str, GroupQuantizedSpec]) -> list[str]:
    """Joined layers in other groups than the method's: no rule with their own names reaches the layer they become."""
    schemes = {module: _scheme(spec) for module, spec in specs.items()}
    return [
        f"{', '.join(group)}: in the format gptq vLLM reads joined layers with group_size {method.group_size}; "
        "use it there too, or format: compressed-tensors"
        for group in joined_modules(schemes)
        if any(method.group_size not in (specs[module].group_size, _resolved(specs[module])) for module in group)
    ]


def _resolved(spec: GroupQuantizedSpec) -> int:
    return -1 if spec.groups == 1 else spec.group_size


def _layers(outputs: Outputs, structure: Structure) -> list[str]:
    problems = []
    if structure.head in outputs.quantized:
        problems.append(f"{structure.head} is quantized, which was not tried in vLLM: leave lm_head out")
    linears = [linear.name for linear in structure.block_linears]
    schemes = {name: _scheme(outputs.specs[f"{name}.weight"]) for name in linears if f"{name}.weight" in outputs.specs}
    return problems + disagreements(schemes)


def _scheme(spec: OutputSpec) -> tuple[int, int, bool] | str | None:
    """How a module is quantized; None where it is dense."""
    if isinstance(spec, GroupQuantizedSpec):
        return spec.bits, _resolved(spec), spec.sym
    return type(spec).__name__ if isinstance(spec, QuantizedSpec) else None


def _conv1d(structure: Structure) -> list[str]:
    if structure.model_type != "gpt2":
        return []
    return ["vLLM turns GPT-2's matrices around when it loads them, codes or not: use method none, or another layout"]


def _experts(specs: Mapping[str, OutputSpec]) -> list[str]:
    dense = [name for name, spec in specs.items() if isinstance(spec, TensorSpec) and ".experts." in name]
    if not dense:
        return []
    return [f"{dense[0]}: vLLM takes all experts for quantized; use method none, or quantize them too"]


def kernel_notes(outputs: Outputs) -> list[str]:
    """Which shapes want which processor."""
    if not isinstance(outputs.method, Gptq):
        return []
    notes = ["vLLM's kernels for 4 bits need AVX-512 on x86 CPUs, compute capability 7.5 on NVIDIA GPUs"]
    uneven = [module for module, spec in outputs.quantized.items() if any(side % CPU_MULTIPLE for side in spec.shape)]
    if uneven:
        notes.append(
            f"vLLM on CPUs wants inputs and outputs in multiples of {CPU_MULTIPLE}, which {len(uneven)} layers are not"
        )
    return notes
