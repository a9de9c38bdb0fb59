"""How products are cut: into fixed sizes for each kind of device, on which the bits of artifacts depend."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

ON_CUDA: Final = 2048
"""Rows, columns or inputs of one product on CUDA, which computes one product at a time on all of the device."""


def tile(on_cpu: int, device: torch.device) -> int:
    """The size of a product's side: where each product is computed by one thread of the CPU, or on CUDA."""
    return on_cpu if device.type == "cpu" else ON_CUDA


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, on CUDA in float32: 16-bit factors are multiplied on tensor cores, and summed in float32."""
    if left.device.type == "cpu" or left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
