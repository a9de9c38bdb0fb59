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
    for change in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        change(model)
