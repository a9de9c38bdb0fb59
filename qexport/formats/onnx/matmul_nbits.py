"""The initializers of ONNX Runtime's MatMulNBits: codes in blocks along the inputs, first code in the lowest bits.

The reference for shapes and bits is ONNX Runtime (`contrib_ops/cpu/quantization/matmul_nbits_helper.h`), for values its
release 1.31.1: `(code - zero point) * scale`, rounded once to float32.

Scales have the dtype of the node's inputs; the operator refuses any other. A scale that is not exact in this dtype is
an error, never rounded. The scales of rows are `absmax / 127` in float32, which is rarely exact in float16: their node
must compute in float32, between two Casts if the activations are float16.

The operator's input `g_idx`, the group of each column, is not used: with it ONNX Runtime 1.31.1 computes wrong numbers
for packed zero points or 2 bits, and refuses 8 bits. Instead the columns are sorted by group, and `order` gives the
input of each.
"""

from __future__ import annotations

from typing import Final

import torch

from qexport.errors import CompatibilityError, QexportError
from qexport.formats.int32_words import WORD_BITS, to_words
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, RowQuantized, RowQuantizedSpec, TensorSpec

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)

_ROW_ZERO: Final = 128
_ROWS_AT_ONCE: Final = 512
_SCALE_BYTES: Final = 4


def fault(spec: GroupQuantizedSpec | RowQuantizedSpec) -> str | None:
    """Why codes cannot be stored, or None if they can. Needs no weights."""
    if isinstance(spec, RowQuantizedSpec):
        return None
    if spec.bits not in (2, 4, 8):
        return f"MatMulNBits has 2, 4 and 8 bits, not {spec.bits}"
    if spec.in_features % spec.group_size:
        return f"group_size {spec.group_size} does not divide {spec.in_features} inputs"
    if spec.groups > 1 and spec.group_size % BLOCK_SIZES[0]:
        return f"group_size {spec.group_size} is not a multiple of {BLOCK_SIZES[0]}, the smallest block of MatMulNBits"
    return None


