"""What is changed in a graph once it is traced: what tracing leaves behind, and arithmetic in bfloat16."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import optimize

from qexport.export.onnx.nodes import Emitter


def simplify(model: ir.Model) -> None:
    """Computes what is constant, and drops what is computed twice or not used. Parameters are inputs by now, so their
    values, which nobody has yet, are not asked for.
    """
    optimize(model, onnx_shape_inference=False)
    for node in list(model.graph):
        _divide(model.graph, node)
    for change in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        change(model)


def _divide(graph: ir.Graph, node: ir.Node) -> None:
    """`x * (1 / sqrt(v))` becomes `x / sqrt(v)`, the form in which ONNX Runtime knows RMSNorm and fuses it."""
    for index, factor in enumerate(node.inputs if node.op_type == "Mul" else ()):
        reciprocal = factor.producer() if factor is not None else None
        root = reciprocal.inputs[0] if reciprocal is not None and reciprocal.op_type == "Reciprocal" else None
        if root is None or (producer := root.producer()) is None or producer.op_type != "Sqrt":
            continue
        quotient = ir.node("Div", [node.inputs[1 - index], root])
        graph.insert_before(node, quotient)
        old, new = node.outputs[0], quotient.outputs[0]
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        return


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
