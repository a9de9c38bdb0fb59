"""The initializers of a graph, which lie in files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
import torch

from qexport.export.onnx.emitter import Emitter
from qexport.tensors import TensorSpec

DTYPES: Final = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}
"""What a graph can hold here."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie.

    Attributes:
        file: the name of a file in the folder of the graph.
        offset: bytes from its beginning.
        spec: shape and dtype; the bytes are little-endian, row after row.
    """

    file: str
    offset: int
    spec: TensorSpec


class Weights:
    """Brings initializers into a graph when a node wants them.

    Args:
        emit: writes the nodes.
        specs: every tensor that there is, by name.
        activations: the dtype that dense weights are cast to.
    """

    def __init__(self, emit: Emitter, specs: Mapping[str, TensorSpec], activations: ir.DataType) -> None:
        self._emit, self._specs, self._activations = emit, specs, activations
        self._cast: dict[str, ir.Value] = {}

    def stored(self, name: str) -> ir.Value:
        """The tensor as it lies in the file, without a place so far."""
        graph = self._emit.graph
        if name not in graph.initializers:
            spec = self._specs[name]
            value = ir.Value(name=name, shape=ir.Shape(spec.shape), type=ir.TensorType(DTYPES[spec.dtype]))
            graph.initializers.add(value)
        return graph.initializers[name]

    def dense(self, name: str) -> ir.Value:
        """A parameter in the dtype of the activations."""
        if name not in self._cast:
            self._cast[name] = self._in_activations(self.stored(name), name)
        return self._cast[name]

    def rows(self, name: str, indices: ir.Value) -> ir.Value:
        """Rows of a parameter; only these are cast."""
        return self._in_activations(self._emit.one("Gather", self.stored(name), indices, axis=0), name)

    def _in_activations(self, value: ir.Value, name: str) -> ir.Value:
        stored = DTYPES[self._specs[name].dtype]
        return value if stored == self._activations else self._emit.one("Cast", value, to=self._activations)


def put_in_place(graph: ir.Graph, places: Mapping[str, Place]) -> None:
    """Points each initializer to its bytes."""
    for name, value in graph.initializers.items():
        if value.const_value is None:
            place = places[name]
            value.const_value = ir.ExternalTensor(
                location=place.file,
                offset=place.offset,
                length=place.spec.nbytes,
                dtype=DTYPES[place.spec.dtype],
                shape=ir.Shape(place.spec.shape),
                name=name,
            )
