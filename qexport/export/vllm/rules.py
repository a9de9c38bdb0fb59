"""The rules of vLLM's configuration (config.json, tokenizer, launch files), and the list of all rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qexport.export.served import CONFIG, Rules, Server
from qexport.export.served_layers import unfollowed_config
from qexport.export.vllm.families import ARCHITECTURES, VERSION, heads
from qexport.export.vllm.launch import max_model_len
from qexport.export.vllm.served import ServedByVllm
from qexport.export.vllm.weight_rules import COMPRESSED, GPTQ, GPTQ_UTILS, WEIGHT_RULES
from qexport.formats.compressed_tensors.reading import FLOAT4_FORMATS

_CONFIG: Final = "vllm/transformers_utils/config.py"
_MODEL_CONFIG: Final = "vllm/config/model.py"
_REGISTRY: Final = "vllm/model_executor/models/registry.py"
_FALCON: Final = "vllm/model_executor/models/falcon.py"
_MARLIN_UTILS: Final = "vllm/model_executor/layers/quantization/utils/marlin_utils.py"

_DTYPES: Final = ("float16", "bfloat16", "float32")
_METHODS: Final = ("gptq", "awq", "compressed-tensors", "fp8")
_GROUP_SIZES: Final = (-1, 32, 64, 128)
"""vLLM checks this for every GPTQ layer on every platform."""
_AWQ_SIZES: Final = ", ".join(map(str, _GROUP_SIZES))
_NO_FLOAT16: Final = ("gemma2", "gemma3", "gemma3_text", "glm4")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tekken.json")
"""vLLM reads one of these (`vllm/tokenizers`)."""
_FALCON_ACTIVATION: Final = "gelu"
_EIGHT_BITS: Final = {"int-quantized": ("int", "int8"), "float-quantized": ("float", "e4m3")}
"""Of weights and activations of 8 bits, by format: in the config, and in words."""
_OTHER_BITS: Final = "use bits: 4, or method w8a8 for 8 bits"
_STATIC: Final = "use static_groups: true, which needs no order in the file"

_RULES: Final = Rules[ServedByVllm]()
_rule: Final = _RULES.rule


@_rule("config.json can be read", _CONFIG)
def _readable(model: ServedByVllm) -> Iterator[str]:
    if reason := model.json_fault(CONFIG):
        yield reason


@_rule("vLLM has a class for the architecture", _REGISTRY)
def _architecture(model: ServedByVllm) -> Iterator[str]:
    """Other architectures would be run by transformers in vLLM, which was not tested."""
    if model.architecture not in ARCHITECTURES:
        yield f"{model.architecture!r} has no class in vLLM"
    elif isinstance(model.structure_or_fault, str):
        yield model.structure_or_fault


@_rule("no code is loaded from the folder", _CONFIG)
def _no_code(model: ServedByVllm) -> Iterator[str]:
    if "auto_map" in model.config:
        yield "auto_map asks for --trust-remote-code"


@_rule("the dtype is one that the model runs in", _MODEL_CONFIG, "set merge.dtype to bfloat16")
def _dtype(model: ServedByVllm) -> Iterator[str]:
    if model.dtype not in _DTYPES:
        yield f"dtype is {model.dtype!r}"
    if model.dtype == "float16" and model.config.get("model_type") in _NO_FLOAT16:
        yield f"vLLM does not run {model.config['model_type']} in float16"


@_rule("a Falcon has the shape that vLLM's class has", _FALCON)
def _falcon(model: ServedByVllm) -> Iterator[str]:
    config = model.config
    if config.get("model_type") != "falcon":
        return
    hidden, inner = config.get("hidden_size", 0), config.get("ffn_hidden_size")
    if inner is not None and inner != 4 * hidden:
        yield f"ffn_hidden_size {inner}: vLLM's Falcon has 4 * hidden_size = {4 * hidden}"
    if config.get("activation", _FALCON_ACTIVATION) != _FALCON_ACTIVATION:
        yield f"activation {config['activation']!r}: vLLM's Falcon has {_FALCON_ACTIVATION!r}"


@_rule(
    "the quantization method is in vLLM's core",
    _MODEL_CONFIG,
    "use method gptq (4 bits), or fp8 or w8a8 (8 bits), or layout safetensors for transformers",
)
def _method(model: ServedByVllm) -> Iterator[str]:
    method = model.quantization.get("quant_method")
    if method == "bitsandbytes":
        yield "vLLM has dropped bitsandbytes in 0.28"
    elif model.config.get("quantization_config") is not None and method not in _METHODS:
        yield f"quant_method is {method!r}; vLLM reads {', '.join(_METHODS)}"


@_rule("the quantization config can be followed", COMPRESSED)
def _followed(model: ServedByVllm) -> Iterator[str]:
    yield from unfollowed_config(model, _METHODS)


@_rule(
    "GPTQ codes are 4 bits and symmetric",
    GPTQ,
    f"{_OTHER_BITS}; use sym: true, or format: compressed-tensors, which has zero points",
)
def _gptq_codes(model: ServedByVllm) -> Iterator[str]:
    for place, config in _gptq_configs(model):
        if config.get("bits") != 4:
            yield f"{place}: bits {config.get('bits')!r}: vLLM has kernels for 4 bits everywhere"
        if config.get("sym") is not True:
            yield f"{place}: sym: {str(config.get('sym')).lower()}: vLLM reads symmetric codes only"


@_rule("GPTQ groups are in the order of the inputs", GPTQ_UTILS, _STATIC)
def _gptq_order(model: ServedByVllm) -> Iterator[str]:
    for place, config in _gptq_configs(model):
        if config.get("desc_act") is not False and config.get("group_size") != -1:
            yield f"{place}: desc_act is {config.get('desc_act')!r}"


@_rule(
    "GPTQ groups are of a size that is read",
    _MARLIN_UTILS,
    f"use a group_size of {', '.join(map(str, _GROUP_SIZES))}, or format: compressed-tensors",
)
def _gptq_groups(model: ServedByVllm) -> Iterator[str]:
    for place, config in _gptq_configs(model):
        if config.get("group_size") not in _GROUP_SIZES:
            yield f"{place}: group_size {config.get('group_size')!r}"


def _gptq_configs(model: ServedByVllm) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """GPTQ's quantization_config, alone and with the changes of each rule of `dynamic`."""
    if model.method != "gptq":
        return
    yield "quantization_config", model.quantization
    dynamic = model.quantization.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if not pattern.startswith("-:") and isinstance(changes, Mapping):
            yield f"dynamic: {pattern}", {**model.quantization, **changes}


