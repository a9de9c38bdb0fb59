"""Codes in e2m1 with a scale for each group along the inputs, computed a few rows at a time."""

from __future__ import annotations

from typing import Final

import torch

from qexport.tensors import Float4Quantized
from qexport.tensors.float4 import (
    GROUP_SIZES,
    LARGEST_EXPONENT,
    LARGEST_FLOAT4,
    nearest_float4,
    powers_of_two,
)
from qexport.tensors.float8 import LARGEST_FLOAT8

_VALUES_AT_ONCE: Final = 1 << 20
_MANTISSA: Final = 23
_QUARTER: Final = 1 << (_MANTISSA - 2)
_LARGEST_POWER: Final = 2
"""Of the powers of two that e2m1 has: 4."""


def global_scale_of(absmax: float) -> torch.Tensor:
    """The scale of a whole matrix in NVFP4, float32 [1]: `448 * 6 / absmax`. The largest group's scale is 448 then.

    It is 1 where that overflows float32, as in compressed-tensors (`generate_gparam`).

    Args:
        absmax: the largest magnitude in the matrix, and in those that share the scale.
    """
    scale = LARGEST_FLOAT8 * LARGEST_FLOAT4 / torch.tensor([absmax], dtype=torch.float32)
    return torch.where(scale.isfinite(), scale, 1.0)


def nvfp4(weight: torch.Tensor, global_scale: torch.Tensor) -> Float4Quantized:
    """Rounds a matrix [out, in] to NVFP4.

    The scale of 16 inputs is their absmax / 6 times the global scale, rounded to e4m3; the code is the weight over the
    scale, rounded to nearest, ties to even. All is computed in float32, as compressed-tensors 0.20 does for a float32
    weight (`calculate_qparams`, `NVFP4PackedCompressor`): from a bfloat16 weight it computes scales in bfloat16, which
    rounds twice. A scale that rounds to zero is 0.125, as there.

    Args:
        weight: of any floating dtype; the inputs are a multiple of 16.
        global_scale: float32 [1], see `global_scale_of`.
    """
    global_scale = global_scale.to(weight.device)
    size = GROUP_SIZES["nvfp4"]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // size, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in _pieces(weight):
        groups = weight[rows].to(torch.float32).unflatten(1, (-1, size))
        found = global_scale * (groups.abs().amax(2) / LARGEST_FLOAT4)
        found = found.clamp_(max=LARGEST_FLOAT8).to(torch.float8_e4m3fn).to(torch.float32)
        found = torch.where(found > 0, found, torch.finfo(torch.float8_e4m3fn).eps)
        scales[rows] = found.to(torch.float8_e4m3fn)
        codes[rows] = nearest_float4(groups / (found / global_scale)[:, :, None]).flatten(1)
    return Float4Quantized(codes, scales, global_scale)


def mxfp4(weight: torch.Tensor) -> Float4Quantized:
    """Rounds a matrix [out, in] to MXFP4.

    The scale of 32 inputs is the power of two below their absmax, or above if the absmax is at least 1.75 times the one
    below, over 4; so their largest magnitude becomes 3.5 to 7 and is rounded to 4 or 6. That is compressed-tensors'
    rule (`generate_mx_scales`, 0.20). The code is the weight over the scale, rounded to nearest, ties to even.

    Args:
        weight: of any floating dtype; the inputs are a multiple of 32.
    """
    size = GROUP_SIZES["mxfp4"]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // size, dtype=torch.uint8, device=weight.device)
    for rows in _pieces(weight):
        groups = weight[rows].to(torch.float32).unflatten(1, (-1, size))
        absmax = groups.abs().amax(2).view(torch.int32)
        exponents = ((absmax + _QUARTER) >> _MANTISSA) - _LARGEST_POWER
        scales[rows] = exponents.clamp_(0, LARGEST_EXPONENT).to(torch.uint8)
        codes[rows] = nearest_float4(groups / powers_of_two(scales[rows])[:, :, None]).flatten(1)
    return Float4Quantized(codes, scales, None)


def _pieces(weight: torch.Tensor) -> list[slice]:
    step = max(1, _VALUES_AT_ONCE // weight.shape[1])
    return [slice(first, first + step) for first in range(0, len(weight), step)]
