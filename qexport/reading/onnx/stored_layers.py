"""What the operators of a graph tell of its quantized weights, in the words that other formats use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qexport.reading.onnx.stored_weights import Bnb4Matrix, NBitsMatrix, StoredMatrix
from qexport.reading.stored_format import StoredLayer
from qexport.tensors import GroupQuantizedSpec

_INTEGER_INPUTS: Final = 4
"""The accuracy level at which the inputs of MatMulNBits are rounded to 8 bits."""


def described(matrices: Iterable[StoredMatrix]) -> str:
    """Every operator with its attributes, for a reader; `dense` where there is none."""
    blocks: dict[str, set[int]] = {}
    for matrix in matrices:
        blocks.setdefault(_operator(matrix), set()).add(matrix.block_size)
    told = [f"{name} {_listed(sizes)}" if name.endswith("blocks of") else name for name, sizes in blocks.items()]
    return "; ".join(sorted(told)) or "dense"


def _operator(matrix: StoredMatrix) -> str:
    match matrix:
        case NBitsMatrix():
            rounded = ", inputs rounded to 8 bits" if matrix.accuracy_level == _INTEGER_INPUTS else ""
            return f"MatMulNBits, {matrix.bits} bits{rounded}, blocks of"
        case Bnb4Matrix():
            return f"MatMulBnb4, {matrix.quant_type.upper()}, blocks of"
        case _:
            return f"{matrix.kind}, {matrix.bits} bits"


def _listed(sizes: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(sizes)))


def stored_layer(matrix: StoredMatrix) -> StoredLayer:
    """The module. MatMulNBits does not tell GPTQ's groups from LLM.int8's rows, whose scale stands in every block; they
    count as groups here, and a manifest knows better.
    """
    match matrix:
        case NBitsMatrix():
            return StoredLayer("gptq", matrix.bits, min(matrix.block_size, matrix.shape[1]), matrix.shape)
        case Bnb4Matrix():
            return StoredLayer(matrix.quant_type, matrix.bits, matrix.block_size, matrix.shape)
        case _:
            return StoredLayer("w8a8", matrix.bits, matrix.block_size, matrix.shape)


def block_grid(matrix: StoredMatrix) -> GroupQuantizedSpec | None:
    """The blocks as groups; None where the codes do not lie along the inputs. A last block that is shorter is
    found only where there is one group a row.
    """
    if not isinstance(matrix, NBitsMatrix):
        return None
    rows, columns = matrix.shape
    group_size = columns if columns % matrix.block_size else matrix.block_size
    return GroupQuantizedSpec(
        rows, columns, matrix.bits, group_size, sym=not matrix.zero_points, desc_act=bool(matrix.order)
    )
