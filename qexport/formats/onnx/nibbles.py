"""8-bit codes as two matrices of 4 bits, for two MatMulNBits whose outputs are added.

A code is `16 * high + low`, and so is a zero point. The weight `scale * (code - zero)` is then
`16 * scale * (high - high zero) + scale * (low - low zero)`: one node multiplies with each nibble and the same scales,
the output of the first is multiplied by 16, which is exact, and the two are added. At `accuracy_level` 0 ONNX Runtime
1.31's node for 8 bits unpacks the whole matrix for every token on CPUs, its node for 4 bits does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from qexport.tensors import TensorSpec

HIGH: Final = "high"
LOW: Final = "low"
FACTOR: Final = 16
"""Of the high nibble's output."""

_SPLIT: Final = ("qweight", "zero_points")


def split_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the initializers of `split`.

    Args:
        specs: those of one 8-bit MatMulNBits.
    """
    split: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if name in _SPLIT:
            half = TensorSpec((*spec.shape[:-1], -(-spec.shape[-1] // 2)), spec.dtype)
            split |= {f"{name}_{HIGH}": half, f"{name}_{LOW}": half}
        else:
            split[name] = spec
    if "zero_points" not in specs:
        rows, blocks = specs["scales"].shape
        split[f"zero_points_{LOW}"] = TensorSpec((rows, -(-blocks // 2)), torch.uint8)
    return split


def split(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The initializers of two 4-bit MatMulNBits.

    Args:
        parts: the initializers of one 8-bit MatMulNBits, see `matmul_nbits`.

    Returns:
        qweight_high and qweight_low uint8 [out, blocks, block / 2], the earlier code in the low bits; scales [out,
        blocks], of both nodes; zero_points_low uint8 [out, ceil(blocks / 2)], and zero_points_high if there are zero
        points: without them they are 128, whose high nibble is the operator's default; order as it is.
    """
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in parts.items():
        if name in _SPLIT:
            halves |= {f"{name}_{HIGH}": _packed(tensor >> 4), f"{name}_{LOW}": _packed(tensor & 15)}
        else:
            halves[name] = tensor
    if "zero_points" not in parts:
        rows, blocks = parts["scales"].shape
        halves[f"zero_points_{LOW}"] = torch.zeros((rows, -(-blocks // 2)), dtype=torch.uint8)
    return halves


def _packed(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n], each below 16, as uint8 [..., ceil(n / 2)]; the unused bits are 0."""
    even = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return even[..., ::2] | even[..., 1::2] << 4
