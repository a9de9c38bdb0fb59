"""The rules of vLLM's loaders: the tensors that must exist, and how layers may be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import torch

from qexport.architectures.joined import SHARING, joined_modules, joined_name
from qexport.architectures.structure import LinearSpec
from qexport.export.served import REMOVE, Rules, beside_the_weights
from qexport.export.served_layers import SIBLINGS_ALIKE, in_words, unequal_siblings
from qexport.export.vllm.families import LAST_JOINED, STORED_JOINED
from qexport.export.vllm.served import ServedByVllm
from qexport.formats import awq, block_fp8
from qexport.formats.compressed_tensors.reading import SCALE
from qexport.formats.compressed_tensors.tensors import group_specs, row_specs
from qexport.formats.float4_tensors import GLOBAL_SCALE
from qexport.formats.float4_tensors import specs as float4_specs
from qexport.formats.float8_tensors import specs as float8_specs
from qexport.formats.gptq.reading import GptqRules
from qexport.formats.gptq.tensors import packed_specs
from qexport.formats.stored_weight import Scheme
from qexport.tensors import Float4QuantizedSpec, Float8QuantizedSpec, GroupQuantizedSpec, RowQuantizedSpec, TensorSpec
from qexport.tensors.safetensors_folder import SafetensorsFolder

GPTQ: Final = "vllm/model_executor/layers/quantization/auto_gptq.py"
AWQ: Final = "vllm/model_executor/layers/quantization/auto_awq.py"
GPTQ_UTILS: Final = "vllm/model_executor/layers/quantization/utils/gptq_utils.py"
COMPRESSED: Final = "vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
_SCHEMES: Final = "vllm/model_executor/layers/quantization/compressed_tensors/schemes"
_WEIGHT_UTILS: Final = "vllm/model_executor/model_loader/weight_utils.py"
_LOADER: Final = "vllm/model_executor/model_loader/default_loader.py"
_LINEAR: Final = "vllm/model_executor/layers/linear.py"

_CODES: Final = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
    "weight_g_idx", "weight_scale_inv", "weight_global_scale",
)  # fmt: skip
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)

WEIGHT_RULES: Final = Rules[ServedByVllm]()
_rule: Final = WEIGHT_RULES.rule


@_rule("all weights that the index names can be read", _WEIGHT_UTILS, disk=True)
def _files(model: ServedByVllm) -> Iterator[str]:
    yield from model.weights.unreadable.values()


@_rule("nothing beside the weights is read", _WEIGHT_UTILS, REMOVE)
def _beside(model: ServedByVllm) -> Iterator[str]:
    """Without an index vLLM loads every file of weights, and with one, other programs do."""
    yield from beside_the_weights(model)


@_rule("no tensor of the model is missing", _LOADER)
def _complete(model: ServedByVllm) -> Iterator[str]:
    """Missing tensors are an error in vLLM only if nothing is quantized."""
    if model.structure is None or model.weights.unreadable:
        return
    elsewhere = {f"{spec.name}.weight" for spec in model.linears}
    if _has_codes(model, model.structure.head):
        elsewhere.add(f"{model.structure.head}.weight")
    for name, shape in model.structure.parameters.items():
        if name in elsewhere or ".experts." in name:
            continue
        if name not in model.tensors:
            yield f"{name} is missing"
        elif model.tensors[name].shape != shape:
            yield f"{name} is {list(model.tensors[name].shape)}, the model has {list(shape)}"


@_rule("the head is 16-bit", GPTQ, "leave lm_head out of what is quantized: it was not tried in vLLM")
def _head(model: ServedByVllm) -> Iterator[str]:
    if model.structure is None:
        return
    if model.quantization.get("lm_head") or _has_codes(model, model.structure.head):
        yield f"{model.structure.head} is quantized"


def _has_codes(model: ServedByVllm, module: str) -> bool:
    return any(f"{module}.{part}" in model.tensors for part in _CODES)


@_rule("GPT-2's matrices are not quantized", "vllm/model_executor/models/gpt2.py", "use method none for this layout")
def _conv1d(model: ServedByVllm) -> Iterator[str]:
    if model.config.get("model_type") == "gpt2" and model.method is not None:
        yield "vLLM turns GPT-2's matrices around when it loads them, codes or not"


@_rule("experts are quantized where anything is", COMPRESSED, "use method none for this layout, or quantize them too")
def _experts(model: ServedByVllm) -> Iterator[str]:
    if model.method is None:
        return
    for name, spec in model.tensors.items():
        if ".experts." in name and spec.dtype in _FLOATS and name.rpartition(".")[2] not in _CODES:
            yield f"{name} is not quantized, and vLLM takes all experts for quantized"


@_rule("layers that vLLM joins are quantized alike", _LINEAR, SIBLINGS_ALIKE)
def _joined(model: ServedByVllm) -> Iterator[str]:
    """Unequal siblings end in an AssertionError of vLLM's, or in tensors that have no place."""
    yield from unequal_siblings(model, "vLLM")


