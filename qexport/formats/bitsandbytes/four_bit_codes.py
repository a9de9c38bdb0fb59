"""bitsandbytes' 4-bit codes: the same bytes as bitsandbytes computes on the CPU, many times faster.

Reference: bitsandbytes 0.50, `functional.quantize_4bit` and the kernel of its `default` backend. A value times the
reciprocal of its block's absmax, in float32, is compared with the midpoints between neighbouring values of the code
book; its code is the number of midpoints below it.

Here the upper half of the product's bits selects a cell of a table. No two midpoints share a cell, so within a cell one
comparison decides the code. The carry of an addition to the lower half makes that comparison.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

from qexport.architectures.devices import single_thread
from qexport.formats.bitsandbytes.four_bit_tensors import NESTED_BLOCK_SIZE, QuantType, dynamic_values, four_bit_values
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, NestedAbsmax

_VALUES_AT_ONCE: Final = 1 << 18
"""Large enough that the cost of calling torch is small, small enough that the buffers stay in the cache."""

_SMALLEST_ABSMAX: Final = 1e-38
_HALF: Final = 16
_LOW_HALF: Final = 0xFFFF
_LAST_STEP: Final = 65535
_MAGNITUDE: Final = 0x7FFFFFFF


def quantize(weight: torch.Tensor, spec: BlockQuantizedSpec) -> BlockQuantized:
    """The codes and absmaxes of a finite matrix [out, in] in bfloat16, float16 or float32.

    Computes on the CPU, whichever device the matrix is on, with buffers of a fixed size.
    """
    values, size = weight.cpu().reshape(-1), spec.block_size
    codes = torch.empty(-(-values.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-values.numel() // size))
    whole = values.numel() // size
    encoder = _Encoder(spec.quant_type)
    step = _VALUES_AT_ONCE // size
    for first in range(0, whole, step):
        last = min(first + step, whole)
        scaled = encoder.load(values[first * size : last * size]).view(-1, size)
        torch.amax(torch.abs(scaled, out=encoder.scratch(scaled)), 1, out=absmax[first:last])
        scaled.mul_((1.0 / absmax[first:last].clamp(min=_SMALLEST_ABSMAX))[:, None])
        encoder.encode(scaled.view(-1), codes[first * size // 2 : last * size // 2])
    if whole < absmax.numel():
        absmax[whole] = _encode_rest(values[whole * size :], encoder, codes[whole * size // 2 :])
    if spec.double_quant:
        return BlockQuantized(codes, *_quantize_absmax(absmax), spec)
    return BlockQuantized(codes, absmax, None, spec)


def _encode_rest(values: torch.Tensor, encoder: _Encoder, codes: torch.Tensor) -> torch.Tensor:
    """The last block, if it is shorter. The reference divides there, and stores no absmax below `_SMALLEST_ABSMAX`."""
    values = values.float()
    absmax = values.abs().amax().clamp(min=_SMALLEST_ABSMAX)
    padded = torch.nn.functional.pad(values / absmax, (0, values.numel() % 2))
    encoder.encode(encoder.load(padded), codes)
    return absmax


def _quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, NestedAbsmax]:
    """The second level: uint8 [blocks], one dynamic code per absmax.

    Reference: bitsandbytes 0.50, `quantize_cpu_impl` in `csrc/cpu_ops.cpp`. A value times the reciprocal of its block's
    largest is rounded to the nearest of 65536 steps from -1 to 1, and each step has one code.
    """
    with single_thread():  # the bits of a mean depend on the number of threads
        offset = absmax.mean()
    padding = -absmax.numel() % NESTED_BLOCK_SIZE
    blocks = torch.nn.functional.pad(absmax - offset, (0, padding)).view(-1, NESTED_BLOCK_SIZE)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / largest)[:, None]).clamp_(-1, 1)
    steps = ((scaled + 1) * 0.5 * _LAST_STEP + 0.5).nan_to_num_(0)  # NaN for a block of zeros, as in the reference
    codes = _codes_of_steps()[steps.int()].view(-1)[: absmax.numel()]
    return codes, NestedAbsmax(largest, float(offset))


@cache
def _codes_of_steps() -> torch.Tensor:
    """uint8 [65536]: the dynamic code nearest to each step."""
    values = dynamic_values()
    steps = torch.arange(_LAST_STEP + 1, dtype=torch.float32).mul_(2).div_(_LAST_STEP).sub_(1)
    return torch.searchsorted((values[:-1] + values[1:]) * 0.5, steps).to(torch.uint8)


class _Encoder:
    """Finds the codes of scaled values, at most `_VALUES_AT_ONCE` at a time, in buffers that it reuses."""

    def __init__(self, quant_type: QuantType) -> None:
        self._cells, self._pairs = _cells(quant_type), _pairs(quant_type)
        self._values = torch.empty(_VALUES_AT_ONCE)
        self._scratch = torch.empty(_VALUES_AT_ONCE, dtype=torch.int32)
        self._found = torch.empty(_VALUES_AT_ONCE, dtype=torch.int32)
        self._halves = torch.empty(_VALUES_AT_ONCE, dtype=torch.int16)

    def load(self, values: torch.Tensor) -> torch.Tensor:
        """The values as float32, in the buffer."""
        return self._values[: values.numel()].copy_(values)

    def scratch(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer for float32 values, free until `encode`."""
        return self._scratch[: like.numel()].view(torch.float32).view(like.shape)

    def encode(self, scaled: torch.Tensor, codes: torch.Tensor) -> None:
        """Writes two codes per byte to uint8 [n / 2] from values [n] between -1 and 1, which it overwrites."""
        count = scaled.numel()
        bits, keys, found = scaled.view(torch.int32), self._scratch[:count], self._found[:count]
        _order(bits, keys)
        torch.bitwise_right_shift(bits, _HALF, out=keys)
        keys.add_(1 << (_HALF - 1))
        torch.index_select(self._cells, 0, keys, out=found)
        found.add_(bits.bitwise_and_(_LOW_HALF)).bitwise_right_shift_(_HALF)
        pairs = self._halves[:count].copy_(found).view(torch.int32)  # the earlier code is in the low half
        earlier = torch.bitwise_left_shift(pairs, 4, out=keys[: count // 2])
        packed = pairs.bitwise_right_shift_(_HALF).bitwise_or_(earlier)
        if self._pairs is None:
            codes.copy_(packed)
        else:
            torch.index_select(self._pairs, 0, packed.bitwise_and_(0xFF), out=codes)


def _order(bits: torch.Tensor, scratch: torch.Tensor) -> None:
    """Turns the bits of float32 values, in place, into int32 that sort as the values do."""
    torch.bitwise_right_shift(bits, 31, out=scratch)
    bits.bitwise_xor_(scratch.bitwise_and_(_MAGNITUDE))


@cache
def _cells(quant_type: QuantType) -> torch.Tensor:
    """int32 [65536]: for each upper half of the ordered bits, what to add to the lower half.

    The sum's upper half is the number of midpoints below the value.
    """
    values = four_bit_values(quant_type).sort().values
    midpoints = ((values[:-1] + values[1:]) / 2).view(torch.int32)
    _order(midpoints, torch.empty_like(midpoints))
    starts = torch.arange(-(1 << (_HALF - 1)), 1 << (_HALF - 1), dtype=torch.int32) << _HALF
    cells = torch.bucketize(starts, midpoints, out_int32=True) << _HALF
    cells[(midpoints >> _HALF) + (1 << (_HALF - 1))] += _LOW_HALF - (midpoints & _LOW_HALF)
    return cells


@cache
def _pairs(quant_type: QuantType) -> torch.Tensor | None:
    """uint8 [256]: for a byte of two positions in the sorted code book, the byte of the two codes at these positions.

    None if the code book is sorted.
    """
    order = four_bit_values(quant_type).argsort(stable=True)
    if torch.equal(order, torch.arange(16)):
        return None
    return (order[:, None] << 4 | order).to(torch.uint8).view(-1)
