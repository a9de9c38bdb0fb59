"""The graph of an ONNX artifact, as its file describes it, without the weights.

`model.onnx` is a protocol buffer that may come from an untrusted source. No file outside its folder is read, and only
graphs whose weights are all initializers are accepted: no functions, no sparse tensors, and no weights in the bodies of
loops. The format is that of the ONNX specification (`onnx.proto3`, `docs/ExternalData.md`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from qexport.errors import InputError, RecipeError
from qexport.formats.onnx.operators import MICROSOFT
from qexport.reading.onnx.external_data import DataFiles, ExternalData
from qexport.tensors import TensorSpec
from qexport.tensors.strict_files import contained_path

try:
    import onnx
    from onnx import numpy_helper
except ImportError as missing:
    raise RecipeError(
        "reading an ONNX artifact needs the package onnx, which is not installed",
        mend="pip install 'qexport[onnx]', or 'qexport[gpu]' on a machine with CUDA",
    ) from missing

GRAPH_NAME: Final = "model.onnx"

_GRAPH_LIMIT: Final = 1 << 27
_BODY_LIMIT: Final = 1 << 12
"""Largest constant in the body of a loop, in bytes."""

_READS_FILES: Final = ("EPContext",)
"""Operators that read other files."""

_MAX_VALUES: Final = 1 << 48
_MAX_DIMENSIONS: Final = 64

_DTYPES: Final[Mapping[int, torch.dtype]] = {
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
}
_MEND: Final = "export the model again; this file is damaged, or was not made by qexport"


@dataclass(frozen=True)
class Node:
    """An operator of the graph.

    Attributes:
        domain: `""` for ONNX's own operators.
        op_type: the operator.
        name: the node's; may be empty.
        inputs: names of values; empty for an omitted input.
        outputs: names of values.
        integers: its integer attributes.
    """

    domain: str
    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]

    def input(self, index: int) -> str:
        """The name of an input; empty if it is omitted."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Initializer:
    """A tensor that is known before the graph runs.

    Attributes:
        spec: shape and dtype.
        place: where its bytes are, or the bytes themselves if they are in the graph's file.
    """

    spec: TensorSpec
    place: ExternalData | bytes


class Graph:
    """`model.onnx` in a folder, and the places of its weights. Making it reads no weight.

    Args:
        folder: the artifact.

    Attributes:
        path: the graph's file.
        nodes: all operators except `Constant` and those in the bodies of loops.
        initializers: every tensor that is known before the graph runs, by name, including outputs of `Constant`.
        used: the values that an operator reads, including operators in bodies of loops.

    Raises:
        InputError: the file is missing, too large, or not an ONNX graph; it has functions, sparse tensors, operators of
            unknown domains or weights in the body of a loop; two values have the same name; a tensor has an unknown
            dtype, or its bytes are not where the graph says (see `DataFiles.place`).
    """

    def __init__(self, folder: Path) -> None:
        self.path = contained_path(folder, GRAPH_NAME)
        model = _parse(self.path)
        if model.functions or model.training_info:
            raise InputError(
                "functions and training graphs are not supported", where=str(self.path), mend="inline them"
            )
        _refuse_hidden_weights(model.graph, self.path)
        constants = [_constant(node, self.path) for node in model.graph.node if node.op_type == "Constant"]
        tensors = [*((tensor.name, tensor) for tensor in model.graph.initializer), *constants]
        self.nodes = tuple(_node(node) for node in model.graph.node if node.op_type != "Constant")
        self.used = frozenset(_names_read(model.graph))
        self._refuse_ambiguous(
            *(name for name, _ in tensors),
            *(value.name for value in model.graph.input),
            *(output for node in self.nodes for output in node.outputs if output),
        )
        files = DataFiles(folder)
        self.initializers = {name: self._initializer(name, tensor, files) for name, tensor in tensors}

    def read(self, name: str) -> torch.Tensor:
        """A copy of an initializer. Its values are not checked.

        Raises:
            InputError: the graph has no initializer of this name, or its file has become shorter.
        """
        if name not in self.initializers:
            raise InputError("the graph has no initializer of this name", where=self.where(name), mend=_MEND)
        found = self.initializers[name]
        tensor = torch.empty(found.spec.shape, dtype=found.spec.dtype)
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())
        if isinstance(found.place, bytes):
            buffer[:] = found.place
        else:
            found.place.read_into(buffer)
        return tensor

    def where(self, name: str) -> str:
        """The place of a node or an initializer, for an error."""
        return f"{self.path}: {name}"

    def _refuse_ambiguous(self, *names: str) -> None:
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError("two values have the same name", where=self.where(twice[0]), mend=_MEND)

    def _initializer(self, name: str, tensor: onnx.TensorProto, files: DataFiles) -> Initializer:
        where = self.where(name)
        sizes = tensor.dims
        valid = len(sizes) <= _MAX_DIMENSIONS and min(sizes, default=0) >= 0 and _product(sizes) <= _MAX_VALUES
        if not name or tensor.data_type not in _DTYPES or not valid:
            raise InputError(
                "an initializer has no name, has an unknown dtype, or has no valid shape", where=where, mend=_MEND
            )
        spec = TensorSpec(tuple(tensor.dims), _DTYPES[tensor.data_type])
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = [(entry.key, entry.value) for entry in tensor.external_data]
            return Initializer(spec, files.place(entries, name, spec, where))
        return Initializer(spec, _content(tensor, spec, where))