@_rule(
    "GPTQ rules reach the layers that vLLM joins",
    GPTQ_UTILS,
    "use the method's bits and group_size for these layers too, or format: compressed-tensors",
)
def _reached(model: ServedByVllm) -> Iterator[str]:
    """Rules are looked up by `qkv_proj`; unquantized layers by `modules_in_block_to_quantize` too, if there is one."""
    if model.method != "gptq" or not (schemes := model.schemes_or_none):
        return
    rules, listed = GptqRules(model.quantization), bool(model.quantization.get("modules_in_block_to_quantize"))
    for module, name in _looked_up(model.linears).items():
        own, found = schemes[module], rules.scheme(name)
        if own != found and (own or not listed):
            yield f"{module} ({in_words(own)}): vLLM looks for {name} and finds {in_words(found)}"


def _looked_up(linears: Iterable[LinearSpec]) -> dict[str, str]:
    """The names by which vLLM looks up the rules of the first of siblings and of experts, by the modules' own."""
    alone = [linear.name for linear in linears if not linear.expert]
    names = {group[0]: joined_name(group[0]) or group[0] for group in joined_modules(dict.fromkeys(alone))}
    experts = (linear.name for linear in linears if linear.expert)
    return names | {name: f"{name.partition('.experts.')[0]}.experts" for name in experts}


@_rule("layers that the config leaves unquantized are stored unquantized", COMPRESSED)
def _unquantized(model: ServedByVllm) -> Iterator[str]:
    for linear, scheme in _layers(model):
        if scheme is None:
            shape = linear.out_features, linear.in_features
            wanted = TensorSpec(shape[::-1] if linear.transposed else shape, torch.bfloat16)
            yield from _stored(model, linear.name, {"weight": wanted})


@_rule("GPTQ layers have codes, zero points and scales", GPTQ)
def _gptq(model: ServedByVllm) -> Iterator[str]:
    if model.method == "gptq":
        for linear, scheme in _layers(model):
            if scheme is not None:
                parts = packed_specs(_groups(linear, scheme))
                yield from _stored(model, linear.name, {part: parts[part] for part in ("qweight", "qzeros", "scales")})


@_rule("AWQ layers have codes, zero points and scales", AWQ)
def _awq(model: ServedByVllm) -> Iterator[str]:
    if model.method == "awq":
        for linear, scheme in _layers(model):
            if scheme is not None:
                yield from _stored(model, linear.name, awq.packed_specs(_groups(linear, scheme)))


@_rule("W8A8 layers have codes and scales", f"{_SCHEMES}/compressed_tensors_w8a8_int8.py")
def _rows(model: ServedByVllm) -> Iterator[str]:
    if model.quantization.get("format") == "int-quantized":
        for linear, scheme in _layers(model):
            if scheme is not None:
                spec = RowQuantizedSpec(linear.out_features, linear.in_features, torch.float32)
                yield from _stored(model, linear.name, row_specs(spec))


@_rule("FP8 layers have codes and scales", f"{_SCHEMES}/compressed_tensors_w8a8_fp8.py")
def _float8(model: ServedByVllm) -> Iterator[str]:
    for linear, scheme in _layers(model):
        if scheme is not None and scheme.block is not None:
            scale = block_fp8.SCALE if model.method == "fp8" else SCALE
            spec = Float8QuantizedSpec(linear.out_features, linear.in_features, scheme.block)
            yield from _stored(model, linear.name, float8_specs(spec, scale))


