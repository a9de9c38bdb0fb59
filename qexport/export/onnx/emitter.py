"""Writing nodes into a graph in front of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

MICROSOFT: Final = "com.microsoft"


class Emitter:
    """Makes nodes and inserts them before `before`.

    Args:
        graph: the graph.

    Attributes:
        before: the node that comes after those that are written.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.before: ir.Node | None = None
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        outputs: int = 1,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """A node, and its outputs."""
        assert self.before is not None
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name, num_outputs=outputs)
        self.graph.insert_before(self.before, node)
        return tuple(node.outputs)

    def one(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output."""
        (output,) = self(op_type, *inputs, domain=domain, name=name, **attributes)
        return output

    def constant(self, values: np.ndarray | Sequence[int]) -> ir.Value:
        """A small tensor, int64 where it is no array. Equal ones are one."""
        array = np.ascontiguousarray(values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            value = ir.Value(name=f"constant.{len(self._constants)}", const_value=ir.tensor(array))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]
