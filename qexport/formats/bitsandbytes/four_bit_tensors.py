"""bitsandbytes' 4-bit tensors: the codes, their absmaxes, the code books, and a JSON text as bytes.

The reference for the names and bytes is bitsandbytes 0.50 (`QuantState.as_dict(packed=True)` and
`Linear4bit._save_to_state_dict`); the reference for the values is its code tables, since on some CPUs its own
`dequantize_4bit` is wrong for some shapes. bitsandbytes itself is not imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any, Final, Literal

import torch

from qexport.errors import InputError
from qexport.formats.stored_weight import check_specs, place
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, LargestSpec, NestedAbsmax, TensorSpec
from qexport.tensors.strict_files import parse_json

QuantType = Literal["nf4", "fp4"]

# Quantiles of the normal distribution (arXiv:2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# One sign bit, two exponent bits, one mantissa bit; indexed by these bits, and divided by the largest value below.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4_LARGEST = 12.0

_DYNAMIC_EXPONENTS = 7


@cache
def four_bit_values(quant_type: QuantType) -> torch.Tensor:
    """float32 [16]: the value of each code, relative to its block's absmax. Callers must not change it."""
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    magnitudes = torch.tensor(_FP4) / _FP4_LARGEST
    return torch.cat([magnitudes, 0.0 - magnitudes])  # both zeros are positive


@cache
def dynamic_values() -> torch.Tensor:
    """float32 [256], ascending: the signed 8-bit dynamic data type (arXiv:1511.04561). Callers must not change it.

    There are decades from 1e-6 to 1. The upper nine tenths of the n-th are divided into 2**n equal steps, and the
    midpoint of each step is a value. Zero and one are added.
    """
    decades = []
    for exponent in range(_DYNAMIC_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent - _DYNAMIC_EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2))
    middles = torch.cat(decades)
    return torch.cat([-middles, middles, torch.tensor([0.0, 1.0])]).sort().values


NESTED_BLOCK_SIZE: Final = 256
STATE_PREFIX: Final = "weight.quant_state.bitsandbytes__"

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LONGEST_FLOAT: Final = len("-2.2250738585072014e-308")
_VALUES_AT_ONCE: Final = 1 << 20


