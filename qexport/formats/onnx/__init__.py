"""How an ONNX graph stores a model's weights: the operator for each kind of codes, written and read back.

The references are ONNX Runtime's `docs/ContribOperators.md` (MatMulNBits, MatMulBnb4) and ONNX's MatMulInteger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch

from qexport.formats.format import Encoding, ModuleEncoding, inside
from qexport.formats.gguf import blocks
from qexport.formats.gguf.blocks import BLOCK
from qexport.formats.onnx import matmul_bnb4, matmul_integer, matmul_nbits, nibbles
from qexport.formats.onnx.lookups import looks_up_codes, read_rows
from qexport.formats.onnx.matmul_nbits_reading import read_nbits
from qexport.formats.onnx.operators import MICROSOFT, GraphTensors, Operator, StoredMatrix, Wiring
from qexport.tensors import (
    BlockQuantized,
    BlockQuantizedSpec,
    GroupQuantized,
    GroupQuantizedSpec,
    OutputSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorRecord,
    TensorSpec,
)


@dataclass(frozen=True)
class OnnxFormat(ModuleEncoding):
    """The initializers of a graph: MatMulNBits for groups, and for rows that are dequantized (LLM.int8); MatMulBnb4 for
    blocks; MatMulInteger for rows that are multiplied with int8 activations (W8A8).

    Attributes:
        dtype: float32 or float16, of the activations and of the scales of groups. Rows and blocks keep float32 scales:
            their nodes compute in float32.
        int8_activations: whether rows are multiplied with int8 activations (W8A8), or dequantized (LLM.int8).
        accuracy_level: of MatMulNBits: with 4 it may round its inputs to 8 bits, with 0 not.
        rounded: matrices that stay unquantized in other layouts, and are rounded here, to the values of GGUF's Q8_0.
        looked_up: those of them that nothing multiplies with: they are one matrix of 8 bits at every level.
    """

    dtype: torch.dtype
    int8_activations: bool = False
    accuracy_level: int = 0
    rounded: frozenset[str] = frozenset()
    looked_up: frozenset[str] = frozenset()

    holds: ClassVar = (GroupQuantized, BlockQuantized, RowQuantized)

    def stored(self, name: str, spec: OutputSpec) -> OutputSpec:
        """How a parameter is stored: as the pass yields it, or rounded."""
        if name not in self.rounded:
            return spec
        assert isinstance(spec, TensorSpec), f"{name} is quantized"
        rows, columns = spec.shape
        return GroupQuantizedSpec(rows, columns, bits=8, group_size=BLOCK, sym=True, desc_act=False)

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The parameter itself, or the initializers of its module."""
        kept = self.stored(name, spec)
        if name in self.looked_up and isinstance(kept, GroupQuantizedSpec):
            return inside(name, matmul_nbits.group_specs(kept, self.dtype))
        return super().specs(name, kept)

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The parameter itself, or the initializers of its module.

        Raises:
            QexportError: the codes are of a type that the format cannot hold.
        """
        if record.name not in self.rounded:
            return super().tensors(record)
        assert isinstance(record.value, torch.Tensor)
        codes = _rounded(record.value)
        if record.name in self.looked_up:
            return inside(record.name, matmul_nbits.pack_groups(codes, self.dtype))
        return super().tensors(replace(record, value=codes))

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """Two to six initializers."""
        if isinstance(spec, BlockQuantizedSpec):
            return matmul_bnb4.specs(spec)
        if isinstance(spec, GroupQuantizedSpec):
            parts = matmul_nbits.group_specs(spec, self.dtype)
        else:
            assert isinstance(spec, RowQuantizedSpec)
            if self.int8_activations:
                return matmul_integer.specs(spec)
            parts = matmul_nbits.row_specs(spec, torch.float32)
        return nibbles.split_specs(parts) if self.in_nibbles(spec) else parts

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """Two to six initializers."""
        if isinstance(value, BlockQuantized):
            return matmul_bnb4.pack(value)
        spec: QuantizedSpec
        if isinstance(value, GroupQuantized):
            spec, parts = value.spec, matmul_nbits.pack_groups(value, self.dtype)
        else:
            assert isinstance(value, RowQuantized), "a method has no codes of this kind"
            if self.int8_activations:
                return matmul_integer.pack(value)
            out_features, in_features = value.codes.shape
            spec = RowQuantizedSpec(out_features, in_features, torch.float32)
            parts = matmul_nbits.pack_rows(value, torch.float32)
        return nibbles.split(parts) if self.in_nibbles(spec) else parts

    def in_nibbles(self, spec: QuantizedSpec) -> bool:
        """Whether 8-bit codes are stored as two matrices of 4 bits (see `nibbles`).

        Not at `accuracy_level` 4, at which 8 bits are fast; and not for nodes that compute in float16, which are meant
        for GPUs, and would round both outputs and their sum.
        """
        if self.accuracy_level:
            return False
        if isinstance(spec, GroupQuantizedSpec):
            return spec.bits == 8 and self.dtype == torch.float32
        return isinstance(spec, RowQuantizedSpec) and not self.int8_activations

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why ONNX Runtime's operator cannot take this matrix, for example because of its block size; else None."""
        if isinstance(spec, BlockQuantizedSpec):
            return matmul_bnb4.fault(spec)
        assert isinstance(spec, GroupQuantizedSpec | RowQuantizedSpec)
        if isinstance(spec, GroupQuantizedSpec) or not self.int8_activations:
            return matmul_nbits.fault(spec)
        return matmul_integer.fault(spec)


