"""What the operators that multiply with codes share: the graph, the stored weight, and checks of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

import torch
from torch import Tensor

from qexport.errors import InputError
from qexport.formats.stored_weight import StoredLayer
from qexport.tensors import GroupQuantizedSpec, Quantized, TensorSpec
from qexport.tensors.source import is_finite

MICROSOFT: Final = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

MEND: Final = "export the model again; this graph is damaged, or was not made by qexport"


class Operator(Protocol):
    """A node of a graph; see `qexport.reading.onnx.graph.Node`."""

    @property
    def domain(self) -> str:
        """`""` for ONNX's own operators."""
        ...

    @property
    def op_type(self) -> str:
        """The operator's name."""
        ...

    @property
    def name(self) -> str:
        """The node's name; may be empty."""
        ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the values that it reads; empty for an omitted input."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the values that it yields."""
        ...

    @property
    def integers(self) -> Mapping[str, int]:
        """Its integer attributes."""
        ...

    def input(self, index: int) -> str:
        """The name of an input; empty if it is omitted."""
        ...


class Wiring:
    """Which nodes of a graph yield and read a value.

    Args:
        nodes: all nodes, without those in the bodies of loops.
    """

    def __init__(self, nodes: Iterable[Operator]) -> None:
        self._producers: dict[str, Operator] = {}
        self._readers: dict[str, list[Operator]] = defaultdict(list)
        for node in nodes:
            self._producers |= dict.fromkeys(node.outputs, node)
            for name in node.inputs:
                self._readers[name].append(node)

    def producer(self, value: str) -> Operator | None:
        """The node that yields a value; None for an input of the graph or an initializer."""
        return self._producers.get(value)

    def reader(self, node: Operator) -> Operator | None:
        """The node that reads a node's first output, if it is the only one."""
        readers = self._readers.get(node.outputs[0], [])
        return readers[0] if len(readers) == 1 else None


class _Initializer(Protocol):
    @property
    def spec(self) -> TensorSpec: ...


class GraphTensors(Protocol):
    """The tensors of a graph; see `qexport.reading.onnx.graph.Graph`."""

    @property
    def initializers(self) -> Mapping[str, _Initializer]:
        """Every tensor that is known before the graph runs, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """A copy of an initializer. Its values are not checked.

        Raises:
            InputError: the graph has no initializer of this name, or its file has become shorter.
        """
        ...

    def where(self, name: str) -> str:
        """The place of a node or an initializer, for an error."""
        ...


class StoredMatrix(Protocol):
    """One quantized weight in a graph. Holds no large tensors."""

    @property
    def kind(self) -> str:
        """The operator that multiplies with it."""
        ...

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    @property
    def block_size(self) -> int:
        """Inputs per scale."""
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

    @property
    def description(self) -> str:
        """The operator with its attributes, for users. The block size is to be appended if it ends in `blocks of`."""
        ...

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of the layer are rounded to 8 bits."""
        ...

    def layer(self, graph: GraphTensors) -> StoredLayer:
        """The module as shown to users. May read the scales."""
        ...

    def grid(self, graph: GraphTensors) -> GroupQuantizedSpec | None:
        """The groups along the inputs; None for other codes. May read the scales."""
        ...

    def quantized(self, graph: GraphTensors) -> Quantized:
        """The codes, read from the files.

        Raises:
            InputError: a file has become shorter, or a scale, a code or the order of the inputs is out of range.
        """
        ...


def attribute(graph: GraphTensors, node: Operator, key: str) -> int:
    """An integer attribute that the operator must have.

    Raises:
        InputError: it is missing, or too small.
    """
    if node.integers.get(key, -1) < (0 if key == "quant_type" else 1):
        raise InputError(f"{node.op_type} lacks the attribute {key}", where=graph.where(node.name), mend=MEND)
    return node.integers[key]


def module_of(graph: GraphTensors, node: Operator, codes: str, suffix: str) -> str:
    """The path of the module whose codes have this name.

    Raises:
        InputError: the name does not end in `suffix`.
    """
    if not codes.endswith(suffix):
        raise InputError(f"the codes {codes!r} belong to no module", where=graph.where(node.name), mend=MEND)
    return codes.removesuffix(suffix)


def require(graph: GraphTensors, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Requires an initializer of this shape and one of these dtypes.

    Raises:
        InputError: it is missing, or has another shape or dtype.
    """
    found = graph.initializers.get(name)
    if found is None or found.spec not in [TensorSpec(shape, dtype) for dtype in dtypes]:
        given = "no initializer" if found is None else f"{found.spec.dtype} {list(found.spec.shape)}"
        raise InputError(f"expected {dtypes[0]} {list(shape)}, found {given}", where=graph.where(name), mend=MEND)


def scales_of(graph: GraphTensors, name: str) -> Tensor:
    """Reads scales or absmaxes.

    Raises:
        InputError: one is negative, NaN or Inf.
    """
    scales = graph.read(name)
    if not is_finite(scales) or bool((scales < 0).any()):
        raise InputError("a scale is negative, NaN or Inf", where=graph.where(name), mend=MEND)
    return scales
