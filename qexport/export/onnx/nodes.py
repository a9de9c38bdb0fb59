"""Nodes of the domain `qexport` in a traced graph, the emitter of nodes, and simplifications of a traced graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import optimize
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out


class Emitter:
    """Makes nodes and inserts them before `before`.

    Args:
        graph: the graph.

    Attributes:
        before: the node before which new nodes are inserted.
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
        """Adds a node; returns its outputs."""
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
        """Adds a node with one output, and returns that."""
        (output,) = self(op_type, *inputs, domain=domain, name=name, **attributes)
        return output

    def constant(self, values: np.ndarray | Sequence[int]) -> ir.Value:
        """A small constant, int64 unless it is an array. Equal constants are one value."""
        array = np.ascontiguousarray(values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            value = ir.Value(name=f"constant.{len(self._constants)}", const_value=ir.tensor(array))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]


DOMAIN: Final = "qexport"


def linear(inputs: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    """`Linear`: inputs [..., in] times a weight [out, in], or [in, out] if transposed; the output is [..., out]."""
    out_features = weight.shape[1 if transposed else 0]
    return symbolic(
        f"{DOMAIN}::Linear",
        (inputs, weight),
        {"transposed": int(transposed)},
        dtype=inputs.dtype,
        shape=(*inputs.shape[:-1], out_features),
        version=1,
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`Attention` over the past and the new tokens.

    Args:
        query: [batch, heads, sequence, head_dim].
        key: keys of the new tokens [batch, kv_heads, sequence, head_dim].
        value: likewise.
        past: keys and values of earlier tokens [batch, kv_heads, past, head_dim].
        mask: [batch, heads or 1, sequence, past + sequence]: bool, true where a token is visible, or numbers
            that are added to the scores.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask; 0 for none.

    Returns:
        The output [batch, heads, sequence, head_dim], and keys and values of all tokens.
    """
    batch, heads, sequence, _ = query.shape
    total = past[0].shape[2] + key.shape[2]
    outputs = symbolic_multi_out(
        f"{DOMAIN}::Attention",
        (query, key, value, *past, mask),
        {"scale": scale, "softcap": softcap},
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=(
            (batch, heads, sequence, value.shape[3]),
            (batch, key.shape[1], total, key.shape[3]),
            (batch, value.shape[1], total, value.shape[3]),
        ),
        version=1,
    )
    return outputs[0], outputs[1], outputs[2]


def rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`Rotary`: half rotation of the first channels of states [batch, heads, sequence, head_dim].

    Args:
        states: queries or keys.
        cos: [batch, sequence, rotated channels], the same in both halves.
        sin: likewise.
    """
    return symbolic(
        f"{DOMAIN}::Rotary", (states, cos, sin), {}, dtype=states.dtype, shape=tuple(states.shape), version=1
    )


def selective_scan(
    inputs: Tensor, decay: Tensor, keys: Tensor, queries: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`SelectiveScan`, the recurrence of Mamba 2 (arXiv:2405.21060, section 3): for each token t,
    `state = state * decay[t] + inputs[t] * keys[t]` and `output[t] = state . queries[t]`.

    Args:
        inputs: float32 [batch, sequence, heads, head_dim], multiplied with the time step.
        decay: float32 [batch, sequence, heads], a factor.
        keys: float32 [batch, sequence, heads, state_size], the paper's B.
        queries: float32 [batch, sequence, heads, state_size], the paper's C.
        state: float32 [batch, heads, head_dim, state_size].

    Returns:
        The outputs, with the shape of the inputs, and the last state.
    """
    outputs = symbolic_multi_out(
        f"{DOMAIN}::SelectiveScan",
        (inputs, decay, keys, queries, state),
        {},
        dtypes=(torch.float32, torch.float32),
        shapes=(tuple(inputs.shape), tuple(state.shape)),
        version=1,
    )
    return outputs[0], outputs[1]


def simplify(model: ir.Model) -> None:
    """Folds constants, and removes duplicate and unused nodes. Parameters must be inputs: they have no values."""
    optimize(model, onnx_shape_inference=False)
    for node in list(model.graph):
        _divide(model.graph, node)
    for change in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        change(model)


def _divide(graph: ir.Graph, node: ir.Node) -> None:
    """`x * (1 / sqrt(v))` becomes `x / sqrt(v)`, the form in which ONNX Runtime recognizes RMSNorm and fuses it."""
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


_DATA_MOVEMENT: Final = {
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
"""Operators that copy or convert values without arithmetic."""


def compute_in_float32(graph: ir.Graph) -> None:
    """Makes operators that compute in bfloat16 compute in float32 and round once, as torch does (Falcon's ALiBi)."""
    emit = Emitter(graph)
    for node in list(graph):
        if node.op_type in _DATA_MOVEMENT or all(value.dtype != ir.DataType.BFLOAT16 for value in node.outputs):
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
