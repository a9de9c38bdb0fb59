"""The initializers of a W8A8 linear around ONNX's MatMulInteger: uint8 codes about 128, and a scale for each output.

Codes are uint8 although they were int8: ONNX Runtime's AVX2 kernel for int8 weights adds pairs of products in 16 bits,
which saturate. With uint8 on both sides, and zero points 128, the sums are exact.
"""

from __future__ import annotations

from typing import Final

import torch

from qexport.errors import CompatibilityError
from qexport.tensors import RowQuantized, RowQuantizedSpec, TensorSpec

ZERO_POINT: Final = 128

_MOST_INPUTS: Final = (2**31 - 1) // (128 * 127)
_ROWS_AT_ONCE: Final = 512


def fault(spec: RowQuantizedSpec) -> str | None:
    """Why codes cannot be stored, or None where they can. Needs no weights."""
    if spec.in_features > _MOST_INPUTS:
        return f"the products of {spec.in_features} inputs may not fit int32; {_MOST_INPUTS} do"
    return None


def specs(spec: RowQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of what `pack` makes, by the initializer's name inside the module."""
    return {
        "qweight": TensorSpec((spec.in_features, spec.out_features), torch.uint8),
        "scales": TensorSpec((spec.out_features,), torch.float32),
    }


def pack(quantized: RowQuantized) -> dict[str, torch.Tensor]:
    """The initializers of a linear.

    Args:
        quantized: codes on the CPU.

    Returns:
        qweight uint8 [in, out], codes + 128, and scales float32 [out].

    Raises:
        CompatibilityError: the codes cannot be stored.
    """
    rows, columns = quantized.codes.shape
    if reason := fault(RowQuantizedSpec(rows, columns, torch.float32)):
        raise CompatibilityError(f"codes cannot be stored: {reason}")
    qweight = torch.empty((columns, rows), dtype=torch.uint8)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        qweight[:, part] = (quantized.codes[part].view(torch.uint8) ^ ZERO_POINT).t()  # adds 128, wrapping at 256
    return {"qweight": qweight, "scales": quantized.scales}
