"""Rows of a matrix of 8-bit codes that operators of ONNX look up and dequantize, read back.

They are written by `qexport.export.onnx.lookups`. The operators between codes and rows are compared with those that are
written there: others may compute something else.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Final

import torch

from qexport.errors import InputError
from qexport.formats.onnx.matmul_nbits_reading import NBitsMatrix, NibbleMatrix
from qexport.formats.onnx.nibbles import FACTOR, HIGH, LOW
from qexport.formats.onnx.operators import MEND, GraphTensors, Operator, StoredMatrix, Wiring, require

ZERO: Final = 128
LOW_BITS: Final = 15
HIGH_BITS: Final = 240

_SCALES: Final = ".scales"
_BITS: Final = 8
_SMALL: Final = 8
"""Values of the largest constant that is compared."""

_Wanted = str | float | list[int] | tuple["_Wanted", ...]
"""What yields a value: the value itself, a constant, or an operator (with its axis) and what yields its inputs."""


def looks_up_codes(node: Operator) -> bool:
    """Whether a node gathers the scales of some rows, which nothing but a lookup does."""
    return (node.domain, node.op_type) == ("", "Gather") and node.input(0).endswith(_SCALES)


def read_rows(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[str, NBitsMatrix]:
    """The path of a module, and the matrix whose rows are looked up.

    Args:
        graph: the node's graph.
        node: one that `looks_up_codes`.
        wiring: which nodes yield and read each value.

    Raises:
        InputError: an initializer is missing, or has another shape or dtype; or the rows are dequantized in another
            way.
    """
    module, scales = node.input(0).removesuffix(_SCALES), node.input(0)
    matrix = _matrix(graph, module, scales)
    if not _fits(graph, wiring, _end(wiring, node), _rows(matrix, module, node.input(1))):
        raise InputError("the rows of codes are dequantized in an unknown way", where=graph.where(scales), mend=MEND)
    return module, matrix


def same_codes(rows: StoredMatrix, weight: StoredMatrix) -> bool:
    """Whether a matrix whose rows are looked up is one that an operator multiplies with, at any accuracy level."""
    return isinstance(weight, NBitsMatrix) and rows == replace(weight, accuracy_level=0)


def _matrix(graph: GraphTensors, module: str, scales: str) -> NBitsMatrix:
    whole, halves = f"{module}.qweight", [f"{module}.qweight_{part}" for part in (HIGH, LOW)]
    codes = whole if whole in graph.initializers else halves[0]
    shape = graph.initializers[codes].spec.shape if codes in graph.initializers else ()
    if len(shape) != 3:
        raise InputError("no codes belong to the scales of which rows are read", where=graph.where(scales), mend=MEND)
    rows, blocks, width = shape
    block = width if codes == whole else 2 * width
    for name in (whole,) if codes == whole else halves:
        require(graph, name, shape, torch.uint8)
    require(graph, scales, (rows, blocks), torch.float32, torch.float16)
    size = (rows, blocks * block)
    if codes == whole:
        return NBitsMatrix(size, _BITS, block, 0, whole, scales, "", "")
    zeros = f"{module}.zero_points_{LOW}"
    require(graph, zeros, (rows, -(-blocks // 2)), torch.uint8)
    return NibbleMatrix(size, _BITS, block, 0, halves[0], scales, "", "", halves[1], zeros)


def _end(wiring: Wiring, node: Operator) -> str:
    """The value that three operators after the scales yield; empty where they are not read by one node each."""
    last: Operator | None = node
    for _ in range(3):
        last = wiring.reader(last) if last is not None else None
    return last.outputs[0] if last is not None else ""


def _rows(matrix: NBitsMatrix, module: str, indices: str) -> _Wanted:
    codes: _Wanted = ("Cast", ("Gather@0", f"{module}.qweight", indices))
    if isinstance(matrix, NibbleMatrix):
        codes = _joined(matrix, module, indices)
    scales = ("Unsqueeze", ("Gather@0", matrix.scales, indices), [-1])
    return ("Reshape", ("Mul", ("Sub", codes, float(ZERO)), scales), [0, 0, matrix.shape[1]])


def _joined(matrix: NBitsMatrix, module: str, indices: str) -> _Wanted:
    def bits(part: str, mask: int) -> _Wanted:
        return ("Cast", ("BitwiseAnd", ("Gather@0", f"{module}.qweight_{part}", indices), float(mask)))

    even = ("Add", ("Mul", bits(HIGH, LOW_BITS), float(FACTOR)), bits(LOW, LOW_BITS))
    odd = ("Add", bits(HIGH, HIGH_BITS), ("Mul", bits(LOW, HIGH_BITS), 1 / FACTOR))
    pairs = ("Concat@-1", ("Unsqueeze", even, [-1]), ("Unsqueeze", odd, [-1]))
    return ("Reshape", pairs, [0, 0, matrix.blocks, matrix.block_size])


def _fits(graph: GraphTensors, wiring: Wiring, value: str, wanted: _Wanted) -> bool:
    """Whether a value is what is wanted. It ends where the wanted one does, however large the graph is."""
    if isinstance(wanted, str):
        return value == wanted
    if not isinstance(wanted, tuple):
        known = graph.initializers.get(value)
        small = known is not None and prod(known.spec.shape) <= _SMALL
        return small and graph.read(value).flatten().tolist() == (wanted if isinstance(wanted, list) else [wanted])
    node = wiring.producer(value)
    if node is None or node.domain or len(node.inputs) != len(wanted) - 1:
        return False
    axis = f"@{node.integers['axis']}" if "axis" in node.integers else ""
    inputs = zip(node.inputs, wanted[1:], strict=True)
    return f"{node.op_type}{axis}" == wanted[0] and all(_fits(graph, wiring, *each) for each in inputs)