def _rounded(value: torch.Tensor) -> GroupQuantized:
    """Q8_0's codes. Blocks of zeros get the scale 1: packed scales are positive."""
    found = blocks.unpack(blocks.rounded(value), 8)
    empty = found.scales == 0
    codes = torch.where(empty.t().repeat_interleave(BLOCK, 1), found.zeros[0, 0], found.codes)
    return replace(found, codes=codes, scales=found.scales.masked_fill(empty, 1))


@dataclass(frozen=True)
class EncodingWithout:
    """Another encoding without some of its tensors, which are in other files.

    Attributes:
        encoding: the other encoding.
        names: the names of the tensors that are in other files.
    """

    encoding: Encoding
    names: frozenset[str]

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The remaining tensors of a parameter; may be empty."""
        return {part: stored for part, stored in self.encoding.specs(name, spec).items() if part not in self.names}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The remaining tensors of a parameter; may be empty."""
        return {part: tensor for part, tensor in self.encoding.tensors(record).items() if part not in self.names}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """As in the other encoding."""
        return self.encoding.fault(spec)


OPERATORS: Final[Mapping[tuple[str, str], Callable[[GraphTensors, Operator, Wiring], tuple[str, StoredMatrix]]]] = {
    (MICROSOFT, "MatMulNBits"): read_nbits,
    (MICROSOFT, "MatMulBnb4"): matmul_bnb4.read_bnb4,
    ("", "MatMulInteger"): matmul_integer.read_integer,
}
"""The operators that multiply with codes, by domain and type, and the function that reads the weight of each."""


def reads_codes(node: Operator) -> bool:
    """Whether a node is one of the `OPERATORS`, or begins a lookup of rows of codes."""
    return (node.domain, node.op_type) in OPERATORS or looks_up_codes(node)


def stored_matrix(graph: GraphTensors, node: Operator, wiring: Wiring) -> tuple[str, StoredMatrix]:
    """The path of a module, and how its weight is stored, for a node that `reads_codes`.

    Args:
        graph: the node's graph.
        node: the operator.
        wiring: which nodes yield and read each value.

    Raises:
        InputError: an attribute or an input is missing, has a shape or dtype that the operator does not take, or is one
            that runtimes or their versions compute differently.
    """
    read = read_rows if looks_up_codes(node) else OPERATORS[node.domain, node.op_type]
    return read(graph, node, wiring)


def description(matrices: Iterable[StoredMatrix]) -> str:
    """Every operator with its attributes, for users; `unquantized` if there are none."""
    blocks: dict[str, set[int]] = {}
    for matrix in matrices:
        blocks.setdefault(matrix.description, set()).add(matrix.block_size)
    operators = [f"{text} {_listed(sizes)}" if text.endswith("blocks of") else text for text, sizes in blocks.items()]
    return "; ".join(sorted(operators)) or "unquantized"


def _listed(sizes: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(sizes)))
