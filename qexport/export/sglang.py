"""The rules of SGLang for a folder in the layout `safetensors` or `vllm`. They were read in its documentation and
sources, not run: SGLang needs a GPU. No layout is made for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qexport.architectures.joined import joined_modules, joined_name
from qexport.export.served import CONFIG, REMOVE, Rules, Server, beside_the_weights
from qexport.export.served_layers import SIBLINGS_ALIKE, ServedLayers, in_words, unequal_siblings, unfollowed_config
from qexport.formats.compressed_tensors.reading import FLOAT4_FORMATS
from qexport.formats.gptq.reading import GptqRules

_DOCUMENTATION: Final = "docs/advanced_features/quantization.md"
_QUANTIZATION: Final = "python/sglang/srt/layers/quantization"
_GPTQ: Final = f"{_QUANTIZATION}/gptq.py"
_COMPRESSED: Final = f"{_QUANTIZATION}/compressed_tensors/compressed_tensors.py"
_METHODS: Final = ("gptq", "awq", "compressed-tensors", "fp8")
_MARLIN_BITS: Final = (4, 8)
_MARLIN_GROUPS: Final = (-1, 32, 64, 128)
_PACKED_BITS: Final = (4, 8)

_RULES: Final = Rules[ServedLayers]()
_rule: Final = _RULES.rule


@_rule("config.json can be read", _DOCUMENTATION)
def _readable(model: ServedLayers) -> Iterator[str]:
    """SGLang takes the method from it, if `--quantization` is not given."""
    if reason := model.json_fault(CONFIG):
        yield reason


@_rule("nothing beside the weights is read", _DOCUMENTATION, REMOVE)
def _beside(model: ServedLayers) -> Iterator[str]:
    yield from beside_the_weights(model)


@_rule("the quantization method was found in its sources", _DOCUMENTATION, "use method gptq, awq, w8a8 or fp8")
def _method(model: ServedLayers) -> Iterator[str]:
    if model.quantization and model.method not in _METHODS:
        yield f"quant_method is {model.method!r}; read were {', '.join(_METHODS)}"


@_rule("the quantization config can be followed", _DOCUMENTATION)
def _followed(model: ServedLayers) -> Iterator[str]:
    yield from unfollowed_config(model, _METHODS)


@_rule("GPTQ codes that Marlin does not compute are used in float16", _GPTQ, "use 4 or 8 bits with sym: true")
def _gptq_kernel(model: ServedLayers) -> Iterator[str]:
    """Other codes take an older kernel, which has no bfloat16."""
    if model.method != "gptq" or model.dtype == "float16":
        return
    for scheme in {scheme for scheme in model.schemes_or_none.values() if scheme}:
        if scheme.bits not in _MARLIN_BITS or not scheme.sym or scheme.group_size not in _MARLIN_GROUPS:
            yield f"{in_words(scheme)}, and dtype {model.dtype}"


@_rule("layers that SGLang joins are quantized alike", _DOCUMENTATION, SIBLINGS_ALIKE)
def _joined(model: ServedLayers) -> Iterator[str]:
    yield from unequal_siblings(model, "SGLang")


@_rule("GPTQ rules reach the layers that SGLang joins", _GPTQ, "use one method for these layers, without overrides")
def _reached(model: ServedLayers) -> Iterator[str]:
    """It looks for rules of `dynamic` by `qkv_proj`, also for unquantized layers."""
    if model.method != "gptq" or not (schemes := model.schemes_or_none):
        return
    rules = GptqRules(model.quantization)
    for group in joined_modules(schemes):
        name, own = joined_name(group[0]) or group[0], schemes[group[0]]
        if (found := rules.scheme(name)) != own:
            yield f"{group[0]} ({in_words(own)}): SGLang looks for {name} and finds {in_words(found)}"


@_rule("packed weights of compressed-tensors are symmetric, with 4 or 8 bits", _COMPRESSED, "use sym: true")
def _packed(model: ServedLayers) -> Iterator[str]:
    """It computes them with the kernels of vLLM, which must be installed beside it."""
    if model.method != "compressed-tensors" or model.quantization.get("format") != "pack-quantized":
        return
    for scheme in {scheme for scheme in model.schemes_or_none.values() if scheme}:
        if scheme.bits not in _PACKED_BITS or not scheme.sym:
            yield in_words(scheme)


@_rule("4-bit floats of compressed-tensors come with rounded inputs", _COMPRESSED, "use vLLM, or method fp8")
def _float4(model: ServedLayers) -> Iterator[str]:
    """With 16-bit inputs it takes the weights for 4-bit integers, and ends in an ImportError
    (github.com/sgl-project/sglang/pull/40022, open in September 2026).
    """
    name = model.quantization.get("format")
    if model.method == "compressed-tensors" and name in FLOAT4_FORMATS:
        yield f"{name} with inputs of 16 bits"


SGLANG: Final = Server("SGLang", ServedLayers, _RULES)
