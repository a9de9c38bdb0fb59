"""The rules of TGI's loaders: the tensors that must exist, how they are quantized, and what the kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from qexport.errors import listed
from qexport.export.served import REMOVE, Rules, beside_the_weights
from qexport.export.tgi.families import Backend, backend
from qexport.export.tgi.kernels import fault
from qexport.export.tgi.served import RESERVED_WORDS, ServedByTgi
from qexport.formats.gptq.second_config import CONFIG_FILE, second_config_differences
from qexport.formats.gptq.tensors import packed_specs
from qexport.tensors import GroupQuantizedSpec

MODELS: Final = "server/text_generation_server/models/__init__.py"
WEIGHTS: Final = "server/text_generation_server/utils/weights.py"
_MODELING: Final = "server/text_generation_server/models/custom_modeling/flash_*_modeling.py"
_HUB: Final = "server/text_generation_server/utils/hub.py"
_QUANTIZATION: Final = "server/text_generation_server/utils/quantization.py"
_GPTQ: Final = "server/text_generation_server/layers/gptq/__init__.py"
_MARLIN: Final = "server/text_generation_server/layers/marlin/gptq.py"
_PARALLEL: Final = "server/text_generation_server/layers/tensor_parallel.py"
_COMPRESSED: Final = "server/text_generation_server/layers/compressed_tensors/loader.py"
_INT8: Final = "server/text_generation_server/layers/compressed_tensors/w8a8_int.py"

NOT_QUANTIZED: Final = "use method: none for this layout, or serve it with vLLM: choose the layout vllm"
_ALIKE: Final = (
    "quantize all linears of the blocks, and only those, with the same bits and a group_size of 64 or 128 (4 bits fit "
    "most shapes), or choose another layout"
)

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
_CODES: Final = (torch.int8, torch.float8_e4m3fn)
_TYPES: Final = {"int-quantized": "int", "float-quantized": "float"}
_EIGHT_BITS: Final = "quantize with gptq (4 bits), or fp8 or w8a8 (8 bits), or leave this layout out"
_CUTLASS_MULTIPLE: Final = 16

WEIGHT_RULES: Final = Rules[ServedByTgi]()
_rule: Final = WEIGHT_RULES.rule


@_rule("there are weights", _HUB)
def _weights(model: ServedByTgi) -> Iterator[str]:
    if not model.tensors:
        yield "no *.safetensors in the folder itself"


@_rule("no file of weights has a reserved word in its name", _HUB, disk=True)
def _reserved(model: ServedByTgi) -> Iterator[str]:
    for name in model.files:
        if "/" not in name and name.endswith(".safetensors") and any(word in name for word in RESERVED_WORDS):
            yield f"{name} would be skipped"


@_rule("the files of weights can be opened", WEIGHTS, disk=True)
def _headers(model: ServedByTgi) -> Iterator[str]:
    yield from (f"{name}: {reason}" for name, reason in model.weights.unreadable.items())


@_rule("each tensor is in one file", WEIGHTS, disk=True)
def _once(model: ServedByTgi) -> Iterator[str]:
    if duplicates := model.weights.duplicates:
        yield f"{len(duplicates)} tensors are in two files: {listed(duplicates, limit=3)}"


@_rule("there is one set of weights", WEIGHTS, disk=True)
def _one_set(model: ServedByTgi) -> Iterator[str]:
    """TGI loads every file, so there must be only one set of shards: two would give duplicate or mixed tensors."""
    names = set(model.weights.files.values())
    if len({name.rpartition("-of-")[2] for name in names}) > 1:
        yield f"files of more than one set: {', '.join(sorted(names))}"


@_rule("nothing beside the weights is read", _HUB, REMOVE)
def _beside(model: ServedByTgi) -> Iterator[str]:
    """TGI loads every `*.safetensors` in the root, whatever the index names."""
    yield from beside_the_weights(model)


@_rule("every layer is complete", _MODELING)
def _all_layers(model: ServedByTgi) -> Iterator[str]:
    """TGI loads the same tensors in each of `num_hidden_layers` layers."""
    if not _known(model):
        return
    count, layers = model.config.get("num_hidden_layers"), model.layers
    if sorted(layers) != list(range(count or 0)):
        yield f"num_hidden_layers is {count!r}, the weights have {len(layers)} layers"
    everything = set().union(*layers.values())
    for number, modules in sorted(layers.items()):
        yield from (f"layer {number} has no {module}" for module in sorted(everything - modules))


@_rule("the output head is there", _MODELING)
def _head(model: ServedByTgi) -> Iterator[str]:
    """Falcon's head and embedding can replace each other; in other families the config decides which one is loaded."""
    model_type = model.config.get("model_type")
    head = "embed_out" if model_type == "gpt_neox" else "lm_head"
    untied = _known(model) and model_type != "falcon" and not model.config.get("tie_word_embeddings")
    if untied and not any(f"{head}.{part}" in model.tensors for part in ("weight", "qweight")):
        yield f"tie_word_embeddings is false, and there is no {head}.weight"


