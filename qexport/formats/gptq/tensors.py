"""The bit layout of AutoGPTQ v1: codes and zero points as a bit stream in int32 words.

The reference for the behaviour is AutoGPTQ 0.7.1 (`qlinear_cuda_old.py`), which gptqmodel, transformers, vLLM and TGI
read. Codes are one little-endian bit stream, the first code in the lowest bits of the first word; with 3 bits a code
may straddle two words, and 32 codes fill 3 words.

Zero points are stored minus 1, modulo 2**bits. A zero point of 0 is therefore stored as 2**bits - 1: loaders that add
1 and mask get it back, but gptqmodel (up to 7.6.0) adds 1 to whole words, so that the carry damages the next code.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch

from qexport.errors import InputError, QexportError
from qexport.formats.int32_words import WORD_BITS, from_words, to_words
from qexport.formats.stored_weight import check_specs, place
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, TensorSpec

_ROWS_AT_ONCE = 512


def check_shape(out_features: int, in_features: int, bits: int, group_size: int) -> str | None:
    """Why a matrix cannot be packed, or None if it can. Needs no weights.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group, already resolved (never -1).
    """
    multiple = WORD_BITS // gcd(bits, WORD_BITS)
    for side, features in (("inputs", in_features), ("outputs", out_features)):
        if features % multiple:
            return f"{bits} bits fill whole words only where the {side} are a multiple of {multiple}, not {features}"
    if in_features % group_size:
        return f"group_size {group_size} does not divide {in_features} inputs"
    return None


def packed_specs(spec: GroupQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack`, by their names inside the module."""
    rows, columns = spec.in_features * spec.bits // WORD_BITS, spec.out_features * spec.bits // WORD_BITS
    return {
        "qweight": TensorSpec((rows, spec.out_features), torch.int32),
        "qzeros": TensorSpec((spec.groups, columns), torch.int32),
        "scales": TensorSpec((spec.groups, spec.out_features), torch.float16),
        "g_idx": TensorSpec((spec.in_features,), torch.int32),
    }


def pack(quantized: GroupQuantized) -> dict[str, torch.Tensor]:
    """The four tensors of a quantized linear.

    Returns:
        qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales float16 [groups, out] and
        g_idx int32 [in], all contiguous.

    Raises:
        QexportError: the shape cannot be packed, or a code, zero point, scale or group is out of range.
    """
    _check_content(quantized)
    bits, codes = quantized.bits, quantized.codes
    out_features, in_features = codes.shape
    qweight = torch.empty((in_features * bits // WORD_BITS, out_features), dtype=torch.int32)
    for start in range(0, out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        qweight[:, rows] = to_words(codes[rows], bits).t()
    stored = (quantized.zeros - 1) & _largest(bits)
    return {
        "qweight": qweight,
        "qzeros": to_words(stored, bits),
        "scales": quantized.scales.contiguous(),
        "g_idx": quantized.g_idx.contiguous(),
    }


def unpack(
    tensors: Mapping[str, torch.Tensor],
    *,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    less_one: bool = True,
    module: str = "",
) -> GroupQuantized:
    """The inverse of `pack`, for tensors read from a file.

    Args:
        tensors: `qweight`, `qzeros`, `scales` and `g_idx` as `pack` returns them.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; -1 for one group per row.
        sym: the quantization config claims that every zero point is 2**(bits - 1).
        desc_act: the quantization config claims groups in activation order.
        less_one: zero points are stored less by one, as version 1 of the format does, and version 2 does not.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing, its shape or dtype does not fit the others, it points to a group that does
            not exist, or it contradicts `sym`.
    """
    _check_presence(tensors, module)
    out_features, in_features = tensors["scales"].shape[1], tensors["g_idx"].shape[0]
    group_size = in_features if group_size == -1 else group_size
    _check_packed(tensors, GroupQuantizedSpec(out_features, in_features, bits, group_size, sym, desc_act), module)
    codes = torch.empty((out_features, in_features), dtype=torch.uint8, device=tensors["qweight"].device)
    for start in range(0, out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes[rows] = from_words(tensors["qweight"][:, rows].t(), bits)
    stored = from_words(tensors["qzeros"], bits)
    zeros = (stored + 1) & _largest(bits) if less_one else stored
    if sym and bool((zeros != 1 << (bits - 1)).any()):
        raise InputError("the quantization config says sym, but the zero points differ", where=place(module, "qzeros"))
    return GroupQuantized(codes, tensors["scales"], zeros, tensors["g_idx"], bits, group_size, sym, desc_act)


def _largest(bits: int) -> int:
    return (1 << bits) - 1


def _check_content(quantized: GroupQuantized) -> None:
    codes, zeros, scales, g_idx = quantized.codes, quantized.zeros, quantized.scales, quantized.g_idx
    out_features, in_features = codes.shape
    reason = check_shape(out_features, in_features, quantized.bits, quantized.group_size)
    groups = in_features // quantized.group_size
    if reason is None and not zeros.shape == scales.shape == (groups, out_features):
        reason = f"zeros {tuple(zeros.shape)} and scales {tuple(scales.shape)} are not [{groups}, {out_features}]"
    if reason is None and not (codes.dtype == zeros.dtype == torch.uint8 and scales.dtype == torch.float16):
        reason = f"codes {codes.dtype}, zeros {zeros.dtype}, scales {scales.dtype} do not have the dtypes of the format"
    if reason is None and int(torch.maximum(codes.max(), zeros.max())) > _largest(quantized.bits):
        reason = f"a code or a zero point is above {_largest(quantized.bits)}"
    if reason is None and not bool((scales.isfinite() & (scales > 0)).all()):
        reason = "a scale is not positive and finite in float16"
    if reason is None and quantized.sym and bool((zeros != 1 << (quantized.bits - 1)).any()):
        reason = "the zero points are not symmetric although sym is set"
    if reason := reason or _g_idx_fault(g_idx, in_features, groups):
        raise QexportError(
            f"codes cannot be packed: {reason}", mend="this is a defect of the quantizer; please report it"
        )


def _check_presence(tensors: Mapping[str, torch.Tensor], module: str) -> None:
    for name, dimensions in (("qweight", 2), ("qzeros", 2), ("scales", 2), ("g_idx", 1)):
        if name not in tensors:
            raise InputError("a tensor of a quantized layer is missing", where=place(module, name))
        if tensors[name].dim() != dimensions:
            found = list(tensors[name].shape)
            raise InputError(f"expected {dimensions} dimensions, found shape {found}", where=place(module, name))


def _check_packed(tensors: Mapping[str, torch.Tensor], spec: GroupQuantizedSpec, module: str) -> None:
    if reason := check_shape(spec.out_features, spec.in_features, spec.bits, spec.group_size):
        raise InputError(f"not a packed layer: {reason}", where=place(module, "scales, g_idx"))
    check_specs(tensors, packed_specs(spec), module)
    if fault := _g_idx_fault(tensors["g_idx"], spec.in_features, spec.groups):
        raise InputError(fault, where=place(module, "g_idx"))


def _g_idx_fault(g_idx: torch.Tensor, in_features: int, groups: int) -> str | None:
    if g_idx.shape != (in_features,) or g_idx.dtype != torch.int32:
        return f"g_idx is {g_idx.dtype} {list(g_idx.shape)}, not int32 [{in_features}]"
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        return f"g_idx points outside the {groups} groups"
    return None
