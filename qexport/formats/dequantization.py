"""Codes dequantized to one 16-bit or 32-bit weight, a few hundred rows at a time to save memory."""

from __future__ import annotations

from typing import Final

import torch

from qexport.formats.bitsandbytes import four_bit_tensors
from qexport.tensors import BlockQuantized, Quantized

_ROWS_AT_ONCE: Final = 512


def dequantize(quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] on the device of the codes, computed in float32 and rounded to `dtype`.

    bitsandbytes' 4-bit codes are first rounded to the dtype that was quantized, as bitsandbytes does.
    """
    if isinstance(quantized, BlockQuantized):
        return four_bit_tensors.dequantize(quantized).to(dtype)
    weight = torch.empty(quantized.codes.shape, dtype=dtype, device=quantized.codes.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        end = start + _ROWS_AT_ONCE
        weight[start:end] = quantized.rows(start, end).dequantize(dtype)
    return weight
