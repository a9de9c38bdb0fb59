"""Weights of MatMulNBits read back from a graph, unpacked by the operator's definition.

The reference is ONNX Runtime's `docs/ContribOperators.md`. Writing is in `matmul_nbits`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from qexport.errors import InputError
from qexport.formats.onnx.matmul_nbits import BLOCK_SIZES
from qexport.formats.onnx.operators import MEND, GraphTensors, Operator, attribute, module_of, require, scales_of
from qexport.formats.stored_weight import StoredLayer
from qexport.tensors import GroupQuantized, GroupQuantizedSpec
from qexport.tensors.input_rounding import InputRounding

_BITS: Final = (2, 4, 8)
_ROW_BITS: Final = 8
_INTEGER_INPUTS: Final = 4
"""The accuracy level at which the inputs are rounded to 8 bits."""
_TWO_BITS: Final = 2
_ROUNDED_BLOCKS_OF_TWO_BITS: Final = (32, 64, 128)
"""With others, codes of two bits have no integer kernel: the inputs stay as they are at every level."""


@dataclass(frozen=True)
class NBitsMatrix:
    """A weight of MatMulNBits.

    Attributes:
        shape: [out, in].
        bits: 2, 4 or 8.
        block_size: inputs per scale and zero point; the last block of a row may be shorter.
        accuracy_level: how activations are rounded: 0 or 1 not at all, 4 to int8.
        codes: the initializer uint8 [out, blocks, block_size * bits / 8], low bits first.
        scales: float32 or float16 [out, blocks].
        zero_points: uint8 [out, ceil(blocks * bits / 8)], low bits first; an empty name if all are 2**(bits - 1).
        order: int64 [in], the input that each column is multiplied with; an empty name if they are in order.
    """

    shape: tuple[int, int]
    bits: int
    block_size: int
    accuracy_level: int
    codes: str
    scales: str
    zero_points: str
    order: str

    kind: ClassVar[str] = "MatMulNBits"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return tuple(part for part in (self.codes, self.scales, self.zero_points, self.order) if part)

    @property
    def blocks(self) -> int:
        """Blocks per row."""
        return -(-self.shape[1] // self.block_size)

    @property
    def rounds_inputs(self) -> bool:
        """See `StoredMatrix.rounds_inputs`."""
        return self.accuracy_level == _INTEGER_INPUTS

    @property
    def description(self) -> str:
        """See `StoredMatrix.description`."""
        rounded = ", inputs rounded to 8 bits" if self.rounds_inputs else ""
        return f"{self.kind}, {self.bits} bits{rounded}, blocks of"

    def layer(self, graph: GraphTensors) -> StoredLayer:
        """See `StoredMatrix.layer`. The operator is the same for GPTQ's groups and LLM.int8's rows. GPTQ's scales are
        float16, those of rows are `absmax / 127` in float32: by this the two are told apart.
        """
        scales, group_size = graph.read(self.scales), self._group_size(graph)
        rows = self.bits == _ROW_BITS and group_size == self.shape[1] and not self.zero_points and not self.order
        method = "int8" if rows and not torch.equal(scales.half().to(scales.dtype), scales) else "gptq"
        return StoredLayer(method, self.bits, group_size, self.shape, self.input_rounding(graph))

    def grid(self, graph: GraphTensors) -> GroupQuantizedSpec | None:
        """See `StoredMatrix.grid`."""
        layer, sym, desc_act = self.layer(graph), not self.zero_points, bool(self.order)
        if layer.method == "int8" or self.shape[1] % layer.group_size:
            return None
        return GroupQuantizedSpec(*self.shape, self.bits, layer.group_size, sym, desc_act)

    def input_rounding(self, graph: GraphTensors) -> InputRounding | None:
        """As ONNX Runtime 1.31 rounds on x86: each block of a token with a scale of its own."""
        if not self.rounds_inputs or (self.bits == _TWO_BITS and self.block_size not in _ROUNDED_BLOCKS_OF_TWO_BITS):
            return None
        return InputRounding(self.block_size, graph.read(self.order) if self.order else None)

    def _group_size(self, graph: GraphTensors) -> int:
        """Inputs per group. A group may be stored as several blocks, which then have equal scales and zero points in
        every row.
        """
        values = torch.stack([graph.read(self.scales).float(), self._zeros(graph).float()])
        other = (values[..., 1:] != values[..., :-1]).any(1).any(0)
        starts = [block for block, differs in enumerate(other.tolist(), start=1) if differs]
        return math.gcd(*starts) * self.block_size if starts else self.shape[1]

    def quantized(self, graph: GraphTensors) -> GroupQuantized:
        """The codes in the order of the inputs, with one group per block. Scales keep their dtype."""
        rows, columns = self.shape
        codes = _unpacked(graph.read(self.codes).reshape(rows, -1), self.bits)[:, :columns]
        groups = torch.arange(columns, dtype=torch.int32) // self.block_size
        if self.order:
            order = graph.read(self.order)
            if not torch.equal(order.sort().values, torch.arange(columns)):
                raise InputError("the order does not have each input once", where=graph.where(self.order), mend=MEND)
            codes, groups = codes[:, order.argsort()], groups[order.argsort()]
        return GroupQuantized(
            codes=codes.contiguous(),
            scales=scales_of(graph, self.scales).t().contiguous(),
            zeros=self._zeros(graph).t().contiguous(),
            g_idx=groups,
            bits=self.bits,
            group_size=min(self.block_size, columns),
            sym=not self.zero_points,
            desc_act=bool(self.order),
        )

    def _zeros(self, graph: GraphTensors) -> Tensor:
        if not self.zero_points:
            return torch.full((self.shape[0], self.blocks), 2 ** (self.bits - 1), dtype=torch.uint8)
        return _unpacked(graph.read(self.zero_points), self.bits)[:, : self.blocks]


def read_nbits(graph: GraphTensors, node: Operator, producers: Mapping[str, Operator]) -> tuple[str, NBitsMatrix]:
    """The path of a module, and its weight; see `qexport.formats.onnx.stored_matrix`."""
    rows, columns, bits, block = (attribute(graph, node, key) for key in ("N", "K", "bits", "block_size"))
    level = node.integers.get("accuracy_level", 0)
    if bits not in _BITS or block not in BLOCK_SIZES or level not in range(5):
        raise InputError(
            f"MatMulNBits with bits {bits}, block_size {block}, accuracy_level {level} is not supported",
            where=graph.where(node.name),
            mend=MEND,
        )
    if node.input(4):
        raise InputError(
            "MatMulNBits has a g_idx, with which ONNX Runtime computes wrong numbers",
            where=graph.where(node.name),
            mend="export the model again: qexport sorts the columns instead",
        )
    module = module_of(graph, node, node.input(1), ".qweight")
    gather = producers.get(node.input(0))
    order = gather.input(1) if gather is not None and _is_order(gather) else ""
    matrix = NBitsMatrix((rows, columns), bits, block, level, node.input(1), node.input(2), node.input(3), order)
    require(graph, matrix.codes, (rows, matrix.blocks, block * bits // 8), torch.uint8)
    require(graph, matrix.scales, (rows, matrix.blocks), torch.float32, torch.float16)
    if matrix.zero_points:
        require(graph, matrix.zero_points, (rows, -(-matrix.blocks * bits // 8)), torch.uint8)
    if order:
        require(graph, order, (columns,), torch.int64)
    elif f"{module}.order" in graph.initializers:
        raise InputError("the order of the columns is not applied", where=graph.where(f"{module}.order"), mend=MEND)
    return module, matrix


def _is_order(node: Operator) -> bool:
    return node.op_type == "Gather" and node.integers.get("axis") == -1 and node.input(1).endswith(".order")


def _unpacked(rows: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] as uint8 [rows, n * 8 / bits], the low bits first."""
    pieces = [rows >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return pieces[0] if bits == 8 else torch.stack(pieces, 2).reshape(len(rows), -1)
