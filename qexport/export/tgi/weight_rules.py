"""The rules of TGI's loaders: quantized tensors, kernels, and the settings in `launch/`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from qexport.export.contract import Rule
from qexport.export.tgi.families import OWN_MODELS
from qexport.export.tgi.folder import ServedFolder
from qexport.export.tgi.kernels import fault
from qexport.export.tgi.parallel import degrees
from qexport.export.tgi.refusals import w8a8_faults
from qexport.export.tgi.rules import LAUNCHER, MODELS, PEFT, WEIGHTS
from qexport.formats.gptq.tensors import packed_specs
from qexport.tensors import GroupQuantizedSpec

_QUANTIZATION: Final = "server/text_generation_server/utils/quantization.py"
_GPTQ: Final = "server/text_generation_server/layers/gptq/__init__.py"
_MARLIN: Final = "server/text_generation_server/layers/marlin/gptq.py"
_PARALLEL: Final = "server/text_generation_server/layers/tensor_parallel.py"
_COMPRESSED: Final = "server/text_generation_server/layers/compressed_tensors/loader.py"
_INT8: Final = "server/text_generation_server/layers/compressed_tensors/w8a8_int.py"

_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)


def _gptq(folder: ServedFolder) -> bool:
    return folder.method == "gptq"


def _gptq_fields(folder: ServedFolder) -> Iterator[str]:
    if _gptq(folder) and folder.codes is None:
        yield "bits, group_size, sym and desc_act must all be there, else TGI goes on with defaults"


def _both_configs(folder: ServedFolder) -> Iterator[str]:
    if folder.quantize_config is not None and folder.quantize_config != folder.config.get("quantization_config"):
        yield "quantize_config.json and quantization_config differ"


def _zero_points(folder: ServedFolder) -> Iterator[str]:
    if _gptq(folder) and folder.quantization.get("checkpoint_format", "gptq") != "gptq":
        yield f"checkpoint_format is {folder.quantization['checkpoint_format']!r}; TGI adds one in any case"


def _same_everywhere(folder: ServedFolder) -> Iterator[str]:
    if not _gptq(folder):
        return
    for key in ("dynamic", "modules_to_not_convert", "modules_in_block_to_quantize"):
        if folder.quantization.get(key):
            yield f"{key} is not followed"
    if folder.quantization.get("lm_head"):
        yield "lm_head: true is not followed"


def _four_parts(folder: ServedFolder) -> Iterator[str]:
    if _gptq(folder):
        for module in folder.quantized:
            yield from (f"{module}.{part} is missing" for part in _PARTS if f"{module}.{part}" not in folder.tensors)


def _quantized_linears(folder: ServedFolder) -> Iterator[str]:
    if _gptq(folder):
        if not folder.quantized:
            yield "nothing is quantized"
        yield from (f"{module} is not quantized" for module in folder.dense)


def _no_leftovers(folder: ServedFolder) -> Iterator[str]:
    """16-bit weights are all that TGI reads where config.json names no method."""
    if folder.method is None and folder.quantized:
        yield f"{len(folder.quantized)} modules are GPTQ codes, and config.json says nothing of it"
    for name, stored in folder.tensors.items():
        if name.endswith(".weight") and folder.method != "compressed-tensors" and stored.spec.dtype not in _FLOATS:
            yield f"{name} is {stored.spec.dtype}"


def _part_specs(folder: ServedFolder) -> Iterator[str]:
    if folder.codes is None:
        return
    for module, (out_features, in_features) in folder.quantized.items():
        codes = folder.codes
        group_size = in_features if codes.group_size == -1 else codes.group_size
        wanted = GroupQuantizedSpec(out_features, in_features, codes.bits, group_size, codes.sym, codes.desc_act)
        for part, spec in packed_specs(wanted).items():
            stored = folder.tensors.get(f"{module}.{part}")
            if stored and stored.spec != spec:
                yield f"{module}.{part} is {stored.spec}, not {spec}"


def _head_dense(folder: ServedFolder) -> Iterator[str]:
    for name, stored in folder.tensors.items():
        in_block = any(part.isdigit() for part in name.split("."))
        if not in_block and stored.spec.dtype not in _FLOATS:
            yield f"{name} is {stored.spec.dtype}"


def _kernels(folder: ServedFolder) -> Iterator[str]:
    if folder.codes:
        for linear in folder.linears:
            if linear.modules[0] in folder.quantized and (reason := fault(folder.codes, linear)):
                yield f"{linear.name}: {reason}"


def _family_prequantized(folder: ServedFolder) -> Iterator[str]:
    model = OWN_MODELS.get(str(folder.config.get("model_type")))
    if folder.method and model and model.prequantized:
        yield model.prequantized


def _joined_order(folder: ServedFolder) -> Iterator[str]:
    """Joined layers share the first one's g_idx. Without desc_act the order is always the same."""
    if folder.codes is None or not folder.codes.desc_act:
        return
    for linear in folder.linears:
        names = [f"{module}.g_idx" for module in linear.modules]
        if len(names) > 1 and all(name in folder.tensors for name in names):
            first = folder.read(names[0])
            if not all(torch.equal(first, folder.read(name)) for name in names[1:]):
                yield f"{linear.name}: g_idx differs"


def _compressed(folder: ServedFolder) -> bool:
    return folder.method == "compressed-tensors"