@_rule("AWQ groups are of a size that is read", _MARLIN_UTILS, f"use a group_size of {_AWQ_SIZES}")
def _awq_groups(model: ServedByVllm) -> Iterator[str]:
    """Bits, version and zero points are what the quantization config is followed by."""
    if model.method == "awq" and model.quantization.get("group_size") not in _GROUP_SIZES:
        yield f"group_size {model.quantization.get('group_size')!r}"


@_rule("4-bit codes are used with 16-bit weights", GPTQ, "set merge.dtype to bfloat16 or float16")
def _packed_dtype(model: ServedByVllm) -> Iterator[str]:
    form = model.quantization.get("format")
    packed = model.method in ("gptq", "awq") or form == "pack-quantized" or form in FLOAT4_FORMATS
    if packed and model.dtype == "float32":
        yield "dtype is float32; the kernels compute in 16 bits"


@_rule(
    "compressed-tensors schemes are W8A8, FP8, FP4 or W4A16",
    COMPRESSED,
    f"{_OTHER_BITS}; instead of desc_act {_STATIC}",
)
def _schemes(model: ServedByVllm) -> Iterator[str]:
    if model.method != "compressed-tensors":
        return
    groups = model.quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        if weights.get("actorder") in ("group", "dynamic"):
            yield f"{name}: actorder {weights['actorder']!r}"
        elif (form := model.quantization.get("format")) in _EIGHT_BITS:
            kind, words = _EIGHT_BITS[form]
            eight_bits = {"num_bits": 8, "type": kind, "symmetric": True}
            if not _has_values(weights, {**eight_bits, "dynamic": False}) or weights.get("strategy") != "channel":
                yield f"{name}: weights are not symmetric {words} with a scale for each output"
            if not _has_values(activations or {}, {**eight_bits, "strategy": "token", "dynamic": True}):
                yield f"{name}: activations are not {words} with a scale for each token"
        elif form in FLOAT4_FORMATS:
            continue  # what the config is followed by is all that the formats allow
        elif weights.get("num_bits") != 4 or weights.get("type", "int") != "int" or activations is not None:
            yield f"{name}: packed weights are not 4-bit integers with 16-bit activations"


def _has_values(config: Mapping[str, Any], required: Mapping[str, Any]) -> bool:
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    return all(config.get(key, defaults.get(key)) == value for key, value in required.items())


@_rule("there is a tokenizer", "vllm/tokenizers/hf.py", "save the base's tokenizer into its folder")
def _tokenizer(model: ServedByVllm) -> Iterator[str]:
    if not any(name in model.files for name in _TOKENIZERS):
        yield f"none of {', '.join(_TOKENIZERS)}"


@_rule("launch files do not exceed the model's longest sequence", _MODEL_CONFIG)
def _launch_length(model: ServedByVllm) -> Iterator[str]:
    longest = max_model_len(model.config)
    for place, arguments in model.engine_arguments:
        length = arguments.get("max_model_len")
        if longest is not None and length is not None and length > longest:
            yield f"{place}: max_model_len {length}, the model was made for {longest}"


@_rule("launch files split the heads evenly", _MODEL_CONFIG)
def _launch_parallel(model: ServedByVllm) -> Iterator[str]:
    count, _ = heads(model.config)
    for place, arguments in model.engine_arguments:
        degree = arguments.get("tensor_parallel_size", 1)
        if count % degree:
            yield f"{place}: tensor_parallel_size {degree} does not divide {count} heads"


VLLM: Final = Server(f"vLLM {VERSION}", ServedByVllm, (*_RULES, *WEIGHT_RULES))
