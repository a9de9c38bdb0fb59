"""Weights in 4-bit floating point (e2m1), with a scale for each group along the inputs: NVFP4 and MXFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch

Float4Kind = Literal["nvfp4", "mxfp4"]
"""Groups of 16 with scales in e4m3 and one float32 scale for the matrix, or groups of 32 with powers of two."""

GROUP_SIZES: Final[dict[Float4Kind, int]] = {"nvfp4": 16, "mxfp4": 32}
"""Inputs that share a scale."""

LARGEST_FLOAT4: Final = 6.0
"""The largest value of e2m1, which has neither infinity nor NaN."""

LARGEST_EXPONENT: Final = 252
"""The largest stored exponent of a power of two with which 6 is finite in float32."""

_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN: Final = 8
_MIDDLES: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Float4Quantized:
    """A matrix in e2m1.

    The value of output o and input i is the value of `codes[o, i]` times the scale of its group: `scales[o, i // 16] /
    global_scale` in NVFP4, `2 ** (scales[o, i // 32] - 127)` in MXFP4.

    Attributes:
        codes: uint8 [out, in], 0 to 15: the sign, two bits of the exponent, one of the mantissa.
        scales: float8_e4m3fn [out, in / 16], not negative; or uint8 [out, in / 32], at most `LARGEST_EXPONENT`.
        global_scale: float32 [1], positive, for NVFP4; None for MXFP4.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None

    @property
    def kind(self) -> Float4Kind:
        """Which of the two it is."""
        return "mxfp4" if self.global_scale is None else "nvfp4"

    @property
    def scale_of_groups(self) -> torch.Tensor:
        """What the values of codes are multiplied by, float32 [out, groups]."""
        if self.global_scale is None:
            return powers_of_two(self.scales)
        return self.scales.to(torch.float32) / self.global_scale

    @property
    def scale_of_each(self) -> torch.Tensor:
        """`scale_of_groups` for each value, float32 [out, in]."""
        return self.scale_of_groups.repeat_interleave(GROUP_SIZES[self.kind], 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once to `dtype`."""
        return (float4_values(self.codes) * self.scale_of_each).to(dtype)

    def rows(self, start: int, end: int) -> Float4Quantized:
        """The outputs from `start` up to `end`."""
        return Float4Quantized(self.codes[start:end], self.scales[start:end], self.global_scale)

    def equals(self, other: Float4Quantized) -> bool:
        """Whether codes and scales are the same, bit for bit."""
        same = torch.equal(self.codes, other.codes) and self.kind == other.kind
        same = same and torch.equal(self.scales.view(torch.uint8), other.scales.view(torch.uint8))
        if self.global_scale is None or other.global_scale is None:
            return same
        return same and torch.equal(self.global_scale, other.global_scale)


@dataclass(frozen=True)
class Float4QuantizedSpec:
    """What is known of a `Float4Quantized` before it is computed.

    Attributes:
        out_features: rows of the matrix.
        in_features: columns of the matrix, a multiple of the group size.
        kind: which scales it has.
        absmax: the largest magnitude in all matrices that share the global scale of NVFP4; None if it is not known yet,
            or if the matrix has a scale of its own.
    """

    out_features: int
    in_features: int
    kind: Float4Kind
    absmax: float | None = None

    bits: ClassVar[int] = 4

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return GROUP_SIZES[self.kind]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features


def float4_values(codes: torch.Tensor) -> torch.Tensor:
    """The values of e2m1 codes, float32 of the same shape; code 8 is the negative zero."""
    book = torch.tensor(_MAGNITUDES, device=codes.device)
    return torch.cat([book, -book])[codes.to(torch.int32)]


def nearest_float4(quotients: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest values of e2m1, uint8 of the same shape.

    Of two values that are equally near it is the one with an even code. What is beyond 6 becomes 6, and a negative
    number that becomes zero keeps its sign.

    Args:
        quotients: float32, weights over their scales.
    """
    middles = torch.tensor(_MIDDLES, dtype=torch.float32)
    middles[1::2] = middles[1::2].nextafter(torch.zeros(3))  # the values in these middles go up
    codes = torch.bucketize(quotients.abs(), middles.to(quotients.device), out_int32=True)
    return codes.add_((quotients < 0).to(torch.int32), alpha=_SIGN).to(torch.uint8)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """`2 ** (exponents - 127)` as float32, for uint8 exponents up to 254."""
    bits = exponents.to(torch.int32)
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)