def packed_specs(spec: BlockQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack`, by their names inside the module.

    With double quantization the JSON text contains a float, so only its maximum length is known.
    """
    blocks = _blocks(spec)
    specs = {
        "weight": TensorSpec((_code_bytes(spec), 1), torch.uint8),
        "weight.absmax": TensorSpec((blocks,), torch.uint8 if spec.double_quant else torch.float32),
        "weight.quant_map": TensorSpec((16,), torch.float32),
    }
    state = TensorSpec((len(_state_text(spec, 0.0)),), torch.uint8)
    if spec.double_quant:
        specs["weight.nested_absmax"] = TensorSpec((_nested_blocks(blocks),), torch.float32)
        specs["weight.nested_quant_map"] = TensorSpec((256,), torch.float32)
        state = LargestSpec((state.shape[0] - len(repr(0.0)) + _LONGEST_FLOAT,), torch.uint8)
    specs[f"{STATE_PREFIX}{spec.quant_type}"] = state
    return specs


def pack(quantized: BlockQuantized) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear, with the shapes and dtypes of `packed_specs`."""
    spec, nested = quantized.spec, quantized.nested
    tensors = {
        "weight": quantized.codes.reshape(-1, 1),
        "weight.absmax": quantized.absmax,
        "weight.quant_map": four_bit_values(spec.quant_type),
    }
    if nested is not None:
        tensors["weight.nested_absmax"] = nested.absmax
        tensors["weight.nested_quant_map"] = dynamic_values()
    text = _state_text(spec, 0.0 if nested is None else nested.offset)
    tensors[f"{STATE_PREFIX}{spec.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], *, module: str = "") -> BlockQuantized:
    """The inverse of `pack`, for tensors read from a file.

    Args:
        tensors: by their name inside the module, as `pack` returns them.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing or unknown, its shape or dtype does not fit the JSON text, the text is
            malformed, or a code book is not the one of bitsandbytes.
    """
    state_name, quant_type = _find_state(tensors, module)
    spec, offset = _read_state(tensors[state_name], quant_type, place(module, state_name))
    expected = packed_specs(spec)
    if different := sorted(tensors.keys() ^ expected.keys()):
        raise InputError("a 4-bit layer lacks a tensor, or has one too many", where=place(module, ", ".join(different)))
    check_specs(tensors, expected, module)
    nested = None
    _check_book(tensors["weight.quant_map"], four_bit_values(quant_type), place(module, "weight.quant_map"))
    if spec.double_quant:
        _check_book(tensors["weight.nested_quant_map"], dynamic_values(), place(module, "weight.nested_quant_map"))
        nested = NestedAbsmax(tensors["weight.nested_absmax"], offset)
    return BlockQuantized(tensors["weight"].reshape(-1), tensors["weight.absmax"], nested, spec)


def state_spec(content: torch.Tensor, quant_type: QuantType, *, module: str = "") -> BlockQuantizedSpec:
    """The spec in the JSON text of a quantized linear, without its other tensors.

    Raises:
        InputError: the text is malformed.
    """
    return _read_state(content, quant_type, place(module, f"{STATE_PREFIX}{quant_type}"))[0]


def flat_absmax(quantized: BlockQuantized) -> torch.Tensor:
    """float32 [blocks]: the absmaxes, dequantized if they are quantized themselves."""
    nested = quantized.nested
    if nested is None:
        return quantized.absmax
    codes = quantized.absmax
    scales = nested.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    values = dynamic_values().to(codes.device)
    return values[codes.long()].mul_(scales).add_(torch.tensor(nested.offset, device=codes.device))


def dequantize(quantized: BlockQuantized) -> torch.Tensor:
    """The matrix [out, in] in the dtype that was quantized, each value computed in float32 and rounded once."""
    spec, absmax = quantized.spec, flat_absmax(quantized)
    values = four_bit_values(spec.quant_type).to(quantized.codes.device)
    result = torch.empty(prod(spec.shape), dtype=spec.dtype, device=values.device)
    step = _VALUES_AT_ONCE // spec.block_size * spec.block_size
    for start in range(0, result.numel(), step):
        piece = result[start : start + step]
        codes = quantized.codes[start // 2 : (start + len(piece) + 1) // 2]
        pairs = torch.stack([codes >> 4, codes & 15], 1).reshape(-1)[: len(piece)]
        scales = absmax[start // spec.block_size :].repeat_interleave(spec.block_size)[: len(piece)]
        piece.copy_(values.index_select(0, pairs.int()).mul_(scales))
    return result.reshape(spec.shape)


def _blocks(spec: BlockQuantizedSpec) -> int:
    return -(-prod(spec.shape) // spec.block_size)


def _code_bytes(spec: BlockQuantizedSpec) -> int:
    return -(-prod(spec.shape) // 2)


def _nested_blocks(blocks: int) -> int:
    return -(-blocks // NESTED_BLOCK_SIZE)


def _state_text(spec: BlockQuantizedSpec, offset: float) -> bytes:
    state: dict[str, Any] = {
        "quant_type": spec.quant_type,
        "blocksize": spec.block_size,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": spec.shape,
    }
    if spec.double_quant:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode("ascii")


def _find_state(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[str, QuantType]:
    quant_types: tuple[QuantType, ...] = ("nf4", "fp4")
    found = [(f"{STATE_PREFIX}{each}", each) for each in quant_types if f"{STATE_PREFIX}{each}" in tensors]
    if len(found) != 1:
        raise InputError(
            f"a 4-bit layer must have one quant_state, not {len(found)}", where=place(module, f"{STATE_PREFIX}nf4|fp4")
        )
    return found[0]


def _read_state(content: torch.Tensor, quant_type: QuantType, where: str) -> tuple[BlockQuantizedSpec, float]:
    """The spec in the JSON text, and the mean of the absmaxes (0 without double quantization)."""
    state = parse_json(bytes(content.reshape(-1).tolist()) if content.dtype == torch.uint8 else b"", where=where)
    double_quant = isinstance(state, dict) and "nested_offset" in state
    keys = {"quant_type", "blocksize", "dtype", "shape"}
    keys |= {"nested_blocksize", "nested_dtype", "nested_offset"} if double_quant else set()
    if not isinstance(state, dict) or state.keys() != keys:
        raise InputError(f"the quant_state must have the keys {', '.join(sorted(keys))}", where=where)
    shape, offset = state["shape"], state.get("nested_offset", 0.0)
    faults = {
        "quant_type": state["quant_type"] != quant_type,
        "blocksize": state["blocksize"] not in _BLOCK_SIZES,
        "dtype": state["dtype"] not in list(_DTYPES),
        "shape": not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)),
        "nested_blocksize": double_quant and state["nested_blocksize"] != NESTED_BLOCK_SIZE,
        "nested_dtype": double_quant and state["nested_dtype"] != "float32",
        "nested_offset": not (type(offset) is float and 0 <= offset < float("inf")),
    }
    if wrong := [key for key, fault in faults.items() if fault]:
        raise InputError(f"values of the quant_state that are not supported: {', '.join(wrong)}", where=where)
    out_features, in_features = shape
    dtype = _DTYPES[state["dtype"]]
    return BlockQuantizedSpec(out_features, in_features, quant_type, state["blocksize"], double_quant, dtype), offset


def _check_book(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    if not torch.equal(found.cpu(), expected):
        raise InputError("the code book is not the one of bitsandbytes", where=where)
