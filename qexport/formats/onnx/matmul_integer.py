"""The initializers of a W8A8 linear with ONNX's MatMulInteger: uint8 codes around 128, and one scale per output.

The int8 codes are stored as uint8, because ONNX Runtime's AVX2 kernel for int8 weights adds pairs of products in 16
bits, which saturate. With uint8 on both sides and zero points of 128 the sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from qexport.errors import CompatibilityError, InputError
from qexport.formats.onnx.operators import MEND, GraphTensors, Operator, Wiring, module_of, require, scales_of
from qexport.formats.stored_weight import StoredLayer
from qexport.tensors import RowQuantized, RowQuantizedSpec, TensorSpec
from qexport.tensors.input_rounding import InputRounding

ZERO_POINT: Final = 128

_MAX_INPUTS: Final = (2**31 - 1) // (128 * 127)
_ROWS_AT_ONCE: Final = 512


def fault(spec: RowQuantizedSpec) -> str | None:
    """Why codes cannot be stored, or None if they can. Needs no weights."""
    if spec.in_features > _MAX_INPUTS:
        return f"the sum over {spec.in_features} inputs may not fit int32; at most {_MAX_INPUTS} inputs do"
    return None


def specs(spec: RowQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the initializers of `pack`, by their names inside the module."""
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


@dataclass(frozen=True)
class IntegerMatrix:
    """A weight of MatMulInteger.

    Attributes:
        shape: [out, in].
        codes: the initializer uint8 [in, out], 128 more than the codes.
        scales: float32 [out].
    """

    shape: tuple[int, int]
    codes: str
    scales: str
    bits: int = 8

    kind: ClassVar[str] = "MatMulInteger"
    rounds_inputs: ClassVar[bool] = True
    description = "MatMulInteger, 8 bits"

    @property
    def block_size(self) -> int:
        """The inputs of a row, which has one scale."""
        return self.shape[1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return self.codes, self.scales

    def layer(self, graph: GraphTensors) -> StoredLayer:
        """See `StoredMatrix.layer`."""
        return StoredLayer("w8a8", self.bits, self.block_size, self.shape, InputRounding())

    def grid(self, graph: GraphTensors) -> None:
        """None: the codes are not in groups along the inputs."""

    def quantized(self, graph: GraphTensors) -> RowQuantized:
        """See `StoredMatrix.quantized`."""
        scales, codes = scales_of(graph, self.scales), graph.read(self.codes)
        if not int(codes.amin()):
            raise InputError("a code is -128", where=graph.where(self.codes), mend=MEND)
        absmax = scales * 127
        if not torch.equal(absmax / 127, scales):
            raise InputError("a scale cannot be a row's absmax / 127", where=graph.where(self.scales), mend=MEND)
        return RowQuantized((codes.t().contiguous() ^ ZERO_POINT).view(torch.int8), absmax)


def read_integer(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[str, IntegerMatrix]:
    """The path of a module, and its weight; see `qexport.formats.onnx.stored_matrix`."""
    module = module_of(graph, node, node.input(1), ".qweight")
    found = graph.initializers.get(node.input(1))
    if found is None or len(found.spec.shape) != 2:
        raise InputError(
            "the graph has no matrix of codes for MatMulInteger", where=graph.where(node.input(1)), mend=MEND
        )
    columns, rows = found.spec.shape
    matrix = IntegerMatrix((rows, columns), node.input(1), f"{module}.scales")
    require(graph, matrix.codes, (columns, rows), torch.uint8)
    require(graph, matrix.scales, (rows,), torch.float32)
    for zero in (node.input(2), node.input(3)):
        known = graph.initializers.get(zero)
        if known is None or known.spec.dtype != torch.uint8 or not bool((graph.read(zero) == ZERO_POINT).all()):
            raise InputError("the zero point of MatMulInteger is not 128", where=graph.where(node.name), mend=MEND)
    return module, matrix
