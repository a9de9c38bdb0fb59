"""Arithmetic in bfloat16, which ONNX Runtime's processor kernels lack."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from qexport.export.onnx.emitter import Emitter

_MOVING: Final = {
    "Cast",
    "Concat",
    "Expand",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""Operators that compute nothing."""


def compute_in_float32(graph: ir.Graph) -> None:
    """Lets operators that compute in bfloat16 compute in float32 and round once, as torch does (Falcon's ALiBi)."""
    emit = Emitter(graph)
    for node in list(graph):
        if node.op_type in _MOVING or all(value.dtype != ir.DataType.BFLOAT16 for value in node.outputs):
            continue
        emit.before = node
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                node.replace_input_with(index, emit.one("Cast", value, to=ir.DataType.FLOAT))
        for value in node.outputs:
            _round(graph, node, value)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    rounded = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16})
    value.replace_all_uses_with(rounded.outputs[0])
    rounded.replace_input_with(0, value)
    rounded.outputs[0].type, rounded.outputs[0].shape = value.type, value.shape
    value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, rounded)