@_rule(
    "FP8 blocks are 128 x 128 and do not span joined layers",
    "vllm/model_executor/layers/quantization/utils/fp8_utils.py",
    "use strategy: channel",
)
def _blocks(model: ServedByVllm) -> Iterator[str]:
    """Of layers that vLLM joins, all but the last must end where a block does."""
    if model.method != "fp8" or not (schemes := model.schemes_or_none):
        return
    if (size := model.quantization.get("weight_block_size")) != list(block_fp8.BLOCK):
        yield f"weight_block_size {size!r}: vLLM has kernels for {list(block_fp8.BLOCK)} everywhere"
    joined = {module for group in joined_modules(schemes) for module in group}
    for linear in model.linears:
        leaf = linear.name.rpartition(".")[2]
        if schemes[linear.name] is None:
            continue
        if leaf in STORED_JOINED:
            yield f"{linear.name}: blocks of layers that are stored joined were not tried"
        elif linear.expert and linear.out_features % block_fp8.BLOCK[0]:
            yield f"{linear.name}: {linear.out_features} outputs of an expert are no multiple of {block_fp8.BLOCK[0]}"
        elif linear.name in joined and leaf not in LAST_JOINED and linear.out_features % block_fp8.BLOCK[0]:
            yield f"{linear.name}: {linear.out_features} outputs are no multiple of {block_fp8.BLOCK[0]}"


@_rule("FP4 layers have codes and scales", f"{_SCHEMES}/compressed_tensors_w4a4_nvfp4.py")
def _float4(model: ServedByVllm) -> Iterator[str]:
    for linear, scheme in _layers(model):
        if scheme is not None and scheme.float4 is not None:
            spec = Float4QuantizedSpec(linear.out_features, linear.in_features, scheme.float4)
            yield from _stored(model, linear.name, float4_specs(spec))


@_rule(
    "joined NVFP4 layers have one global scale",
    f"{_SCHEMES}/compressed_tensors_w4a4_nvfp4.py",
    "quantize the model again with qexport",
    disk=True,
)
def _global_scales(model: ServedByVllm) -> Iterator[str]:
    """VLLM takes the largest for all of them, with which the values of the others are smaller than they were."""
    if model.folder is None or model.weights.unreadable:
        return
    with SafetensorsFolder(model.folder) as stored:
        for group in joined_modules(dict.fromkeys(linear.name for linear in model.linears), SHARING):
            names = [name for module in group if (name := f"{module}.{GLOBAL_SCALE}") in model.tensors]
            if len({float(stored.read(name).max()) for name in names}) > 1:
                yield f"{', '.join(group)}: the global scales differ"


@_rule("W4A16 layers have words, scales and their shape", f"{_SCHEMES}/compressed_tensors_wNa16.py")
def _packed(model: ServedByVllm) -> Iterator[str]:
    if model.quantization.get("format") == "pack-quantized":
        for linear, scheme in _layers(model):
            if scheme is not None:
                yield from _stored(model, linear.name, group_specs(_groups(linear, scheme)))


def _layers(model: ServedByVllm) -> Iterator[tuple[LinearSpec, Scheme | None]]:
    """The linear layers, each with its scheme; none if weights or config cannot be read."""
    if not model.weights.unreadable and (schemes := model.schemes_or_none):
        yield from ((linear, schemes[linear.name]) for linear in model.linears)


def _groups(linear: LinearSpec, scheme: Scheme) -> GroupQuantizedSpec:
    group_size = linear.in_features if scheme.group_size == -1 else scheme.group_size
    rows, columns = linear.out_features, linear.in_features
    return GroupQuantizedSpec(rows, columns, scheme.bits, group_size, scheme.sym, scheme.desc_act)


def _stored(model: ServedByVllm, module: str, wanted: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Tensors of a layer that do not fit vLLM's parameters, into which it copies floats of any width."""
    for part, spec in wanted.items():
        found = model.tensors.get(f"{module}.{part}")
        dtypes = _FLOATS if spec.dtype in _FLOATS else (spec.dtype,)
        if found is None:
            yield f"{module}.{part} is missing"
        elif found.shape != spec.shape or found.dtype not in dtypes:
            yield f"{module}.{part} is {found.dtype} {list(found.shape)}, not {list(spec.shape)}"
