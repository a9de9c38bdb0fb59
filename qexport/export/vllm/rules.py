"""The rules of vLLM's configuration: what config.json may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qexport.errors import InputError
from qexport.export.contract import Rule
from qexport.export.vllm.architectures import ARCHITECTURES
from qexport.export.vllm.folder import ServedFolder
from qexport.export.vllm.launch import max_model_len
from qexport.export.vllm.parallel import heads
from qexport.export.vllm.refusals import GROUP_SIZES, NO_FLOAT16, architecture, falcon_faults

CONFIG: Final = "vllm/transformers_utils/config.py"
MODEL_CONFIG: Final = "vllm/config/model.py"
REGISTRY: Final = "vllm/model_executor/models/registry.py"
FALCON: Final = "vllm/model_executor/models/falcon.py"
GPTQ: Final = "vllm/model_executor/layers/quantization/auto_gptq.py"
GPTQ_UTILS: Final = "vllm/model_executor/layers/quantization/utils/gptq_utils.py"
MARLIN_UTILS: Final = "vllm/model_executor/layers/quantization/utils/marlin_utils.py"
COMPRESSED: Final = "vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
TOKENIZER: Final = "vllm/tokenizers/hf.py"

_DTYPES: Final = ("float16", "bfloat16", "float32")
_METHODS: Final = ("gptq", "compressed-tensors")
_INT8: Final = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_TOKEN: Final = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tekken.json")


def _readable(folder: ServedFolder) -> Iterator[str]:
    if "config" in folder.unreadable:
        yield folder.unreadable["config"]


def _architecture(folder: ServedFolder) -> Iterator[str]:
    name = architecture(folder.config)
    if name not in ARCHITECTURES:
        yield f"no class for {name!r}"
    elif folder.structure is None:
        yield folder.unreadable["structure"]


def _no_code(folder: ServedFolder) -> Iterator[str]:
    if "auto_map" in folder.config:
        yield "auto_map asks for --trust-remote-code"


def _dtype(folder: ServedFolder) -> Iterator[str]:
    if folder.dtype not in _DTYPES:
        yield f"dtype is {folder.dtype!r}"
    if folder.dtype == "float16" and folder.config.get("model_type") in NO_FLOAT16:
        yield f"{folder.config['model_type']} does not run in float16"


def _falcon(folder: ServedFolder) -> Iterator[str]:
    yield from falcon_faults(folder.config)


def _method(folder: ServedFolder) -> Iterator[str]:
    if folder.config.get("quantization_config") is not None and folder.method not in _METHODS:
        yield f"quant_method is {folder.method!r}; vLLM reads {', '.join(_METHODS)}"


def _followed(folder: ServedFolder) -> Iterator[str]:
    try:
        schemes = folder.schemes
    except InputError as error:
        yield error.what
        return
    if folder.quantization and folder.structure and not any(schemes.values()):
        yield "no layer is quantized by it"


def _gptq_codes(folder: ServedFolder) -> Iterator[str]:
    if folder.method != "gptq":
        return
    for place, says in _gptq_says(folder):
        if (says.get("bits"), says.get("sym")) != (4, True):
            yield f"{place}: bits {says.get('bits')!r}, sym {says.get('sym')!r}; 4 and true are read on every platform"


def _gptq_order(folder: ServedFolder) -> Iterator[str]:
    if folder.method != "gptq":
        return
    for place, says in _gptq_says(folder):
        if says.get("desc_act") is not False and says.get("group_size") != -1:
            yield f"{place}: desc_act is {says.get('desc_act')!r}"


def _gptq_groups(folder: ServedFolder) -> Iterator[str]:
    if folder.method != "gptq":
        return
    for place, says in _gptq_says(folder):
        if says.get("group_size") not in GROUP_SIZES:
            yield f"{place}: group_size is {says.get('group_size')!r}"


def _gptq_says(folder: ServedFolder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The quantization_config, and with each rule of `dynamic` laid over it."""
    yield "quantization_config", folder.quantization
    dynamic = folder.quantization.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if not pattern.startswith("-:") and isinstance(changes, Mapping):
            yield f"dynamic: {pattern}", {**folder.quantization, **changes}


def _gptq_dtype(folder: ServedFolder) -> Iterator[str]:
    if folder.method == "gptq" and folder.dtype == "float32":
        yield "dtype is float32; the kernels compute in 16 bits"


def _schemes(folder: ServedFolder) -> Iterator[str]:
    if folder.method != "compressed-tensors":
        return
    groups = folder.quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        if weights.get("actorder") in ("group", "dynamic"):
            yield f"{name}: actorder {weights['actorder']!r}"
        elif folder.quantization.get("format") == "int-quantized":
            if not _holds(weights, _INT8) or weights.get("strategy") != "channel":
                yield f"{name}: weights are not symmetric int8 with a scale for each output"
            if not _holds(activations or {}, _TOKEN):
                yield f"{name}: activations are not int8 with a scale for each token"
        elif weights.get("num_bits") != 4 or weights.get("type", "int") != "int" or activations is not None:
            yield f"{name}: packed weights are not 4-bit integers with 16-bit activations"


def _holds(says: Mapping[str, Any], demanded: Mapping[str, Any]) -> bool:
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    return all(says.get(key, defaults.get(key)) == value for key, value in demanded.items())


def _tokenizer(folder: ServedFolder) -> Iterator[str]:
    if not any((folder.path / name).is_file() for name in _TOKENIZERS):
        yield f"none of {', '.join(_TOKENIZERS)}"


def _launch_length(folder: ServedFolder) -> Iterator[str]:
    longest = max_model_len(folder.config)
    for place, arguments in folder.engine_arguments:
        length = arguments.get("max_model_len")
        if longest is not None and length is not None and length > longest:
            yield f"{place}: max_model_len {length}, the model was made for {longest}"


def _launch_parallel(folder: ServedFolder) -> Iterator[str]:
    count, _ = heads(folder.config)
    for place, arguments in folder.engine_arguments:
        degree = arguments.get("tensor_parallel_size", 1)
        if count % degree:
            yield f"{place}: tensor_parallel_size {degree} does not divide {count} heads"


CONFIG_RULES: Final = (
    Rule("config.json can be read", CONFIG, _readable),
    Rule("vLLM has a class for the architecture", REGISTRY, _architecture),
    Rule("no code is loaded from the folder", CONFIG, _no_code),
    Rule("the dtype is one that the model runs in", MODEL_CONFIG, _dtype),
    Rule("a Falcon has the shape that vLLM's class has", FALCON, _falcon),
    Rule("the quantization method is in vLLM's core", MODEL_CONFIG, _method),
    Rule("the quantization config can be followed", COMPRESSED, _followed),
    Rule("GPTQ codes are 4 bits and symmetric", GPTQ, _gptq_codes),
    Rule("GPTQ groups are in the order of the inputs", GPTQ_UTILS, _gptq_order),
    Rule("GPTQ groups are of a size that is read", MARLIN_UTILS, _gptq_groups),
    Rule("GPTQ codes stand beside 16-bit weights", GPTQ, _gptq_dtype),
    Rule("compressed-tensors schemes are W8A8 or W4A16", COMPRESSED, _schemes),
    Rule("there is a tokenizer", TOKENIZER, _tokenizer),
    Rule("launch files ask for no longer sequences than the model's", MODEL_CONFIG, _launch_length),
    Rule("launch files split the heads evenly", MODEL_CONFIG, _launch_parallel),
)
