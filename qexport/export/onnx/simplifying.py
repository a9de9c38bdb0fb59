"""What tracing leaves behind, taken out of a graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import optimize


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
