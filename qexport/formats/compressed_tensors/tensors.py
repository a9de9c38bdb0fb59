"""The tensors of compressed-tensors: `int-quantized` for rows of int8 codes, `pack-quantized` for codes in groups.

The reference is compressed-tensors 0.17.0 (`compressors/naive_quantized/base.py`, `compressors/pack_quantized`), whose
formats vLLM, TGI and transformers read. Codes and zero points are stored without an offset, as bit streams in int32
words (see `qexport.formats.int32_words`): codes along the inputs, zero points along the outputs.

3 bits are not written: compressed-tensors leaves two bits of each word empty, vLLM expects all to be used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.errors import InputError, QexportError
from qexport.formats.int32_words import WORD_BITS, from_words, to_words
from qexport.formats.stored_weight import SCALE_DTYPES, check_specs, place, widened
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, RowQuantized, RowQuantizedSpec, TensorSpec

_ROWS_AT_ONCE = 512


def check_groups(spec: GroupQuantizedSpec) -> str | None:
    """Why codes in groups cannot be packed, or None if they can. Needs no weights."""
    if spec.bits not in (2, 4, 8):
        return f"compressed-tensors has no bit layout for {spec.bits} bits that all loaders share"
    multiple = WORD_BITS // spec.bits
    if spec.in_features % multiple:
        return f"{spec.bits} bits fill whole words only where the inputs are a multiple of {multiple}"
    if not spec.sym and spec.out_features % multiple:
        return f"zero points of {spec.bits} bits fill whole words only where the outputs are a multiple of {multiple}"
    if spec.in_features % spec.group_size:
        return f"group_size {spec.group_size} does not divide {spec.in_features} inputs"
    return None


def group_specs(spec: GroupQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack_groups`, by their names inside the module."""
    rows, columns = spec.shape
    specs = {
        "weight_packed": TensorSpec((rows, columns * spec.bits // WORD_BITS), torch.int32),
        "weight_scale": TensorSpec((rows, spec.groups), torch.float16),
        "weight_shape": TensorSpec((2,), torch.int64),
    }
    if not spec.sym:
        specs["weight_zero_point"] = TensorSpec((rows * spec.bits // WORD_BITS, spec.groups), torch.int32)
    if _ordered(spec):
        specs["weight_g_idx"] = TensorSpec((columns,), torch.int32)
    return specs


def pack_groups(quantized: GroupQuantized) -> dict[str, torch.Tensor]:
    """The tensors of a linear in the format `pack-quantized`.

    Returns:
        weight_packed int32 [out, in * bits / 32], weight_scale float16 [out, groups], weight_shape int64 [2]; for
        asymmetric codes weight_zero_point int32 [out * bits / 32, groups]; with desc_act weight_g_idx int32 [in].

    Raises:
        QexportError: the shape cannot be packed.
    """
    spec = quantized.spec
    if reason := check_groups(spec):
        raise QexportError(f"codes cannot be packed: {reason}")
    packed = torch.empty(group_specs(spec)["weight_packed"].shape, dtype=torch.int32)
    for start in range(0, spec.out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        packed[rows] = to_words(quantized.codes[rows], spec.bits)
    tensors = {
        "weight_packed": packed,
        "weight_scale": quantized.scales.t().contiguous(),
        "weight_shape": torch.tensor(spec.shape),
    }
    if not spec.sym:
        tensors["weight_zero_point"] = to_words(quantized.zeros, spec.bits).t().contiguous()
    if _ordered(spec):
        tensors["weight_g_idx"] = quantized.g_idx.contiguous()
    return tensors


def unpack_groups(
    tensors: Mapping[str, torch.Tensor], *, bits: int, group_size: int, sym: bool, desc_act: bool, module: str = ""
) -> GroupQuantized:
    """The inverse of `pack_groups`, for tensors read from a file.

    Args:
        tensors: as `pack_groups` returns them.
        bits: 2, 4 or 8.
        group_size: inputs per group; -1 for one group per row.
        sym: the quantization config says that the codes are symmetric.
        desc_act: the quantization config says that groups follow activation order.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing, its shape or dtype does not fit the others, or a group does not exist.
    """
    out_features, in_features = _weight_shape(tensors, module)
    group_size = in_features if group_size == -1 else group_size
    spec = GroupQuantizedSpec(out_features, in_features, bits, group_size, sym, desc_act)
    if reason := check_groups(spec):
        raise InputError(f"not a packed layer: {reason}", where=place(module, "weight_shape"))
    scales = tensors.get("weight_scale")
    wanted = group_specs(spec)
    if scales is not None and scales.dtype in SCALE_DTYPES:
        wanted["weight_scale"] = TensorSpec(wanted["weight_scale"].shape, scales.dtype)
    check_specs(tensors, wanted, module)
    device = tensors["weight_packed"].device
    codes = torch.empty(spec.shape, dtype=torch.uint8, device=device)
    for start in range(0, out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes[rows] = from_words(tensors["weight_packed"][rows], bits)
    zeros = torch.full((spec.groups, out_features), 1 << (bits - 1), dtype=torch.uint8, device=device)
    if not sym:
        zeros = from_words(tensors["weight_zero_point"].t(), bits)
    g_idx = torch.arange(in_features, dtype=torch.int32, device=device) // group_size
    if _ordered(spec):
        g_idx = tensors["weight_g_idx"]
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= spec.groups:
        raise InputError(f"weight_g_idx points outside the {spec.groups} groups", where=place(module, "weight_g_idx"))
    scales_by_group = tensors["weight_scale"].t().contiguous()
    return GroupQuantized(codes, scales_by_group, zeros, g_idx, bits, group_size, sym, desc_act)


def row_specs(spec: RowQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack_rows`, by their names inside the module."""
    return {
        "weight": TensorSpec(spec.shape, torch.int8),
        "weight_scale": TensorSpec((spec.out_features, 1), torch.float32),
    }


def pack_rows(quantized: RowQuantized) -> dict[str, torch.Tensor]:
    """The tensors of a linear in the format `int-quantized`.

    Scales are float32, in which vLLM and TGI compute (vLLM: `compressed_tensors_w8a8_int8.py`, TGI: `w8a8_int.py`).

    Returns:
        weight int8 [out, in] and weight_scale float32 [out, 1].
    """
    return {"weight": quantized.codes, "weight_scale": quantized.scales[:, None].contiguous()}


def unpack_rows(tensors: Mapping[str, torch.Tensor], *, module: str = "") -> RowQuantized:
    """The inverse of `pack_rows`, for tensors read from a file. Its `scales` are those of the file, value by value.

    Args:
        tensors: as `pack_rows` returns them; other programs store the scales in 16 bits too.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing, its shape or dtype does not fit the other, or a scale is negative or cannot
            be a row's absmax / 127.
    """
    codes = tensors.get("weight")
    if codes is None or codes.dim() != 2:
        raise InputError("a matrix of codes is missing", where=place(module, "weight"))
    rows, columns = codes.shape
    tensors = {part: widened(tensor) if part == "weight_scale" else tensor for part, tensor in tensors.items()}
    check_specs(tensors, row_specs(RowQuantizedSpec(rows, columns, torch.float32)), module)
    scales = tensors["weight_scale"][:, 0]
    absmax = scales * 127  # rounded, but dividing by 127 gives the scale of any absmax again: tested for a whole binade
    if bool((absmax / 127 != scales).any()) or bool((scales < 0).any()):
        raise InputError("a scale cannot be a row's absmax / 127", where=place(module, "weight_scale"))
    return RowQuantized(codes, absmax)


def _ordered(spec: GroupQuantizedSpec) -> bool:
    """Whether the format stores the group of each input: a single group has no order."""
    return spec.desc_act and spec.groups > 1


def _weight_shape(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[int, int]:
    shape = tensors.get("weight_shape")
    if shape is None or shape.shape != (2,) or bool((shape < 1).any()):
        raise InputError("the shape of a packed layer is missing", where=place(module, "weight_shape"))
    rows, columns = shape.tolist()
    return rows, columns
