"""The code books of bitsandbytes, as float32 vectors. The reference is bitsandbytes 0.50 (`functional.py`)."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

QuantType = Literal["nf4", "fp4"]

# Quantiles of the normal distribution (arXiv:2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# One bit of sign, two of exponent, one of mantissa; the table is in the order of the bits, and divided by its largest.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4_LARGEST = 12.0

_DYNAMIC_EXPONENTS = 7


@cache
def four_bit_values(quant_type: QuantType) -> torch.Tensor:
    """float32 [16]: what each code stands for, relative to its block's absmax. Not to be changed."""
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    magnitudes = torch.tensor(_FP4) / _FP4_LARGEST
    return torch.cat([magnitudes, 0.0 - magnitudes])  # both zeros are positive


@cache
def dynamic_values() -> torch.Tensor:
    """float32 [256], rising: the signed 8-bit dynamic data type (arXiv:1511.04561). Not to be changed.

    Decades from 1e-6 to 1, of which the n-th has 2**n equal steps in its upper nine tenths; each step is stood for by
    its middle. Zero and one are added.
    """
    decades = []
    for exponent in range(_DYNAMIC_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent - _DYNAMIC_EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2))
    middles = torch.cat(decades)
    return torch.cat([-middles, middles, torch.tensor([0.0, 1.0])]).sort().values