def _known(model: ServedByTgi) -> bool:
    """Whether TGI has its own model for the family, with layers that are all alike."""
    return model.family is not None and bool(model.family.row) and backend(model.config) is Backend.OWN


@_rule("head and embedding are 16-bit", _PARALLEL, _ALIKE)
def _head_unquantized(model: ServedByTgi) -> Iterator[str]:
    for name, spec in model.tensors.items():
        module, _, part = name.rpartition(".")
        if not any(word.isdigit() for word in name.split(".")) and spec.dtype not in _FLOATS:
            yield f"{module}: TGI reads it as 16-bit weights, its {part} is {spec.dtype}"


@_rule("weights are 16-bit where nothing says otherwise", WEIGHTS)
def _no_leftovers(model: ServedByTgi) -> Iterator[str]:
    """If config.json names no method, TGI reads 16-bit weights only."""
    if model.method is None and model.quantized:
        yield f"{len(model.quantized)} modules are GPTQ codes, and config.json says nothing of it"
    for name, spec in model.tensors.items():
        if name.endswith(".weight") and model.method != "compressed-tensors" and spec.dtype not in _FLOATS:
            yield f"{name} is {spec.dtype}"


@_rule("quantized tensors of the family are read correctly", MODELS, NOT_QUANTIZED)
def _family_prequantized(model: ServedByTgi) -> Iterator[str]:
    if model.method and model.family and model.family.prequantized:
        yield model.family.prequantized


@_rule("GPTQ: config.json gives bits, group_size, sym and desc_act", _QUANTIZATION)
def _gptq_fields(model: ServedByTgi) -> Iterator[str]:
    if model.method == "gptq" and model.codes is None:
        yield "bits, group_size, sym and desc_act must all be there, else TGI goes on with defaults"


@_rule("GPTQ: both configs say the same", _QUANTIZATION)
def _both_configs(model: ServedByTgi) -> Iterator[str]:
    if CONFIG_FILE in model.files:
        config = model.config.get("quantization_config")
        yield from (f"{CONFIG_FILE}: {each}" for each in second_config_differences(config, model.json(CONFIG_FILE)))


@_rule("GPTQ: zero points are stored less one", _GPTQ)
def _zero_points(model: ServedByTgi) -> Iterator[str]:
    if model.method == "gptq" and model.quantization.get("checkpoint_format", "gptq") != "gptq":
        yield f"checkpoint_format is {model.quantization['checkpoint_format']!r}; TGI adds one in any case"


@_rule("GPTQ: bits and groups are the same everywhere", _QUANTIZATION, _ALIKE)
def _same_everywhere(model: ServedByTgi) -> Iterator[str]:
    if model.method != "gptq":
        return
    for key in ("dynamic", "modules_to_not_convert", "modules_in_block_to_quantize", "lm_head"):
        if value := model.quantization.get(key):
            named = ", ".join(value) if isinstance(value, dict) else ""
            yield f"{named or key}: TGI reads the same bits and groups everywhere, and does not follow {key}"


@_rule("GPTQ: every module has qweight, qzeros, scales and g_idx", _GPTQ)
def _four_parts(model: ServedByTgi) -> Iterator[str]:
    if model.method == "gptq":
        names = (f"{module}.{part}" for module in model.quantized for part in ("qzeros", "scales", "g_idx"))
        yield from (f"{name} is missing" for name in names if name not in model.tensors)


@_rule("GPTQ: the tensors have the dtypes and shapes of config.json", _GPTQ)
def _part_specs(model: ServedByTgi) -> Iterator[str]:
    if (codes := model.codes) is None:
        return
    for module, (out_features, in_features) in model.quantized.items():
        group_size = in_features if codes.group_size == -1 else codes.group_size
        wanted = GroupQuantizedSpec(out_features, in_features, codes.bits, group_size, codes.sym, codes.desc_act)
        for part, spec in packed_specs(wanted).items():
            stored = model.tensors.get(f"{module}.{part}", spec)
            if stored != spec:
                yield f"{module}.{part} is {stored}, not {spec}"