def _compressed_config(folder: ServedFolder) -> Iterator[str]:
    if not _compressed(folder):
        return
    config = folder.quantization
    if config.get("quantization_status") not in ("compressed", "frozen"):
        yield f"quantization_status is {config.get('quantization_status')!r}"
    if config.get("format") != "int-quantized":
        yield f"format is {config.get('format')!r}; of those that qexport writes, TGI reads int-quantized"
    for name, group in (config.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        scheme = [weights.get(key) for key in ("num_bits", "type", "symmetric", "dynamic")]
        if scheme != [8, "int", True, False]:
            yield f"{name}: weights must be symmetric 8-bit integers with stored scales"
    if not config.get("config_groups"):
        yield "config_groups is empty"


def _ignored_head(folder: ServedFolder) -> Iterator[str]:
    if not _compressed(folder):
        return
    ignored = folder.quantization.get("ignore") or []
    for module in folder.dense:
        if folder.tensors[f"{module}.weight"].spec.dtype != torch.int8 and module not in ignored:
            yield f"{module} is not quantized, and not in ignore"


def _int8_tensors(folder: ServedFolder) -> Iterator[str]:
    if not _compressed(folder):
        return
    int8 = [name for name, stored in folder.tensors.items() if stored.spec.dtype == torch.int8]
    if not int8:
        yield "nothing is quantized"
    for name in int8:
        scale, rows = folder.tensors.get(f"{name}_scale"), folder.tensors[name].spec.shape[0]
        if scale is None:
            yield f"{name}_scale is missing"
        elif scale.spec.shape not in ((rows, 1), (rows,)) or scale.spec.dtype not in _FLOATS:
            yield f"{name}_scale is {scale.spec}"


def _int8_shapes(folder: ServedFolder) -> Iterator[str]:
    if _compressed(folder):
        left = [module for module in folder.dense if folder.tensors[f"{module}.weight"].spec.dtype != torch.int8]
        yield from w8a8_faults(folder.linears, left)


def _shards(folder: ServedFolder) -> Iterator[str]:
    if not folder.environment or "config.json" in folder.unreadable or not folder.linears:
        return
    working = degrees(folder.config, folder.linears, folder.codes)
    if folder.environment.get("NUM_SHARD") not in [str(degree) for degree in working]:
        yield f"NUM_SHARD is {folder.environment.get('NUM_SHARD')}; these work: {', '.join(map(str, working))}"


def _dtype_or_method(folder: ServedFolder) -> Iterator[str]:
    environment = folder.environment or {}
    method = environment.get("QUANTIZE") or folder.method
    if "DTYPE" in environment and method and not method.startswith("bitsandbytes"):
        yield f"DTYPE and {method} exclude each other"


def _flag_fits(folder: ServedFolder) -> Iterator[str]:
    environment = folder.environment
    if environment is None:
        return
    flag = environment.get("QUANTIZE")
    if folder.method and flag != folder.method:
        yield f"QUANTIZE is {flag}, the weights are {folder.method}"
    if not folder.method and flag is not None and not flag.startswith("bitsandbytes"):
        yield f"QUANTIZE is {flag}, the weights are 16-bit"


def _token_limits(folder: ServedFolder) -> Iterator[str]:
    environment = folder.environment
    if environment is None:
        return
    keys = ("MAX_INPUT_TOKENS", "MAX_TOTAL_TOKENS", "MAX_BATCH_PREFILL_TOKENS")
    values = [environment.get(key, "") for key in keys]
    if not all(value.isascii() and value.isdigit() for value in values):
        yield f"{', '.join(keys)} must be counts"
        return
    most_input, most_total, prefill = map(int, values)
    if most_input >= most_total:
        yield f"MAX_INPUT_TOKENS {most_input} must be less than MAX_TOTAL_TOKENS {most_total}"
    if prefill < most_input:
        yield f"MAX_BATCH_PREFILL_TOKENS {prefill} must be at least MAX_INPUT_TOKENS {most_input}"


WEIGHT_RULES: Final = (
    Rule("GPTQ: config.json gives bits, group_size, sym and desc_act", _QUANTIZATION, _gptq_fields),
    Rule("GPTQ: both configs say the same", _QUANTIZATION, _both_configs),
    Rule("GPTQ: zero points are stored less one", _GPTQ, _zero_points),
    Rule("GPTQ: bits and groups are the same everywhere", _QUANTIZATION, _same_everywhere),
    Rule("GPTQ: every module has qweight, qzeros, scales and g_idx", _GPTQ, _four_parts),
    Rule("GPTQ: the tensors have the dtypes and shapes of config.json", _GPTQ, _part_specs),
    Rule("GPTQ: every linear of the blocks is quantized", _GPTQ, _quantized_linears),
    Rule("GPTQ: a kernel takes every layer", _MARLIN, _kernels),
    Rule("GPTQ: joined layers have the same g_idx", _GPTQ, _joined_order),
    Rule("quantized tensors of the family are read rightly", MODELS, _family_prequantized),
    Rule("head and embedding are 16-bit", _PARALLEL, _head_dense),
    Rule("weights are 16-bit where nothing says otherwise", WEIGHTS, _no_leftovers),
    Rule("compressed-tensors: the config is one of int8 weights", _COMPRESSED, _compressed_config),
    Rule("compressed-tensors: what is not quantized is ignored", _COMPRESSED, _ignored_head),
    Rule("compressed-tensors: every int8 weight has its scales", _INT8, _int8_tensors),
    Rule("compressed-tensors: the kernel takes every layer", _INT8, _int8_shapes),
    Rule("launch: NUM_SHARD is a degree that works", WEIGHTS, _shards),
    Rule("launch: dtype and method do not exclude each other", PEFT, _dtype_or_method),
    Rule("launch: QUANTIZE fits the weights", LAUNCHER, _flag_fits),
    Rule("launch: the token limits fit together", LAUNCHER, _token_limits),
)
