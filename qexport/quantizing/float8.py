"""Codes in e4m3 with a scale for each block of rows and columns, computed a few rows at a time."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn.functional import pad

from qexport.tensors import Float8Quantized, Float8QuantizedSpec
from qexport.tensors.float8 import LARGEST_FLOAT8, Block, scale_of_each

_VALUES_AT_ONCE: Final = 1 << 20


def float8(weight: torch.Tensor, block: Block) -> Float8Quantized:
    """Rounds a matrix [out, in] to e4m3.

    A scale is the block's absmax over 448; the code is the weight over the scale, rounded to nearest, ties to even.
    Both are computed in float32, as compressed-tensors 0.20 does for a float32 weight (`calculate_qparams`,
    `FloatQuantizationCompressor`): from a bfloat16 weight it computes scales and quotients in bfloat16, which rounds
    twice. A block of zeros has the scale 2**-23, as there.

    Args:
        weight: of any floating dtype.
        block: the rows and columns that share a scale.
    """
    rows, columns = weight.shape
    block = min(block[0], rows), min(block[1], columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    shape = Float8QuantizedSpec(rows, columns, block).scales_shape
    scales = torch.empty(shape, device=weight.device)
    blocks = max(1, _VALUES_AT_ONCE // (columns * block[0]))
    for first in range(0, shape[0], blocks):
        part = slice(first * block[0], (first + blocks) * block[0])
        values = weight[part].to(torch.float32)
        found = scales[first : first + blocks] = _scales(values, block)
        codes[part] = (values / scale_of_each(found, values.shape, block)).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
    return Float8Quantized(codes, scales, block)


def _scales(values: torch.Tensor, block: Block) -> torch.Tensor:
    """[blocks of rows, blocks of columns]."""
    rows, columns = values.shape
    whole = pad(values, (0, -columns % block[1], 0, -rows % block[0]))
    absmax = whole.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).abs().amax((1, 3))
    scales = absmax / LARGEST_FLOAT8
    return torch.where(scales > 0, scales, torch.finfo(torch.float32).eps)
