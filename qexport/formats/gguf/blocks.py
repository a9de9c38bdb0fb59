"""Q4_0, Q4_1 and Q8_0: blocks of 32 values along a row, with one scale each.

The reference is `ggml/src/ggml-common.h` and `ggml-quants.c` of llama.cpp. A block begins with its scale d, a float16.
Q4_0: 16 bytes follow, whose byte j holds the code of value j in its low half and that of value j + 16 in its high half;
a value is d * (code - 8). Codes of 2 and 3 bits stand there with 6 and 4 added, so that 8 is their zero as well. Q4_1:
between the scale and the same bytes is a minimum m, a float16, and a value is d * code + m. Q8_0: 32 signed codes
follow the scale, and a value is d * code.
"""

from __future__ import annotations

from typing import Final

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize
from torch import Tensor

from qexport.errors import QexportError
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, RowQuantized, RowQuantizedSpec

BLOCK: Final = 32
"""Values that share a scale."""

KINDS: Final = {
    2: GGMLQuantizationType.Q4_0,
    3: GGMLQuantizationType.Q4_0,
    4: GGMLQuantizationType.Q4_0,
    8: GGMLQuantizationType.Q8_0,
}
"""How symmetric codes of so many bits are stored."""

ASYMMETRIC: Final = GGMLQuantizationType.Q4_1
LARGEST_SHIFT: Final = 15 / 2**11
"""By how many steps of its grid a value of Q4_1 may differ from GPTQ's: minima are up to 15 steps, in float16."""

BITS: Final = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q8_0: 8}
"""The bits that a code takes, by how it is stored."""

NARROW: Final = (2, 3)
"""Bits of codes that are stored in more than they need."""

_SCALE_BYTES: Final = 2
_HALF: Final = BLOCK // 2
_ROWS_AT_ONCE: Final = 4096


def block_bytes(bits: int) -> int:
    """The bytes of a block of codes of so many bits."""
    return int(GGML_QUANT_SIZES[KINDS[bits]][1])


def _added(bits: int) -> int:
    """What is added to a code of up to 4 bits, so that 8 stands for zero."""
    return 8 - (1 << bits - 1)


def kind_of(spec: GroupQuantizedSpec | RowQuantizedSpec) -> GGMLQuantizationType:
    """How a matrix is stored."""
    symmetric = isinstance(spec, RowQuantizedSpec) or spec.sym
    return KINDS[spec.bits] if symmetric else ASYMMETRIC


def row_bytes(spec: GroupQuantizedSpec | RowQuantizedSpec) -> int:
    """The bytes of a row, whose values fill whole blocks."""
    values, size = GGML_QUANT_SIZES[kind_of(spec)]
    return spec.in_features // values * size


def fault(spec: GroupQuantizedSpec | RowQuantizedSpec, *, inexact: bool = False) -> str | None:
    """Why such a matrix cannot be stored value by value; None if it can.

    Args:
        spec: of the matrix.
        inexact: whether minima may be rounded to float16.
    """
    if isinstance(spec, RowQuantizedSpec):
        return _fault_of_rows(spec)
    if spec.bits not in KINDS:
        return f"GGUF has no type for {spec.bits} bits in groups: quantize with 2, 3, 4 or 8 bits"
    if not spec.sym and spec.bits != 4:
        return f"GGUF has no type for {spec.bits} bits with zero points: set sym: true"
    if not spec.sym and not inexact:
        return (
            "GGUF's types have no zero points that hold those of GPTQ exactly: set sym: true; or inexact: allow, "
            "which rounds a block's minimum to float16"
        )
    if spec.desc_act:
        return "GGUF has no order of columns: leave out desc_act, or set static_groups: true"
    if spec.group_size % BLOCK:
        return f"a scale of GGUF is for {BLOCK} values: a group_size of {spec.group_size} is no multiple of that"
    return None


def _fault_of_rows(spec: RowQuantizedSpec) -> str | None:
    if spec.scale_dtype != torch.float16:
        return "the scales of GGUF's types are float16: set scales: float16, which rounds them before the codes"
    if spec.in_features % BLOCK:
        return f"a scale of GGUF is for {BLOCK} values: {spec.in_features} inputs are no multiple of that"
    return None


