"""Weights of MatMulNBits read back from a graph, unpacked by the operator's definition.

The reference is ONNX Runtime's `docs/ContribOperators.md`. Writing is in `matmul_nbits` and
`nibbles`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from qexport.errors import InputError
from qexport.formats.onnx.matmul_nbits import BLOCK_SIZES
from qexport.formats.onnx.nibbles import FACTOR, HIGH, LOW
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
from qexport.tensors import GroupQuantized, GroupQuantizedSpec
from qexport.tensors.input_rounding import InputRounding

_BITS: Final = (2, 4, 8)
_ROW_BITS: Final = 8
_INTEGER_INPUTS: Final = 4
"""The accuracy level at which the inputs are rounded to 8 bits."""
_TWO_BITS: Final = 2
_ROUNDED_BLOCKS_OF_TWO_BITS: Final = (32, 64, 128)
"""With others, codes of two bits have no integer kernel: the inputs stay as they are at every level."""
_NIBBLE_BITS: Final = 4
_HIGH_CODES: Final = f".qweight_{HIGH}"
_LOW_CODES: Final = f".qweight_{LOW}"


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
    _division: ClassVar[str] = ""

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
        return f"{self.kind}, {self.bits} bits{self._division}{rounded}, blocks of"

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
        columns = self.shape[1]
        codes = self._codes(graph)[:, :columns]
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

    def _codes(self, graph: GraphTensors) -> Tensor:
        """uint8 [out, blocks * block_size], as the graph has them, in the order of the columns."""
        return _unpacked(graph.read(self.codes).reshape(self.shape[0], -1), self.bits)

    def _zeros(self, graph: GraphTensors) -> Tensor:
        """uint8 [out, blocks]."""
        if not self.zero_points:
            return torch.full((self.shape[0], self.blocks), 2 ** (self.bits - 1), dtype=torch.uint8)
        return _unpacked(graph.read(self.zero_points), self.bits)[:, : self.blocks]


@dataclass(frozen=True)
class NibbleMatrix(NBitsMatrix):
    """A weight of two MatMulNBits of 4 bits that stand for one of 8, see `nibbles`.

    The inherited attributes are those of the 8-bit matrix, with the high nibbles as `codes` and `zero_points`.

    Attributes:
        low_codes: the low nibbles of the codes, in the shape of `codes`.
        low_zero_points: those of the zero points; 0 where the high ones are omitted.
    """

    low_codes: str
    low_zero_points: str

    _division: ClassVar[str] = " as 4 and 4"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return (*super().parts, self.low_codes, self.low_zero_points)

    def _codes(self, graph: GraphTensors) -> Tensor:
        return _joined(_nibbles(graph, self.codes), _nibbles(graph, self.low_codes))

    def _zeros(self, graph: GraphTensors) -> Tensor:
        low = _nibbles(graph, self.low_zero_points)[:, : self.blocks]
        if self.zero_points:
            return _joined(_nibbles(graph, self.zero_points)[:, : self.blocks], low)
        if low.any():
            raise InputError(
                "the low nibble of a zero point is not 0, but the high ones are omitted",
                where=graph.where(self.low_zero_points),
                mend=MEND,
            )
        return super()._zeros(graph)


def read_nbits(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[str, NBitsMatrix]:
    """The path of a module, and its weight; see `qexport.formats.onnx.stored_matrix`.

    Each of the two nodes of a pair gives the weight of both.
    """
    if node.input(1).endswith((_HIGH_CODES, _LOW_CODES)):
        return _read_pair(graph, node, wiring)
    module = module_of(graph, node, node.input(1), ".qweight")
    return module, _read_node(graph, node, wiring, module)


def _read_pair(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[str, NibbleMatrix]:
    high, low = _pair_of(graph, node, wiring)
    module = module_of(graph, high, high.input(1), _HIGH_CODES)
    upper, lower = (_read_node(graph, each, wiring, module) for each in (high, low))
    same = replace(lower, codes=upper.codes, zero_points=upper.zero_points) == upper and high.input(0) == low.input(0)
    if not same or lower.codes != f"{module}{_LOW_CODES}" or upper.bits != _NIBBLE_BITS or not lower.zero_points:
        raise InputError(
            "the nodes of the high and the low nibbles do not belong together",
            where=graph.where(node.name),
            mend=MEND,
        )
    whole = {field.name: getattr(upper, field.name) for field in fields(upper)} | {"bits": 2 * _NIBBLE_BITS}
    return module, NibbleMatrix(**whole, low_codes=lower.codes, low_zero_points=lower.zero_points)


def _pair_of(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[Operator, Operator]:
    """The nodes of the high and the low nibbles, one of which is given, of `Add(Mul(high, 16), low)`."""
    reader = wiring.reader(node)
    total = wiring.reader(reader) if reader is not None and reader.op_type == "Mul" else reader
    scaled = wiring.producer(total.input(0)) if total is not None and total.op_type == "Add" else None
    low = wiring.producer(total.input(1)) if total is not None else None
    high = wiring.producer(scaled.input(0)) if scaled is not None and scaled.op_type == "Mul" else None
    if scaled is None or high is None or low is None or node not in (high, low) or high.op_type != low.op_type:
        raise InputError(
            "the products with the high and the low nibbles of 8-bit codes are not added",
            where=graph.where(node.name),
            mend=MEND,
        )
    factor = graph.read(scaled.input(1))
    if factor.numel() != 1 or factor.item() != FACTOR:
        raise InputError(
            f"the product with the high nibbles is multiplied by {_shown(factor)}, not by {FACTOR}",
            where=graph.where(node.name),
            mend=MEND,
        )
    return high, low


def _read_node(graph: GraphTensors, node: Operator, wiring: Wiring, module: str) -> NBitsMatrix:
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
    gather = wiring.producer(node.input(0))
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
    return matrix


def _is_order(node: Operator) -> bool:
    return node.op_type == "Gather" and node.integers.get("axis") == -1 and node.input(1).endswith(".order")


def _unpacked(rows: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] as uint8 [rows, n * 8 / bits], the low bits first."""
    pieces = [rows >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return pieces[0] if bits == 8 else torch.stack(pieces, 2).reshape(len(rows), -1)


def _shown(factor: Tensor) -> str:
    return str(factor.item()) if factor.numel() == 1 else f"a tensor {list(factor.shape)}"


def _nibbles(graph: GraphTensors, name: str) -> Tensor:
    """uint8 [rows, n] of a packed initializer."""
    packed = graph.read(name)
    return _unpacked(packed.reshape(len(packed), -1), _NIBBLE_BITS)


def _joined(high: Tensor, low: Tensor) -> Tensor:
    return high << _NIBBLE_BITS | low