def block_size(spec: GroupQuantizedSpec | RowQuantizedSpec) -> int:
    """Inputs per block of the node: its attribute `block_size`.

    Groups are divided into whole blocks. A row with one scale may end in a padded block. Of the possible sizes, the one
    with the fewest bytes of codes and float32 scales is taken; of equals, the larger. Measured with 8-bit rows and one
    token on an AVX2 processor, its best time was within a tenth of that of the fastest size.

    Raises:
        CompatibilityError: the codes cannot be stored.
    """
    if reason := fault(spec):
        raise CompatibilityError(f"codes cannot be stored: {reason}")
    sizes: tuple[int, ...] = BLOCK_SIZES
    if isinstance(spec, GroupQuantizedSpec) and spec.groups > 1:
        sizes = tuple(size for size in BLOCK_SIZES if spec.group_size % size == 0)
    return min(reversed(sizes), key=lambda size: -(-spec.in_features // size) * (size * spec.bits // 8 + _SCALE_BYTES))


def group_specs(spec: GroupQuantizedSpec, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the initializers of `pack_groups`, by their names inside the module.

    Args:
        spec: of the codes.
        dtype: of the node's inputs, float32 or float16.

    Raises:
        CompatibilityError: the codes cannot be stored.
    """
    specs = _code_specs(spec, dtype)
    if not spec.sym:
        packed = -(-_blocks(spec) * spec.bits // 8)
        specs["zero_points"] = TensorSpec((spec.out_features, packed), torch.uint8)
    if spec.desc_act:
        specs["order"] = TensorSpec((spec.in_features,), torch.int64)
    return specs


def pack_groups(quantized: GroupQuantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The initializers of a linear with codes in groups.

    Args:
        quantized: codes on the CPU.
        dtype: of the node's inputs, float32 or float16.

    Returns:
        qweight uint8 [out, blocks, block * bits / 8] and scales [out, blocks] in `dtype`; for asymmetric codes
        zero_points uint8 [out, ceil(blocks * bits / 8)], without which the operator takes 2**(bits - 1); with desc_act
        order int64 [in], the input of each column of codes.

    Raises:
        CompatibilityError: the codes cannot be stored.
        QexportError: a code, zero point or group is out of range, or a scale is not exact in `dtype`.
    """
    spec = quantized.spec
    blocks = _blocks(spec)
    _check_content(quantized, spec)
    order = quantized.g_idx.argsort(stable=True) if spec.desc_act else None
    qweight = torch.empty(_code_specs(spec, dtype)["qweight"].shape, dtype=torch.uint8)
    for start in range(0, spec.out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes = quantized.codes[rows] if order is None else quantized.codes[rows].index_select(1, order)
        padding = quantized.zeros[-1, rows, None]  # only rows with a single group are padded
        qweight[rows] = _packed_blocks(codes, padding, block_size(spec), spec.bits)
    repeats = blocks // spec.groups
    scales = quantized.scales.t().repeat_interleave(repeats, 1)
    tensors = {"qweight": qweight, "scales": _cast_exactly(scales, dtype)}
    if not spec.sym:
        tensors["zero_points"] = _packed_zeros(quantized.zeros.t().repeat_interleave(repeats, 1), spec.bits)
    if order is not None:
        tensors["order"] = order
    return tensors


def row_specs(spec: RowQuantizedSpec, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the initializers of `pack_rows`, by their names inside the module.

    Args:
        spec: of the codes.
        dtype: of the node's inputs; float32, see the module's docstring.
    """
    return _code_specs(spec, dtype)


def pack_rows(quantized: RowQuantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The initializers of a linear with one scale per row: 8-bit codes around the operator's default zero point 128.

    Args:
        quantized: codes on the CPU.
        dtype: of the node's inputs; float32, see the module's docstring.

    Returns:
        qweight uint8 [out, blocks, block] and scales [out, blocks] in `dtype`, the row's scale for each block.

    Raises:
        QexportError: a scale is not exact in `dtype`.
    """
    out_features, in_features = quantized.codes.shape
    spec = RowQuantizedSpec(out_features, in_features, torch.float32)
    scales = _cast_exactly(quantized.scales[:, None].expand(-1, _blocks(spec)), dtype)
    qweight = torch.empty(_code_specs(spec, dtype)["qweight"].shape, dtype=torch.uint8)
    padding = torch.tensor(_ROW_ZERO, dtype=torch.uint8)
    for start in range(0, spec.out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes = quantized.codes[rows].view(torch.uint8) ^ _ROW_ZERO  # adds 128 modulo 256
        qweight[rows] = _packed_blocks(codes, padding, block_size(spec), spec.bits)
    return {"qweight": qweight, "scales": scales}


def _blocks(spec: GroupQuantizedSpec | RowQuantizedSpec) -> int:
    return -(-spec.in_features // block_size(spec))


def _code_specs(spec: GroupQuantizedSpec | RowQuantizedSpec, dtype: torch.dtype) -> dict[str, TensorSpec]:
    rows, blocks = spec.out_features, _blocks(spec)
    return {
        "qweight": TensorSpec((rows, blocks, block_size(spec) * spec.bits // 8), torch.uint8),
        "scales": TensorSpec((rows, blocks), dtype),
    }


def _packed_blocks(codes: torch.Tensor, padding: torch.Tensor, block: int, bits: int) -> torch.Tensor:
    """Codes [rows, in], padded to whole blocks, as bytes [rows, blocks, block * bits / 8]."""
    rows, columns = codes.shape
    blocks = -(-columns // block)
    padded = torch.empty((rows, blocks * block), dtype=torch.uint8)
    padded[:, :columns] = codes
    padded[:, columns:] = padding
    return to_words(padded, bits).view(torch.uint8).reshape(rows, blocks, -1)


def _packed_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points [out, blocks], each row packed into whole bytes; unused bits are 0."""
    columns = zeros.shape[1]
    whole_words = torch.nn.functional.pad(zeros, (0, -columns % (WORD_BITS // bits)))
    return to_words(whole_words, bits).view(torch.uint8)[:, : -(-columns * bits // 8)].contiguous()


def _cast_exactly(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = scales.to(dtype).contiguous()
    if bool((cast.to(scales.dtype) != scales).any()):
        name = str(dtype).removeprefix("torch.")
        raise QexportError(f"a scale would be rounded in {name}", mend="this is a defect of qexport; please report it")
    return cast


def _check_content(quantized: GroupQuantized, spec: GroupQuantizedSpec) -> None:
    reason, zeros, largest = None, quantized.zeros, (1 << spec.bits) - 1
    if not zeros.shape == quantized.scales.shape == (spec.groups, spec.out_features):
        reason = f"zeros {list(zeros.shape)} or scales are not [{spec.groups}, {spec.out_features}]"
    elif int(torch.maximum(quantized.codes.max(), zeros.max())) > largest:
        reason = f"a code or a zero point is above {largest}"
    elif not bool((quantized.scales.isfinite() & (quantized.scales > 0)).all()):
        reason = "a scale is not positive and finite"
    elif spec.sym and bool((zeros != 1 << (spec.bits - 1)).any()):
        reason = "the zero points are not symmetric although sym is set"
    elif not _groups_are_whole(quantized.g_idx, spec):
        reason = "g_idx does not fill each group, or is not in order although desc_act is not set"
    if reason:
        raise QexportError(
            f"codes cannot be packed: {reason}", mend="this is a defect of the quantizer; please report it"
        )


def _groups_are_whole(g_idx: torch.Tensor, spec: GroupQuantizedSpec) -> bool:
    in_order = torch.arange(spec.in_features, dtype=g_idx.dtype) // spec.group_size
    return torch.equal(g_idx.sort().values if spec.desc_act else g_idx, in_order)
