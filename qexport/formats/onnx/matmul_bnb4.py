"""The initializers of ONNX Runtime's MatMulBnb4: bitsandbytes' 4-bit codes and one absmax per block.

The reference is ONNX Runtime 1.31.1, and for reading its `docs/ContribOperators.md`. Bytes and code books are
those of bitsandbytes. The operator has no double quantization, so absmaxes are written dequantized. It computes with
`value of the code * absmax` in float32, where bitsandbytes rounds that product to the dtype that was quantized.

Matrices whose blocks cross rows are refused. Not all kernels take them: the CUDA kernel for single tokens does not
(`contrib_ops/cuda/quantization/matmul_bnb4.cu`).

Absmaxes are float32, and the operator requires activations of the same dtype: float16 activations go through Casts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

import torch

from qexport.errors import CompatibilityError, InputError
from qexport.formats.bitsandbytes.four_bit_tensors import QuantType, flat_absmax
from qexport.formats.onnx.operators import (
    MEND,
    GraphTensors,
    Operator,
    Wiring,
    attribute,
    module_of,
    require,
    scales_of,
)
from qexport.formats.stored_weight import StoredLayer
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, TensorSpec

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
QUANT_TYPES: Final[Mapping[QuantType, int]] = {"fp4": 0, "nf4": 1}
"""The operator's attribute `quant_type`."""

_BY_CODE: Final[Mapping[int, QuantType]] = {code: name for name, code in QUANT_TYPES.items()}


def fault(spec: BlockQuantizedSpec) -> str | None:
    """Why codes cannot be stored, or None if they can. Needs no weights."""
    if spec.block_size not in BLOCK_SIZES:
        return f"MatMulBnb4 has blocks of 16 to 256 values, not {spec.block_size}"
    if spec.in_features % spec.block_size:
        return f"block_size {spec.block_size} does not divide {spec.in_features} inputs: blocks would cross rows"
    return None


def specs(spec: BlockQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the initializers of `pack`, by their names inside the module.

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


@dataclass(frozen=True)
class Bnb4Matrix:
    """A weight of MatMulBnb4.

    Attributes:
        shape: [out, in].
        block_size: values per absmax, counted row after row.
        quant_type: the code book.
        codes: the initializer uint8 [out * in / 2], the earlier value in the high bits.
        absmax: float32 [blocks].
    """

    shape: tuple[int, int]
    block_size: int
    quant_type: QuantType
    codes: str
    absmax: str
    bits: int = 4

    kind: ClassVar[str] = "MatMulBnb4"
    rounds_inputs: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return self.codes, self.absmax

    @property
    def description(self) -> str:
        """See `StoredMatrix.description`."""
        return f"{self.kind}, {self.quant_type.upper()}, blocks of"

    def layer(self, graph: GraphTensors) -> StoredLayer:
        """See `StoredMatrix.layer`."""
        return StoredLayer(self.quant_type, self.bits, self.block_size, self.shape)

    def grid(self, graph: GraphTensors) -> None:
        """None: the codes are not in groups along the inputs."""

    def quantized(self, graph: GraphTensors) -> BlockQuantized:
        """The codes; their matrix is float32, since the operator does not round it as bitsandbytes does."""
        spec = BlockQuantizedSpec(
            *self.shape, self.quant_type, self.block_size, double_quant=False, dtype=torch.float32
        )
        return BlockQuantized(graph.read(self.codes), scales_of(graph, self.absmax), None, spec)


def read_bnb4(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[str, Bnb4Matrix]:
    """The path of a module, and its weight; see `qexport.formats.onnx.stored_matrix`."""
    rows, columns, block, code = (attribute(graph, node, key) for key in ("N", "K", "block_size", "quant_type"))
    if code not in _BY_CODE or block < 2 or columns % block:
        raise InputError(
            f"MatMulBnb4 with quant_type {code}, {columns} inputs and block_size {block} is not supported",
            where=graph.where(node.name),
            mend=MEND,
        )
    if node.integers.get("training_mode", 0) or node.integers.get("transB", 1) != 1:
        raise InputError(
            "MatMulBnb4 with training_mode or transB 0 is not supported", where=graph.where(node.name), mend=MEND
        )
    matrix = Bnb4Matrix((rows, columns), block, _BY_CODE[code], node.input(1), node.input(2))
    require(graph, matrix.codes, (rows * columns // 2,), torch.uint8)
    require(graph, matrix.absmax, (rows * columns // block,), torch.float32)
    return module_of(graph, node, matrix.codes, ".weight"), matrix
