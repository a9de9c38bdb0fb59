"""The weights of the onnx layout: data files without headers, in which every tensor starts at a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import onnx_ir as ir
import torch

from qexport.artifact.digests import sha256_bytes, tensor_bytes
from qexport.errors import QexportError
from qexport.export.onnx.nodes import Emitter
from qexport.export.tensor_writer import PlacedTensors, WrittenWeights, split_by_size
from qexport.export.weight_files import WeightFiles
from qexport.formats import Outputs
from qexport.formats.onnx import EncodingWithout, OnnxFormat
from qexport.reading.onnx.external_data import ExternalData
from qexport.reading.onnx.graph import Graph
from qexport.tensors import BlockQuantizedSpec, TensorSpec

DTYPES: Final = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}
"""The dtypes that the layout can store."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor are.

    Attributes:
        file: the name of a file in the folder of the graph.
        offset: of the first byte in the file.
        spec: shape and dtype; the bytes are little-endian, row after row.
    """

    file: str
    offset: int
    spec: TensorSpec


class Weights:
    """Adds initializers to a graph when a node needs them.

    Args:
        emit: writes the nodes.
        specs: every tensor of the files, by name.
        activations: the dtype that unquantized weights are cast to.
    """

    def __init__(self, emit: Emitter, specs: Mapping[str, TensorSpec], activations: ir.DataType) -> None:
        self._emit, self._specs, self._activations = emit, specs, activations
        self._cast: dict[str, ir.Value] = {}

    def stored(self, name: str) -> ir.Value:
        """The tensor as stored in the file; its place is set later, by `put_in_place`."""
        graph = self._emit.graph
        if name not in graph.initializers:
            spec = self._specs[name]
            value = ir.Value(name=name, shape=ir.Shape(spec.shape), type=ir.TensorType(DTYPES[spec.dtype]))
            graph.initializers.add(value)
        return graph.initializers[name]

    def unquantized(self, name: str) -> ir.Value:
        """A parameter in the dtype of the activations."""
        if name not in self._cast:
            self._cast[name] = self._in_activations(self.stored(name), name)
        return self._cast[name]

    def rows(self, name: str, indices: ir.Value) -> ir.Value:
        """Some rows of a parameter; only these are cast."""
        return self._in_activations(self._emit.one("Gather", self.stored(name), indices, axis=0), name)

    def _in_activations(self, value: ir.Value, name: str) -> ir.Value:
        stored = DTYPES[self._specs[name].dtype]
        return value if stored == self._activations else self._emit.one("Cast", value, to=self._activations)


def put_in_place(graph: ir.Graph, places: Mapping[str, Place]) -> None:
    """Sets the place of each initializer's bytes."""
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


_PAGE: Final = 4096
"""The alignment of tensors in bytes: runtimes map whole pages of a file into memory."""


@dataclass(frozen=True)
class OnnxFiles(WeightFiles):
    """The data files that will be written: `model.onnx.data`, or several numbered ones."""

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor will be."""
        groups = split_by_size(self.specs, self.max_shard_size)
        return {
            name: Place(file, offset, group[name])
            for file, group in zip(_names(len(groups)), groups, strict=True)
            for name, offset in _offsets(group).items()
        }

    @property
    def files(self) -> Mapping[str, int]:
        """See `WeightFiles.files`."""
        sizes: dict[str, int] = {}
        for place in self.places.values():
            sizes[place.file] = max(sizes.get(place.file, 0), place.offset + place.spec.nbytes)
        return sizes

    @property
    def shared_bytes(self) -> int:
        """Bytes of the initializers that are in the files of the safetensors layout."""
        return sum(self.initializers[name].nbytes for name in self.shared)

    @property
    def shared(self) -> frozenset[str]:
        """The initializers that are in the files of the safetensors layout."""
        return self.encoding.names if isinstance(self.encoding, EncodingWithout) else frozenset()

    @cached_property
    def initializers(self) -> Mapping[str, TensorSpec]:
        """Every weight of the graph, including shared ones."""
        if not isinstance(self.encoding, EncodingWithout):
            return self.specs
        return replace(self, encoding=self.encoding.encoding).specs

    def container(self, folder: Path) -> DataWriter:
        """The writer of the files, for an existing folder without data files."""
        return DataWriter(folder, self.specs, self.places)

    def read_back(self, folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
        """Compares every initializer, at the place that the graph on disk names, with what was computed.

        Raises:
            QexportError: an initializer is missing, or has another shape, dtype or bytes.
        """
        graph = Graph(folder)
        for name, spec in written.specs.items():
            found = graph.initializers.get(name)
            if found is None or found.spec != spec or not isinstance(found.place, ExternalData):
                raise QexportError(f"the graph does not have the {spec} that was written", where=f"model.onnx: {name}")
            if sha256_bytes(tensor_bytes(graph.read(name))) != written.digests[name]:
                raise QexportError(
                    "a tensor's bytes on disk are not those written",
                    where=f"{found.place.path.name}: {name}",
                    mend="check the disk, then run again",
                )


class DataWriter(PlacedTensors):
    """Writes tensors into the data files of a folder.

    Args:
        folder: an existing folder without data files.
        specs: every tensor that will come.
        places: the place of each.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], places: Mapping[str, Place]) -> None:
        super().__init__(specs, {name: (folder / place.file, place.offset) for name, place in places.items()})

    def finish(self) -> tuple[str, ...]:
        """The names of all files.

        Raises:
            QexportError: a planned tensor was not written.
        """
        self.refuse_missing()
        return tuple(sorted({path.name for path, _ in self.places.values()}))


def shared_names(outputs: Outputs, rounded: frozenset[str] = frozenset()) -> frozenset[str]:
    """The initializers whose bytes are in a safetensors artifact under the same name: unquantized weights that are not
    rounded, and bitsandbytes' 4-bit codes with their absmaxes, unless those are quantized too.

    Args:
        outputs: what the pass will yield.
        rounded: the parameters that the layout rounds itself.
    """
    names: set[str] = set()
    for name, spec in outputs.specs.items():
        if isinstance(spec, TensorSpec):
            names |= {name} - rounded
        elif isinstance(spec, BlockQuantizedSpec):
            names |= {name} if spec.double_quant else {name, f"{name}.absmax"}
    return frozenset(names)


def onnx_files(outputs: Outputs, encoding: OnnxFormat, max_shard_size: int, *, shared: bool) -> OnnxFiles:
    """The files of the layout.

    Args:
        outputs: what the pass will yield.
        encoding: how parameters are stored.
        max_shard_size: bytes of tensors in one file.
        shared: whether to use the tensors of the safetensors layout instead of writing them again.
    """
    kept = EncodingWithout(encoding, shared_names(outputs, encoding.rounded)) if shared else encoding
    return OnnxFiles(kept, outputs, max_shard_size)


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.onnx.data"]
    return [f"model-{number:05d}-of-{count:05d}.onnx.data" for number in range(1, count + 1)]


def _offsets(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    offsets, end = {}, 0
    for name, spec in specs.items():
        offsets[name] = end
        end += -(-spec.nbytes // _PAGE) * _PAGE
    return offsets
