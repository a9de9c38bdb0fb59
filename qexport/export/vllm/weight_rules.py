"""The rules of vLLM's loaders: which tensors a folder must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch

from qexport.architectures.structure import LinearSpec
from qexport.errors import InputError
from qexport.export.contract import Rule
from qexport.export.vllm.folder import Scheme, ServedFolder
from qexport.export.vllm.fused import disagreements, joined_modules
from qexport.export.vllm.rules import COMPRESSED, GPTQ, GPTQ_UTILS
from qexport.tensors import TensorSpec

WEIGHT_UTILS: Final = "vllm/model_executor/model_loader/weight_utils.py"
LOADER: Final = "vllm/model_executor/model_loader/default_loader.py"
LINEAR: Final = "vllm/model_executor/layers/linear.py"
INT8: Final = "vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py"
PACKED: Final = "vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py"

_WORD: Final = 8
_CODES: Final = ("qweight", "weight_packed", "weight_scale")


def _files(folder: ServedFolder) -> Iterator[str]:
    if "weights" in folder.unreadable:
        yield folder.unreadable["weights"]


def _complete(folder: ServedFolder) -> Iterator[str]:
    """VLLM notices missing tensors only where nothing is quantized."""
    if folder.structure is None or "weights" in folder.unreadable:
        return
    linear = {f"{spec.name}.weight" for spec in folder.linears}
    for name, shape in folder.structure.parameters.items():
        if name in linear or ".experts." in name:
            continue
        if name not in folder.tensors:
            yield f"{name} is missing"
        elif folder.tensors[name].shape != shape:
            yield f"{name} is {list(folder.tensors[name].shape)}, the model has {list(shape)}"


def _head(folder: ServedFolder) -> Iterator[str]:
    if folder.structure is None:
        return
    parts = [f"{folder.structure.head}.{part}" for part in _CODES]
    if folder.quantization.get("lm_head") or any(part in folder.tensors for part in parts):
        yield f"{folder.structure.head} is quantized"


def _joined(folder: ServedFolder) -> Iterator[str]:
    yield from disagreements(_schemes(folder))


def _reached(folder: ServedFolder) -> Iterator[str]:
    """A rule that names `q_proj` does not reach `qkv_proj`, which is what vLLM looks it up by."""
    if folder.method != "gptq":
        return
    schemes, common = _schemes(folder), folder.quantization.get("group_size")
    for group in joined_modules(schemes):
        for module in group:
            scheme = schemes[module]
            if scheme is not None and scheme[1] != common:
                yield f"{module}: group_size {scheme[1]}, but vLLM takes {common} for what it becomes part of"


def _dense(folder: ServedFolder) -> Iterator[str]:
    yield from _stored(folder, lambda scheme: scheme is None)


def _gptq(folder: ServedFolder) -> Iterator[str]:
    if folder.method == "gptq":
        yield from _stored(folder, lambda scheme: scheme is not None)


def _rows(folder: ServedFolder) -> Iterator[str]:
    if folder.quantization.get("format") == "int-quantized":
        yield from _stored(folder, lambda scheme: scheme is not None)


def _packed(folder: ServedFolder) -> Iterator[str]:
    if folder.quantization.get("format") == "pack-quantized":
        yield from _stored(folder, lambda scheme: scheme is not None)


def _stored(folder: ServedFolder, concerned: object) -> Iterator[str]:
    """Layers whose tensors are not those that vLLM makes room for."""
    assert callable(concerned)
    if "weights" in folder.unreadable:
        return
    schemes = _schemes(folder)
    for linear in folder.linears:
        if linear.name not in schemes or not concerned(schemes[linear.name]):
            continue
        for part, expected in _expected(folder, linear, schemes[linear.name]).items():
            found = folder.tensors.get(f"{linear.name}.{part}")
            if found is None:
                yield f"{linear.name}.{part} is missing"
            elif found.shape != expected.shape or found.dtype not in _dtypes(expected.dtype):
                yield f"{linear.name}.{part} is {found.dtype} {list(found.shape)}, not {list(expected.shape)}"


def _expected(folder: ServedFolder, linear: LinearSpec, scheme: Scheme | None) -> Mapping[str, TensorSpec]:
    rows, columns = linear.out_features, linear.in_features
    if scheme is None:
        return {"weight": TensorSpec((columns, rows) if linear.transposed else (rows, columns), torch.bfloat16)}
    groups = 1 if scheme[1] == -1 else columns // scheme[1]
    if folder.method == "gptq":
        return {
            "qweight": TensorSpec((columns // _WORD, rows), torch.int32),
            "qzeros": TensorSpec((groups, rows // _WORD), torch.int32),
            "scales": TensorSpec((groups, rows), torch.float16),
        }
    if folder.quantization.get("format") == "int-quantized":
        return {
            "weight": TensorSpec((rows, columns), torch.int8),
            "weight_scale": TensorSpec((rows, 1), torch.float32),
        }
    parts = {
        "weight_packed": TensorSpec((rows, columns // _WORD), torch.int32),
        "weight_scale": TensorSpec((rows, groups), torch.float16),
        "weight_shape": TensorSpec((2,), torch.int64),
    }
    return parts if scheme[2] else parts | {"weight_zero_point": TensorSpec((rows // _WORD, groups), torch.int32)}


def _dtypes(expected: torch.dtype) -> tuple[torch.dtype, ...]:
    """VLLM copies floating numbers of any width, and only those of one kind of integers."""
    return (torch.float16, torch.bfloat16, torch.float32) if expected.is_floating_point else (expected,)


def _schemes(folder: ServedFolder) -> dict[str, Scheme | None]:
    """Empty where the quantization config cannot be followed, which is a fault of its own."""
    try:
        return folder.schemes
    except InputError:
        return {}


WEIGHT_RULES: Final = (
    Rule("the weights can be read, all that the index names", WEIGHT_UTILS, _files),
    Rule("no tensor of the model is missing", LOADER, _complete),
    Rule("the head is 16-bit", GPTQ, _head),
    Rule("layers that vLLM joins are quantized alike", LINEAR, _joined),
    Rule("GPTQ rules reach the layers that vLLM joins", GPTQ_UTILS, _reached),
    Rule("layers that the config calls dense are stored so", COMPRESSED, _dense),
    Rule("GPTQ layers have codes, zero points and scales", GPTQ, _gptq),
    Rule("W8A8 layers have codes and scales", INT8, _rows),
    Rule("W4A16 layers have words, scales and their shape", PACKED, _packed),
)
