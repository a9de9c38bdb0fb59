"""Lowers a traced graph to operators of ONNX and ONNX Runtime, and adds its weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Final, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from qexport.errors import CompatibilityError, listed
from qexport.export.onnx.attention import FusedAttention, PlainAttention, count_past_by_mask
from qexport.export.onnx.files import DTYPES, Weights
from qexport.export.onnx.linears import Linears, selective_scan
from qexport.export.onnx.lookups import Lookups
from qexport.export.onnx.nodes import DOMAIN, Emitter
from qexport.export.onnx.tracing import Trace
from qexport.formats import Outputs
from qexport.formats.onnx import OnnxFormat
from qexport.formats.onnx.operators import MICROSOFT
from qexport.tensors import TensorSpec

_ATTENTION: Final[Mapping[str, type[PlainAttention] | type[FusedAttention]]] = {
    "plain": PlainAttention,
    "fused": FusedAttention,
}


def lower(
    trace: Trace,
    outputs: Outputs,
    specs: Mapping[str, TensorSpec],
    *,
    encoding: OnnxFormat,
    attention: Literal["plain", "fused"],
) -> ir.Model:
    """The finished graph. The trace is changed, and cannot be used again.

    Args:
        trace: from `trace`, with the encoding's dtype as activations.
        outputs: how each weight is quantized.
        specs: every tensor of the files, by the names that `encoding` gives them.
        encoding: how weights are stored; the graph computes in its dtype.
        attention: ONNX's operators, or ONNX Runtime's GroupQueryAttention and RotaryEmbedding.

    Returns:
        The graph. The places of its initializers are not set yet; see `put_in_place`.

    Raises:
        CompatibilityError: a quantized weight is used by something else than a linear layer, or a weight is not used.
    """
    graph, dtype = trace.model.graph, DTYPES[encoding.dtype]
    parameters = [value for value in graph.inputs if value.name in outputs.specs]
    emit = Emitter(graph)
    weights = Weights(emit, specs, dtype)
    linears, lookups = Linears(emit, weights, outputs, encoding), Lookups(emit, weights, outputs, encoding)
    attend = _ATTENTION[attention](emit, dtype)
    for node in [node for node in graph if node.domain == DOMAIN]:
        emit.before = node
        match node.op_type:
            case "Linear":
                _replace(node, [linears.linear(node)])
            case "Attention":
                _replace(node, attend.attention(node))
            case "Rotary":
                _replace(node, [attend.rotary(node)])
            case "SelectiveScan":
                _replace(node, selective_scan(emit, node))
    if attention == "fused":
        count_past_by_mask(emit)
    for parameter in parameters:
        _place(parameter, lookups, emit)
        graph.inputs.remove(parameter)
    _finish(trace.model)
    if unused := [name for name in specs if name not in graph.initializers]:
        raise CompatibilityError(
            "the traced graph does not use these weights",
            where=f"export: onnx, {listed(unused)}",
            mend="this family is not supported yet",
        )
    return trace.model


def _replace(node: ir.Node, values: list[ir.Value]) -> None:
    """Replaces the node by the values, which take the names of its outputs, and types and shapes if they have none."""
    for old, new in zip(node.outputs, values, strict=True):
        name, is_output = old.name, old.is_graph_output()
        new.type, new.shape = new.type or old.type, new.shape or old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if is_output:
            old.name, new.name = None, name
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _place(parameter: ir.Value, lookups: Lookups, emit: Emitter) -> None:
    """Connects a parameter with the nodes other than linear layers that use it."""
    name = str(parameter.name)
    for use in list(parameter.uses()):
        node, indices = use.node, use.node.inputs[-1]
        emit.before = node
        looks_up = node.op_type == "Gather" and use.idx == 0 and node.attributes.get_int("axis", 0) == 0
        if looks_up and indices is not None:
            _replace(node, [lookups.rows(name, indices)])
        else:
            node.replace_input_with(use.idx, lookups.whole(name, node.op_type))


def _finish(model: ir.Model) -> None:
    """Simplifies and sorts the graph, and sets its opsets and producer. Shapes inside it are left to the runtime."""
    graph = model.graph
    ends = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    inner = [value for node in graph for value in node.outputs if value not in ends]
    for value in inner:
        value.shape = None
    for value in (*ends, *inner):
        value.metadata_props.clear()  # the tracer's notes; the pass below does not clear them on values
    changes = (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),  # the tracer stores paths of this machine there
    )
    for change in changes:
        change(model)
    graph.sort()
    graph.name = "model"
    del graph.opset_imports[DOMAIN]
    if any(node.domain == MICROSOFT for node in graph):
        graph.opset_imports[MICROSOFT] = 1
    model.producer_name, model.producer_version = "qexport", version("qexport")