@_rule("GPTQ: every linear of the blocks is quantized", _GPTQ, _ALIKE)
def _quantized_linears(model: ServedByTgi) -> Iterator[str]:
    if model.method == "gptq":
        if not model.quantized:
            yield "nothing is quantized"
        yield from (f"{module}: TGI reads every linear of the blocks as quantized" for module in model.unquantized)


@_rule("GPTQ: a kernel takes every layer", _MARLIN, _ALIKE)
def _kernels(model: ServedByTgi) -> Iterator[str]:
    if model.codes:
        for linear in model.linears:
            if linear.modules[0] in model.quantized and (reason := fault(model.codes, linear)):
                yield f"{linear.name}: {reason}"


@_rule("GPTQ: joined layers have the same g_idx", _GPTQ, disk=True)
def _joined_order(model: ServedByTgi) -> Iterator[str]:
    """TGI uses the g_idx of the first joined layer for all. Without desc_act it is always the same."""
    if model.codes is None or not model.codes.desc_act:
        return
    for linear in model.linears:
        names = [f"{module}.g_idx" for module in linear.modules]
        if len(names) > 1 and all(name in model.tensors for name in names):
            first = model.read(names[0])
            if not all(torch.equal(first, model.read(name)) for name in names[1:]):
                yield f"{linear.name}: g_idx differs"


@_rule("compressed-tensors: the config is one of 8-bit weights", _COMPRESSED, _EIGHT_BITS)
def _compressed_config(model: ServedByTgi) -> Iterator[str]:
    config = model.quantization
    if model.method != "compressed-tensors":
        return
    if config.get("quantization_status") not in ("compressed", "frozen"):
        yield f"quantization_status is {config.get('quantization_status')!r}"
    if config.get("format") not in _TYPES:
        yield f"format is {config.get('format')!r}; of those that qexport writes, TGI reads {' and '.join(_TYPES)}"
        return
    wanted = [8, _TYPES[config["format"]], True, False]
    for name, group in (config.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        if [weights.get(key) for key in ("num_bits", "type", "symmetric", "dynamic")] != wanted:
            yield f"{name}: weights must be symmetric, of 8 bits and type {wanted[1]}, with stored scales"
    if not config.get("config_groups"):
        yield "config_groups is empty"


@_rule("compressed-tensors: what is not quantized is ignored", _COMPRESSED)
def _ignored(model: ServedByTgi) -> Iterator[str]:
    ignored = model.quantization.get("ignore") or []
    yield from (
        f"{module} is not quantized, and not in ignore"
        for module in _unquantized_modules(model)
        if module not in ignored
    )


@_rule("compressed-tensors: every 8-bit weight has its scales", _INT8)
def _byte_tensors(model: ServedByTgi) -> Iterator[str]:
    if model.method != "compressed-tensors":
        return
    coded = [name for name, spec in model.tensors.items() if spec.dtype in _CODES]
    if not coded:
        yield "nothing is quantized"
    for name in coded:
        scale, rows = model.tensors.get(f"{name}_scale"), model.tensors[name].shape[0]
        if scale is None:
            yield f"{name}_scale is missing"
        elif scale.shape not in ((rows, 1), (rows,)) or scale.dtype not in _FLOATS:
            yield f"{name}_scale is {scale}"


@_rule("compressed-tensors: the kernel takes every layer", _INT8, _ALIKE)
def _byte_shapes(model: ServedByTgi) -> Iterator[str]:
    """The loader looks up only the first of joined modules; CUTLASS requires sizes in multiples of 16."""
    if model.method != "compressed-tensors":
        return
    not_quantized = set(_unquantized_modules(model))
    for linear in model.linears:
        left = [module for module in linear.modules if module in not_quantized]
        if left and len(left) < len(linear.modules):
            yield f"{linear.name}: TGI joins these layers, and only {', '.join(left)} is not quantized"
        elif not left and any(count % _CUTLASS_MULTIPLE for count in linear.shape):
            yield f"{linear.name}: {linear.shape} are not multiples of {_CUTLASS_MULTIPLE}"


def _unquantized_modules(model: ServedByTgi) -> list[str]:
    """Modules of the blocks that are not quantized to 8 bits; none with another method."""
    if model.method != "compressed-tensors":
        return []
    return [module for module in model.unquantized if model.tensors[f"{module}.weight"].dtype not in _CODES]
