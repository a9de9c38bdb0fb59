"""Symmetric int8 codes with one scale a row."""

from __future__ import annotations

import torch

from qexport.tensors import RowQuantized


def w8a8(weight: torch.Tensor) -> RowQuantized:
    """Rounds each row [in] of a matrix [out, in] to 127 steps either side of zero.

    The scale is the row's absmax over 127, in float32; a row of zeros has scale 0 and codes 0.
    """
    values = weight.to(torch.float32)
    absmax = values.abs().amax(1)
    steps = torch.where(absmax > 0, absmax / 127, 1.0)
    codes = (values / steps[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return RowQuantized(codes.cpu(), absmax.cpu())


def llm_int8(weight: torch.Tensor) -> RowQuantized:
    """The codes that bitsandbytes finds for an LLM.int8 layer, from the weight rounded to float16.

    Reference: bitsandbytes `functional.int8_vectorwise_quant`, and `Int8Params.cpu`/`cuda`.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, absmax, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return RowQuantized(codes.cpu(), absmax.cpu())