def _product(sizes: Iterable[int]) -> int:
    """The product of all sizes except 0: torch cannot make even an empty tensor with giant axes."""
    return math.prod(size for size in sizes if size)


def read_graph(path: Path) -> bytes:
    """The content of a graph's file, at most 128 MiB.

    Raises:
        InputError: the file is missing, too large, or cannot be read.
    """
    if not path.is_file():
        raise InputError("the file does not exist", where=str(path), mend="name the folder of an ONNX artifact")
    if (size := path.stat().st_size) > _GRAPH_LIMIT:
        raise InputError(f"{size} bytes are too many for a graph; the limit is {_GRAPH_LIMIT}", where=str(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the graph cannot be read: {error.strerror}", where=str(path)) from error


def _parse(path: Path) -> onnx.ModelProto:
    content = read_graph(path)
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise InputError(f"the graph cannot be read: {error}", where=str(path), mend=_MEND) from error
    if not model.graph.node or not model.opset_import:
        raise InputError("the file holds no graph", where=str(path), mend=_MEND)
    if not all(isinstance(text, str) for text in _texts(model)):
        raise InputError("a name in the graph is not UTF-8", where=str(path), mend=_MEND)
    return model


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every text field, at any depth. The library returns text that is not UTF-8 as bytes."""
    for field, value in message.ListFields():
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            for inner in [value] if isinstance(value, str | bytes | Message) else value:
                yield from _texts(inner) if isinstance(inner, Message) else [inner]


def _refuse_hidden_weights(graph: onnx.GraphProto, path: Path, *, body: bool = False) -> None:
    """Refuses everything that could hold weights, or paths to them, outside the initializers."""
    if graph.sparse_initializer:
        raise InputError("sparse tensors are not supported", where=str(path), mend=_MEND)
    if body and any(_is_external(tensor) or tensor.ByteSize() > _BODY_LIMIT for tensor in graph.initializer):
        raise InputError("there are weights in the body of an operator", where=str(path), mend=_MEND)
    domains = ("", "ai.onnx") if body else ("", "ai.onnx", MICROSOFT)
    for node in graph.node:
        where = f"{path}: {node.name or node.op_type}"
        if node.domain not in domains or node.op_type in _READS_FILES:
            raise InputError(
                f"{node.domain or 'ai.onnx'}.{node.op_type} is not supported{' in a body' if body else ''}",
                where=where,
                mend=f"only operators of ONNX and of {MICROSOFT}, which ONNX Runtime contains, are supported",
            )
        for attribute in node.attribute:
            tensors = (attribute.t, *attribute.tensors)
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors or any(map(_is_external, tensors)):
                raise InputError(
                    f"the attribute {attribute.name!r} is sparse, or is in another file", where=where, mend=_MEND
                )
            if body and any(tensor.ByteSize() > _BODY_LIMIT for tensor in tensors):
                raise InputError("there are weights in the body of an operator", where=where, mend=_MEND)
            for inner in _bodies(attribute):
                _refuse_hidden_weights(inner, path, body=True)


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in _bodies(attribute):
                yield from _names_read(body)
                yield from (output.name for output in body.output)


def _bodies(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)


def _node(node: onnx.NodeProto) -> Node:
    integers = {item.name: item.i for item in node.attribute if item.type == onnx.AttributeProto.INT}
    domain = "" if node.domain == "ai.onnx" else node.domain
    return Node(domain, node.op_type, node.name, tuple(node.input), tuple(node.output), integers)


def _constant(node: onnx.NodeProto, path: Path) -> tuple[str, onnx.TensorProto]:
    """The output's name and the tensor, whichever attribute holds it."""
    where = f"{path}: {node.name or node.op_type}"
    if len(node.output) != 1 or len(node.attribute) != 1:
        raise InputError("a constant must have one output and one value", where=where, mend=_MEND)
    value = node.attribute[0]
    match value.name:
        case "value":
            return node.output[0], value.t
        case "value_float" | "value_floats":
            floats = [*value.floats] if value.name.endswith("s") else value.f
            return node.output[0], numpy_helper.from_array(np.array(floats, np.float32))
        case "value_int" | "value_ints":
            integers = [*value.ints] if value.name.endswith("s") else value.i
            return node.output[0], numpy_helper.from_array(np.array(integers, np.int64))
    raise InputError(f"a constant with the attribute {value.name!r} is not supported", where=where, mend=_MEND)


def _content(tensor: onnx.TensorProto, spec: TensorSpec, where: str) -> bytes:
    if tensor.external_data:
        raise InputError("an initializer is both in the graph and in a data file", where=where, mend=_MEND)
    try:
        content = numpy_helper.to_array(tensor).tobytes()
    except (ValueError, TypeError) as error:
        raise InputError(f"an initializer contradicts its shape: {error}", where=where, mend=_MEND) from error
    if len(content) != spec.nbytes:
        raise InputError(f"{len(content)} bytes do not fit {spec.dtype} {list(spec.shape)}", where=where, mend=_MEND)
    return content
