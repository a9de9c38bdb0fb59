"""The recurrence of a mamba mixer as ONNX's Scan: one token after the other, in prefill and in decoding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.export.onnx.nodes import Emitter
from qexport.export.onnx.tracing import OPSET

_TOKENS = 1


def selective_scan(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """The values that replace the outputs of a `SelectiveScan` of `qexport.export.onnx.nodes`."""
    inputs, decay, keys, queries, state = node.inputs
    last, outputs = emit(
        "Scan",
        state,
        inputs,
        decay,
        keys,
        queries,
        outputs=2,
        body=_step(),
        num_scan_inputs=4,
        scan_input_axes=[_TOKENS] * 4,
        scan_output_axes=[_TOKENS],
    )
    return [outputs, last]


def _step() -> ir.Graph:
    """One token: state [batch, heads, head_dim, state_size], inputs [batch, heads, head_dim], decay [batch, heads],
    keys and queries [batch, heads, state_size]. Its names must differ from all of the graph around it, also from those
    that are given later, so they begin with `step`.
    """
    names = ("state", "inputs", "decay", "keys", "queries")
    state, inputs, decay, keys, queries = values = [
        ir.Value(name=f"step.{name}", type=ir.TensorType(ir.DataType.FLOAT)) for name in names
    ]
    graph = ir.Graph(values, [], nodes=[], name="step", opset_imports={"": OPSET})
    nodes: list[ir.Node] = []

    def add(op_type: str, *given: ir.Value) -> ir.Value:
        nodes.append(ir.node(op_type, given))
        nodes[-1].outputs[0].name = f"step.{len(nodes)}"
        return nodes[-1].outputs[0]

    def axes(*numbers: int) -> ir.Value:
        name = "step.axes" + "".join(f".{number}" for number in numbers)
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
        if name not in graph.initializers:
            graph.register_initializer(value)
        return graph.initializers[name]

    change = add("Mul", add("Unsqueeze", inputs, axes(3)), add("Unsqueeze", keys, axes(2)))
    after = add("Add", add("Mul", state, add("Unsqueeze", decay, axes(2, 3))), change)
    output = add("Squeeze", add("MatMul", after, add("Unsqueeze", queries, axes(3))), axes(3))
    graph.extend(nodes)
    for value, name in ((after, "state_after"), (output, "output")):
        value.name, value.type = f"step.{name}", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(value)
    return graph
