"""The rules of TensorRT-LLM's PyTorch backend for a folder in the layout `safetensors` or `vllm`. They were read in its
documentation and sources, not run: it needs a GPU. No layout is made for it.

It takes the method from hf_quant_config.json (ModelOpt's), else from config.json. qexport does not write the former:
the tensors of ModelOpt's methods are others than ours (docs/read-servers.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qexport.export.served import CONFIG, REMOVE, Rules, Server, beside_the_weights
from qexport.export.served_layers import SIBLINGS_ALIKE, ServedLayers, unequal_siblings
from qexport.formats import block_fp8

_MODEL_CONFIG: Final = "tensorrt_llm/_torch/model_config.py"
_LINEAR: Final = "tensorrt_llm/_torch/modules/linear.py"
_MEND: Final = "use method fp8, or method none"
_ROWWISE: Final = ("8-bit floats with a scale for each output", "8-bit floats with a scale for each token")

_RULES: Final = Rules[ServedLayers]()
_rule: Final = _RULES.rule


@_rule("config.json can be read", _MODEL_CONFIG)
def _readable(model: ServedLayers) -> Iterator[str]:
    if reason := model.json_fault(CONFIG):
        yield reason


@_rule("nothing beside the weights is read", _MODEL_CONFIG, REMOVE)
def _beside(model: ServedLayers) -> Iterator[str]:
    """A hf_quant_config.json would be read before config.json."""
    yield from beside_the_weights(model)


@_rule("the quantization method is one that it takes from config.json", _MODEL_CONFIG, _MEND)
def _method(model: ServedLayers) -> Iterator[str]:
    """Of other methods it says nothing, and takes the model for an unquantized one."""
    if model.quantization and model.method not in ("fp8", "compressed-tensors"):
        yield f"quant_method is {model.method!r}; it looks for fp8 and compressed-tensors"


@_rule("blocks of FP8 are 128 x 128", _MODEL_CONFIG, _MEND)
def _blocks(model: ServedLayers) -> Iterator[str]:
    if model.method == "fp8" and (size := model.quantization.get("weight_block_size")) != list(block_fp8.BLOCK):
        yield f"weight_block_size {size!r}"


@_rule("compressed-tensors weights are FP8 with a scale for each output, in one group", _MODEL_CONFIG, _MEND)
def _rowwise(model: ServedLayers) -> Iterator[str]:
    """It looks at bits and strategies of the first group, not at the type: int8 codes would be read as floats."""
    if model.method != "compressed-tensors":
        return
    groups = model.quantization.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    if len(found) != 1:
        yield f"{len(found)} config groups"
    for group in found:
        for key, strategy, words in zip(("weights", "input_activations"), ("channel", "token"), _ROWWISE, strict=True):
            if not _is_float8(group.get(key) or {}, strategy):
                yield f"{key} are not {words}"


def _is_float8(config: Mapping[str, Any], strategy: str) -> bool:
    return (config.get("num_bits"), config.get("type"), config.get("strategy")) == (8, "float", strategy)


@_rule("layers that TensorRT-LLM joins are quantized alike", _LINEAR, SIBLINGS_ALIKE)
def _joined(model: ServedLayers) -> Iterator[str]:
    yield from unequal_siblings(model, "TensorRT-LLM")


TENSORRT_LLM: Final = Server("TensorRT-LLM", ServedLayers, _RULES)
