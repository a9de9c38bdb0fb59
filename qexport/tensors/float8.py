"""Weights in 8-bit floating point (e4m3), with a scale for each row or each block of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch

LARGEST_FLOAT8: Final = 448.0
"""The largest finite value of e4m3 (`torch.float8_e4m3fn`), which has no infinity."""

Block = tuple[int, int]
"""The rows and columns that share a scale."""


@dataclass(frozen=True)
class Float8Quantized:
    """A matrix in e4m3.

    The value of output o and input i is `codes[o, i] * scales[o // block[0], i // block[1]]`.

    Attributes:
        codes: float8_e4m3fn [out, in], without NaN.
        scales: float32 [ceil(out / block[0]), ceil(in / block[1])], not negative.
        block: the rows and columns that share a scale; the last blocks may be smaller.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: Block

    @property
    def scale_of_each(self) -> torch.Tensor:
        """float32 [out, in], or [out, 1] if the values of a row share one scale."""
        return scale_of_each(self.scales, self.codes.shape, self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once to `dtype`."""
        return (self.codes.to(torch.float32) * self.scale_of_each).to(dtype)

    def rows(self, start: int, end: int) -> Float8Quantized:
        """The outputs from `start` up to `end`, each with scales of its own."""
        codes = self.codes[start:end]
        blocks = torch.arange(start, start + len(codes), device=codes.device) // self.block[0]
        return Float8Quantized(codes, self.scales[blocks], (1, self.block[1]))

    def equals(self, other: Float8Quantized) -> bool:
        """Whether codes and scales are the same, bit for bit."""
        same = self.block == other.block and torch.equal(self.scales, other.scales)
        return same and torch.equal(self.codes.view(torch.uint8), other.codes.view(torch.uint8))


def scale_of_each(scales: torch.Tensor, shape: torch.Size, block: Block) -> torch.Tensor:
    """Scales of blocks as a scale for each value of a matrix of this shape; for each row if a block has all columns."""
    rows = torch.arange(shape[0], device=scales.device) // block[0]
    if block[1] >= shape[1]:
        return scales[rows]
    columns = torch.arange(shape[1], device=scales.device) // block[1]
    return scales[rows][:, columns]


@dataclass(frozen=True)
class Float8QuantizedSpec:
    """What is known of a `Float8Quantized` before it is computed.

    Attributes:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        block: the rows and columns that share a scale.
    """

    out_features: int
    in_features: int
    block: Block

    bits: ClassVar[int] = 8

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return min(self.block[1], self.in_features)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features

    @property
    def scales_shape(self) -> tuple[int, int]:
        """[blocks of rows, blocks of columns]."""
        return -(-self.out_features // self.block[0]), -(-self.in_features // self.block[1])
