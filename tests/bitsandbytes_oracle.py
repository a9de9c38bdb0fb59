"""What bitsandbytes' 4-bit tensors stand for: from its code tables, and by its own reading where that is right.

bitsandbytes 0.50.2 reads some matrices wrongly on x86 CPUs with AVX-512. Its kernel counts the blocks of a row from the
row's start, so it takes wrong absmaxes where a block holds values of two rows. Found by comparing it with `values` for
6,048 combinations of shape, block size, code table and dtype, with torch's vector instructions as they are and at AVX2.
"""

from __future__ import annotations

from math import prod

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

AVX512 = bool(torch.cpu.get_capabilities().get("avx512_f"))
"""Of the CPU: bitsandbytes' kernel asks the CPU, so `ATEN_CPU_CAPABILITY` does not change what it does."""

TORCH_USES_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Where it does, bitsandbytes leaves block sizes from 2048 on to plain torch."""


def reads_right(shape: tuple[int, ...], block_size: int) -> bool:
    """Whether bitsandbytes' own `dequantize_4bit` is right on this CPU, for a matrix [out, in]."""
    rows, columns = shape
    crosses = columns % block_size != 0 and rows > 1 and rows * columns > block_size
    kernel = AVX512 and columns % 16 == 0 and not (TORCH_USES_AVX512 and block_size >= 2048)
    return not (crosses and kernel)


def values(codes: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The matrix, each value computed in float32 from bitsandbytes' own tables and rounded once."""
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * scales + state.offset
    count = prod(state.shape)
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[:count]
    table = get_4bit_type(state.quant_type, device="cpu")
    flat: torch.Tensor = table[nibbles.long()] * absmax.repeat_interleave(state.blocksize)[:count]
    return flat.to(state.dtype).reshape(state.shape)


def own_values(codes: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The matrix as bitsandbytes itself reads it."""
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles for each odd shape
        return dequantize_4bit(codes, state).reshape(state.shape)  # one byte of codes comes back transposed