def pack(value: GroupQuantized | RowQuantized) -> Tensor:
    """The bytes of a matrix, uint8 [out, row_bytes].

    Args:
        value: codes of 4 or symmetric ones of 2, 3 or 8 bits, in groups of a multiple of 32 in order; or rows of codes
            whose scales fit into float16.

    Raises:
        QexportError: the scale of a row does not.
    """
    if isinstance(value, RowQuantized):
        return _pack_rows(value)
    codes = value.codes.reshape(len(value.codes), -1, BLOCK)
    scales = value.scales.t().repeat_interleave(value.group_size // BLOCK, 1)
    if value.bits == 8:
        return _joined(scales, codes ^ 0x80)  # minus 128, as a signed byte
    wide = codes + _added(value.bits)
    halves = wide[..., :_HALF] | wide[..., _HALF:] << 4
    if not value.sym:
        zeros = value.zeros.t().repeat_interleave(value.group_size // BLOCK, 1)
        minima = (-scales.to(torch.float32) * zeros).to(torch.float16)
        return _joined(torch.stack([scales, minima], 2), halves)
    return _joined(scales, halves)


def _pack_rows(value: RowQuantized) -> Tensor:
    scales = value.scales.to(torch.float16)
    if not torch.equal(scales.to(torch.float32), value.scales):
        raise QexportError("a scale does not fit into float16, and GGUF would hold other values")
    codes = value.codes.reshape(len(value.codes), -1, BLOCK)
    return _joined(scales[:, None].expand(codes.shape[:2]), codes.view(torch.uint8))


def _joined(scales: Tensor, codes: Tensor) -> Tensor:
    """Blocks with their scales, float16 [out, blocks] or [out, blocks, 2] with minima, and the bytes of their codes,
    uint8 [out, blocks, bytes].
    """
    wide = scales if scales.dim() == 3 else scales[..., None]
    parts = [wide.contiguous().view(torch.uint8), codes]
    return torch.cat(parts, 2).reshape(len(scales), -1)


def rounded(value: Tensor) -> Tensor:
    """A matrix in Q8_0, with the bytes that llama.cpp's quantizer gives.

    Args:
        value: [out, in], floating point; `in` is a multiple of 32.

    Returns:
        uint8 [out, row_bytes].
    """
    parts = [quantize(part.to(torch.float32).numpy(), KINDS[8]) for part in value.cpu().split(_ROWS_AT_ONCE)]
    return torch.cat([torch.from_numpy(part) for part in parts])


def unpack(rows: Tensor, bits: int) -> GroupQuantized:
    """The codes of some rows, with one group for each block.

    Args:
        rows: uint8 [rows, row_bytes].
        bits: 2, 3, 4 or 8. Where 2 or 3 are too few for a code, all are returned with 4.
    """
    blocks = rows.reshape(len(rows), -1, block_bytes(bits))
    scales = blocks[..., :_SCALE_BYTES].contiguous().view(torch.float16)[..., 0]
    stored = blocks[..., _SCALE_BYTES:]
    codes = stored ^ 0x80 if bits == 8 else torch.cat([stored & 15, stored >> 4], 2)
    fitting = bits if bits not in NARROW else max(bits, needed_bits(codes))
    columns = blocks.shape[1] * BLOCK
    return GroupQuantized(
        codes=(codes if fitting == 8 else codes - _added(fitting)).reshape(len(rows), columns),
        scales=scales.t().contiguous(),
        zeros=torch.full(scales.t().shape, 1 << fitting - 1, dtype=torch.uint8, device=rows.device),
        g_idx=torch.arange(columns, dtype=torch.int32, device=rows.device) // BLOCK,
        bits=fitting,
        group_size=BLOCK,
        sym=True,
        desc_act=False,
    )


def needed_bits(codes: Tensor) -> int:
    """The fewest bits, 2, 3 or 4, that these codes of Q4_0 fit into, uint8 of any shape."""
    least, most = codes.aminmax()
    steps = max(8 - int(least), int(most) - 7)  # codes of n bits reach 2^(n-1) steps below zero, and one less above
    return next((bits for bits in NARROW if steps <= 1 << bits - 1), 4)
