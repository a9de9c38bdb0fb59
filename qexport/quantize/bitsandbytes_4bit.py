"""bitsandbytes' 4-bit code books, with the bytes that bitsandbytes finds."""

from __future__ import annotations

import torch

from qexport.tensors import BlockQuantized, BlockQuantizedSpec, NestedAbsmax


def quantize(weight: torch.Tensor, spec: BlockQuantizedSpec) -> BlockQuantized:
    """The codes and absmaxes of a matrix [out, in].

    Reference: bitsandbytes `functional.quantize_4bit`.
    """
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type=spec.quant_type
    )
    nested = NestedAbsmax(state.state2.absmax.cpu(), float(state.offset)) if state.nested else None
    return BlockQuantized(codes.cpu().reshape(-1), state.absmax.cpu(), nested, spec)
