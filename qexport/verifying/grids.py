"""The values of codes, and the values of the same grids that are nearest to a reference, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qexport.formats.bitsandbytes.four_bit_tensors import dequantize, flat_absmax, four_bit_values
from qexport.tensors import (
    BlockQuantized,
    Float4Quantized,
    Float8Quantized,
    GroupQuantized,
    Quantized,
    RowQuantized,
    ValuesQuantized,
)
from qexport.tensors.float4 import GROUP_SIZES, float4_values, nearest_float4
from qexport.tensors.float8 import LARGEST_FLOAT8

_VALUES_AT_ONCE: Final = 1 << 21


@dataclass(frozen=True)
class Strip:
    """Some rows of a quantized matrix beside the reference's. All are float32 [rows, in].

    Attributes:
        first: the first row.
        values: of the codes.
        nearest: the values of the same grid that are nearest to the reference's; where the grid is not known, the
            reference's with errors of the size that rounding to even steps has.
        reference: the reference's values.
    """

    first: int
    values: Tensor
    nearest: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Groups:
    """The inputs that share a scale.

    Attributes:
        order: int64 [in], the inputs, those of a group together; None if they are together as they are.
        size: inputs per group, the same for all.
    """

    order: Tensor | None
    size: int

    def sums(self, values: Tensor) -> Tensor:
        """The sums of values [rows, in] over each group, [rows, groups]."""
        ordered = values if self.order is None else values[:, self.order]
        return ordered.reshape(len(values), -1, self.size).sum(2)


def strips(quantized: Quantized, reference: Tensor, *, rounded: bool = False) -> Iterator[Strip]:
    """The whole matrix, from its first row to its last.

    Args:
        quantized: the codes [out, in].
        reference: [out, in], of any floating dtype.
        rounded: whether the values of the codes are known to be the nearest ones, which then need not be found.
    """
    whole = dequantize(quantized) if isinstance(quantized, BlockQuantized) else None
    step = max(1, _VALUES_AT_ONCE // reference.shape[1])
    for first in range(0, len(reference), step):
        wanted = reference[first : first + step].to(torch.float32)
        if isinstance(quantized, BlockQuantized):
            assert whole is not None
            values = whole[first : first + step].to(torch.float32)
            nearest = values if rounded else _nearest_in_blocks(quantized, wanted, first)
        else:
            part = quantized.rows(first, first + step)
            values = part.dequantize()
            nearest = values if rounded else _nearest(part, wanted)
        yield Strip(first, values, nearest, wanted)


def _nearest(
    part: GroupQuantized | RowQuantized | Float8Quantized | Float4Quantized | ValuesQuantized, wanted: Tensor
) -> Tensor:
    if isinstance(part, Float4Quantized):
        scales = part.scale_of_each
        return float4_values(nearest_float4((wanted / scales).nan_to_num_())).mul_(scales)
    if isinstance(part, Float8Quantized):
        scales = part.scale_of_each
        codes = (wanted / scales).nan_to_num_().clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)
        return codes.to(torch.float32).mul_(scales)
    if isinstance(part, ValuesQuantized):
        return _rounded_in_ranges(wanted, part.bits, part.block_size)
    if isinstance(part, RowQuantized):
        scales = part.scales[:, None].to(torch.float32)
        return (wanted / scales).nan_to_num_().round_().clamp_(-127, 127).mul_(scales)
    group = part.g_idx.long()
    scales, zeros = part.scales.t().to(torch.float32)[:, group], part.zeros.t().to(torch.float32)[:, group]
    codes = (wanted / scales).nan_to_num_().round_().add_(zeros).clamp_(0, 2**part.bits - 1)
    return codes.sub_(zeros).mul_(scales)


def _rounded_in_ranges(wanted: Tensor, bits: int, block_size: int) -> Tensor:
    """With drawn errors of up to half a step, as even steps over the range of each block have. They are not computed: a
    reference that was itself quantized may lie on such steps and would allow no error.
    """
    blocks = wanted.reshape(len(wanted), -1, block_size)
    steps = (blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)) / (2**bits - 1)
    errors = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0)).sub_(0.5)
    return errors.mul_(steps).add_(blocks).view(wanted.shape)


def _nearest_in_blocks(quantized: BlockQuantized, wanted: Tensor, first: int) -> Tensor:
    """Rounded to the dtype that was quantized, as the values of the codes are."""
    spec, columns = quantized.spec, wanted.shape[1]
    places = torch.arange(first * columns, first * columns + wanted.numel()) // spec.block_size
    scales = flat_absmax(quantized)[places].view(wanted.shape)
    book = four_bit_values(spec.quant_type).sort().values
    codes = torch.bucketize((wanted / scales).nan_to_num_(), (book[:-1] + book[1:]) / 2)
    return (book[codes] * scales).to(spec.dtype).to(torch.float32)


def groups_of(quantized: Quantized) -> Groups | None:
    """The inputs that share a scale; None where that is a whole row, where groups end within a row, or where they are
    not of one size.
    """
    if isinstance(quantized, RowQuantized):
        return None
    if isinstance(quantized, ValuesQuantized):
        return Groups(None, quantized.block_size) if quantized.block_size < quantized.values.shape[1] else None
    if isinstance(quantized, BlockQuantized):
        return _in_order(quantized.spec.block_size, quantized.spec.in_features)
    if isinstance(quantized, Float8Quantized):
        return _in_order(quantized.block[1], quantized.codes.shape[1])
    if isinstance(quantized, Float4Quantized):
        return _in_order(GROUP_SIZES[quantized.kind], quantized.codes.shape[1])
    g_idx, columns = quantized.g_idx.long(), quantized.codes.shape[1]
    count = len(quantized.scales)
    if count == 1 or columns % count or bool((g_idx.bincount(minlength=count) != columns // count).any()):
        return None
    in_order = bool((g_idx[1:] >= g_idx[:-1]).all())
    return Groups(None if in_order else g_idx.argsort(stable=True), columns // count)


def _in_order(size: int, columns: int) -> Groups | None:
    return Groups(None, size) if size < columns and columns % size == 0 else None
