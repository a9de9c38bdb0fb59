"""The initializers of ONNX Runtime's MatMulBnb4: bitsandbytes' 4-bit codes and one absmax a block.

The reference is ONNX Runtime 1.31.1. Bytes and code books are bitsandbytes' own. The operator knows no double
quantization, so absmaxes are written as bitsandbytes reads them. It computes with `value of the code * absmax` in
float32, where bitsandbytes rounds that product to the dtype that was quantized.

Matrices whose blocks cross rows are refused. Not all kernels take them: CUDA's for single tokens does not
(`contrib_ops/cuda/quantization/matmul_bnb4.cu`).

Absmaxes are float32 and the operator wants its activations in the same dtype: float16 ones go through Casts.
"""

from __future__ import annotations

from math import prod
from typing import Final

import torch

from qexport.errors import CompatibilityError
from qexport.packing.bitsandbytes_4bit import flat_absmax
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, TensorSpec

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)


def fault(spec: BlockQuantizedSpec) -> str | None:
    """Why codes cannot be stored, or None where they can. Needs no weights."""
    if spec.block_size not in BLOCK_SIZES:
        return f"MatMulBnb4 has blocks of 16 to 256 values, not {spec.block_size}"
    if spec.in_features % spec.block_size:
        return f"block_size {spec.block_size} does not divide {spec.in_features} inputs: blocks would cross rows"
    return None


def specs(spec: BlockQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of what `pack` makes, by the initializer's name inside the module.

    Raises:
        CompatibilityError: the codes cannot be stored.
    """
    if reason := fault(spec):
        raise CompatibilityError(f"codes cannot be stored: {reason}")
    values = prod(spec.shape)
    return {
        "weight": TensorSpec((values // 2,), torch.uint8),
        "weight.absmax": TensorSpec((values // spec.block_size,), torch.float32),
    }


def pack(quantized: BlockQuantized) -> dict[str, torch.Tensor]:
    """The initializers of a linear.

    Returns:
        weight uint8 [out * in / 2], the earlier value in the high bits, and weight.absmax float32 [blocks].

    Raises:
        CompatibilityError: the codes cannot be stored.
    """
    if reason := fault(quantized.spec):
        raise CompatibilityError(f"codes cannot be stored: {reason}")
    return {"weight": quantized.codes.reshape(-1), "weight.absmax": flat_absmax(quantized)}
