"""Quantized weights as the operators of a graph have them, unpacked from the operators' own definitions.

The reference is ONNX Runtime's `docs/ContribOperators.md` (MatMulNBits, MatMulBnb4) and ONNX's MatMulInteger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from qexport.errors import InputError
from qexport.reading.onnx.graph import MICROSOFT, Graph, Node
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, GroupQuantized, Quantized, RowQuantized, TensorSpec
from qexport.tensors.source import is_finite

Kind = Literal["MatMulNBits", "MatMulBnb4", "MatMulInteger"]
KINDS: Final[Mapping[tuple[str, str], Kind]] = {
    (MICROSOFT, "MatMulNBits"): "MatMulNBits",
    (MICROSOFT, "MatMulBnb4"): "MatMulBnb4",
    ("", "MatMulInteger"): "MatMulInteger",
}
"""The operators that multiply with codes, by domain and type."""

_BITS: Final = (2, 4, 8)
_BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
_QUANT_TYPES: Final[Mapping[int, Literal["fp4", "nf4"]]] = {0: "fp4", 1: "nf4"}
_MIDDLE: Final = 128
_MEND: Final = "export the model again; this graph is damaged, or of another maker"


class StoredMatrix(Protocol):
    """One quantized weight in a graph. Holds none of its large tensors."""

    @property
    def kind(self) -> Kind:
        """The operator that multiplies with it."""
        ...

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def block_size(self) -> int:
        """Inputs that share a scale."""
        ...

    @property
    def codes(self) -> str:
        """The name of the initializer with its codes."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        ...

    def quantized(self, graph: Graph) -> Quantized:
        """The codes, read from the files.

        Raises:
            InputError: a file has become shorter, a scale is no number, or a code is none of its method.
        """
        ...


@dataclass(frozen=True)
class NBitsMatrix:
    """A weight of MatMulNBits.

    Attributes:
        shape: [out, in].
        bits: 2, 4 or 8.
        block_size: inputs that share a scale and a zero point; the last block of a row may be shorter.
        accuracy_level: what the activations are rounded to: 0 or 1 nothing, 4 int8.
        codes: the initializer uint8 [out, blocks, block_size * bits / 8], low bits first.
        scales: float32 or float16 [out, blocks].
        zero_points: uint8 [out, ceil(blocks * bits / 8)], low bits first; empty where all are 2**(bits - 1).
        order: int64 [in], the input that each column is multiplied with; empty where they are in order.
    """

    shape: tuple[int, int]
    bits: int
    block_size: int
    accuracy_level: int
    codes: str
    scales: str
    zero_points: str
    order: str
    kind: Literal["MatMulNBits"] = "MatMulNBits"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return tuple(part for part in (self.codes, self.scales, self.zero_points, self.order) if part)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.shape[1] // self.block_size)

    def quantized(self, graph: Graph) -> GroupQuantized:
        """The codes in the order of the inputs, a block as a group. Scales keep their dtype.

        Raises:
            InputError: see `StoredMatrix.quantized`; or `order` has not each input once.
        """
        rows, columns = self.shape
        codes = _unpacked(graph.read(self.codes).reshape(rows, -1), self.bits)[:, :columns]
        groups = torch.arange(columns, dtype=torch.int32) // self.block_size
        if self.order:
            order = graph.read(self.order)
            if not torch.equal(order.sort().values, torch.arange(columns)):
                raise InputError("the order has not each input once", where=graph.where(self.order), mend=_MEND)
            codes, groups = codes[:, order.argsort()], groups[order.argsort()]
        return GroupQuantized(
            codes=codes.contiguous(),
            scales=_scales(graph, self.scales).t().contiguous(),
            zeros=self._zeros(graph).t().contiguous(),
            g_idx=groups,
            bits=self.bits,
            group_size=min(self.block_size, columns),
            sym=not self.zero_points,
            desc_act=bool(self.order),
        )

    def _zeros(self, graph: Graph) -> Tensor:
        if not self.zero_points:
            return torch.full((self.shape[0], self.blocks), 2 ** (self.bits - 1), dtype=torch.uint8)
        return _unpacked(graph.read(self.zero_points), self.bits)[:, : self.blocks]


@dataclass(frozen=True)
class Bnb4Matrix:
    """A weight of MatMulBnb4.

    Attributes:
        shape: [out, in].
        block_size: values that share an absmax, row after row.
        quant_type: the code book.
        codes: the initializer uint8 [out * in / 2], the earlier value in the high bits.
        absmax: float32 [blocks].
    """

    shape: tuple[int, int]
    block_size: int
    quant_type: Literal["nf4", "fp4"]
    codes: str
    absmax: str
    kind: Literal["MatMulBnb4"] = "MatMulBnb4"
    bits: int = 4

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return self.codes, self.absmax

    def quantized(self, graph: Graph) -> BlockQuantized:
        """The codes; their matrix is float32, since the operator does not round it as bitsandbytes does.

        Raises:
            InputError: see `StoredMatrix.quantized`.
        """
        spec = BlockQuantizedSpec(
            *self.shape, self.quant_type, self.block_size, double_quant=False, dtype=torch.float32
        )
        return BlockQuantized(graph.read(self.codes), _scales(graph, self.absmax), None, spec)


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
    kind: Literal["MatMulInteger"] = "MatMulInteger"
    bits: int = 8

    @property
    def block_size(self) -> int:
        """A row has one scale."""
        return self.shape[1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its initializers."""
        return self.codes, self.scales

    def quantized(self, graph: Graph) -> RowQuantized:
        """The codes.

        Raises:
            InputError: see `StoredMatrix.quantized`; or a scale is no row's absmax over 127.
        """
        scales, codes = _scales(graph, self.scales), graph.read(self.codes)
        if not int(codes.amin()):
            raise InputError("a code is -128", where=graph.where(self.codes), mend=_MEND)
        absmax = scales * 127
        if not torch.equal(absmax / 127, scales):
            raise InputError("a scale is no row's absmax over 127", where=graph.where(self.scales), mend=_MEND)
        return RowQuantized((codes.t().contiguous() ^ _MIDDLE).view(torch.int8), absmax)


def stored_matrix(graph: Graph, node: Node, producers: Mapping[str, Node]) -> tuple[str, StoredMatrix]:
    """The path of a module, and how the weight is stored that an operator of `KINDS` multiplies with.

    Args:
        graph: the operator's.
        node: the operator.
        producers: the node of each value.

    Raises:
        InputError: an attribute or an input is missing or has another shape or dtype than the operator asks for; or the
            operator has an input in which other runtimes or versions differ.
    """
    match KINDS[node.domain, node.op_type]:
        case "MatMulNBits":
            return _nbits(graph, node, producers)
        case "MatMulBnb4":
            return _bnb4(graph, node)
        case "MatMulInteger":
            return _integer(graph, node)


def _nbits(graph: Graph, node: Node, producers: Mapping[str, Node]) -> tuple[str, NBitsMatrix]:
    rows, columns, bits, block = (_attribute(graph, node, key) for key in ("N", "K", "bits", "block_size"))
    level = node.integers.get("accuracy_level", 0)
    if bits not in _BITS or block not in _BLOCK_SIZES or level not in range(5):
        raise InputError(f"{bits} bits in blocks of {block} at level {level}", where=graph.where(node.name), mend=_MEND)
    if node.input(4):
        raise InputError(
            "MatMulNBits has a g_idx, which ONNX Runtime reads wrongly",
            where=graph.where(node.name),
            mend="export the model again: qexport sorts the columns instead",
        )
    module = _module(graph, node, node.input(1), ".qweight")
    gather = producers.get(node.input(0))
    order = gather.input(1) if gather is not None and _is_order(gather) else ""
    matrix = NBitsMatrix((rows, columns), bits, block, level, node.input(1), node.input(2), node.input(3), order)
    _require(graph, matrix.codes, (rows, matrix.blocks, block * bits // 8), torch.uint8)
    _require(graph, matrix.scales, (rows, matrix.blocks), torch.float32, torch.float16)
    if matrix.zero_points:
        _require(graph, matrix.zero_points, (rows, -(-matrix.blocks * bits // 8)), torch.uint8)
    if order:
        _require(graph, order, (columns,), torch.int64)
    elif f"{module}.order" in graph.initializers:
        raise InputError("the order of the columns is not applied", where=graph.where(f"{module}.order"), mend=_MEND)
    return module, matrix


def _is_order(node: Node) -> bool:
    return node.op_type == "Gather" and node.integers.get("axis") == -1 and node.input(1).endswith(".order")


def _bnb4(graph: Graph, node: Node) -> tuple[str, Bnb4Matrix]:
    rows, columns, block, code = (_attribute(graph, node, key) for key in ("N", "K", "block_size", "quant_type"))
    if code not in _QUANT_TYPES or block < 2 or columns % block:
        raise InputError(
            f"code book {code} with {columns} inputs in blocks of {block}", where=graph.where(node.name), mend=_MEND
        )
    if node.integers.get("training_mode", 0) or node.integers.get("transB", 1) != 1:
        raise InputError("MatMulBnb4 is used with a transposed weight", where=graph.where(node.name), mend=_MEND)
    matrix = Bnb4Matrix((rows, columns), block, _QUANT_TYPES[code], node.input(1), node.input(2))
    _require(graph, matrix.codes, (rows * columns // 2,), torch.uint8)
    _require(graph, matrix.absmax, (rows * columns // block,), torch.float32)
    return _module(graph, node, matrix.codes, ".weight"), matrix


def _integer(graph: Graph, node: Node) -> tuple[str, IntegerMatrix]:
    module = _module(graph, node, node.input(1), ".qweight")
    found = graph.initializers.get(node.input(1))
    if found is None or len(found.spec.shape) != 2:
        raise InputError("the codes are no matrix in the graph", where=graph.where(node.input(1)), mend=_MEND)
    columns, rows = found.spec.shape
    matrix = IntegerMatrix((rows, columns), node.input(1), f"{module}.scales")
    _require(graph, matrix.codes, (columns, rows), torch.uint8)
    _require(graph, matrix.scales, (rows,), torch.float32)
    for zero in (node.input(2), node.input(3)):
        known = graph.initializers.get(zero)
        if known is None or known.spec.dtype != torch.uint8 or not bool((graph.read(zero) == _MIDDLE).all()):
            raise InputError("the zero point of MatMulInteger is not 128", where=graph.where(node.name), mend=_MEND)
    return module, matrix


def _attribute(graph: Graph, node: Node, key: str) -> int:
    if node.integers.get(key, -1) < (0 if key == "quant_type" else 1):
        raise InputError(f"{node.op_type} lacks the attribute {key}", where=graph.where(node.name), mend=_MEND)
    return node.integers[key]


def _module(graph: Graph, node: Node, codes: str, suffix: str) -> str:
    if not codes.endswith(suffix):
        raise InputError(f"the codes {codes!r} belong to no module", where=graph.where(node.name), mend=_MEND)
    return codes.removesuffix(suffix)


def _require(graph: Graph, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    found = graph.initializers.get(name)
    if found is None or found.spec not in [TensorSpec(shape, dtype) for dtype in dtypes]:
        given = "nothing that the graph holds" if found is None else f"{found.spec.dtype} {list(found.spec.shape)}"
        raise InputError(f"expected {dtypes[0]} {list(shape)}, found {given}", where=graph.where(name), mend=_MEND)


def _scales(graph: Graph, name: str) -> Tensor:
    scales = graph.read(name)
    if not is_finite(scales) or bool((scales < 0).any()):
        raise InputError("a scale is negative, NaN or Inf", where=graph.where(name), mend=_MEND)
    return scales


def _unpacked(rows: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] as uint8 [rows, n * 8 / bits], the low bits first."""
    pieces = [rows >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return pieces[0] if bits == 8 else torch.stack(pieces, 2).reshape(len(rows), -1)
