"""Attention and rotary embeddings in ONNX's operators, or in ONNX Runtime's fused operators."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from qexport.errors import CompatibilityError
from qexport.export.onnx.nodes import Emitter
from qexport.export.onnx.tracing import PAST, Cache
from qexport.formats.onnx.operators import MICROSOFT

_SWAPPED_HEADS: Final = [0, 2, 1, 3]
"""[batch, sequence, heads, head_dim] to [batch, heads, sequence, head_dim], and back."""


class PlainAttention:
    """Matrix products and softmax. Heads that share keys and values are multiplied with them as one matrix.

    Args:
        emit: writes the nodes.
        activations: the dtype of the scores.
    """

    def __init__(self, emit: Emitter, activations: ir.DataType) -> None:
        self._emit, self._masks = emit, AdditiveMasks(emit, activations)
        self._activations = activations

    def attention(self, node: ir.Node) -> list[ir.Value]:
        """The values that replace the outputs of an `Attention`."""
        emit = self._emit
        query, key, value, past_key, past_value, mask = (_required(found) for found in node.inputs)
        heads, shared, head_dim = _size(query, 1), _size(past_key, 1), _size(past_value, 3)
        keys, values = emit.one("Concat", past_key, key, axis=2), emit.one("Concat", past_value, value, axis=2)
        query = emit.one("Mul", query, self._number(node.attributes.get_float("scale", 1.0)))
        if heads != shared:
            query = emit.one("Reshape", query, emit.constant([0, shared, -1, _size(past_key, 3)]))
        scores = emit.one("MatMul", query, emit.one("Transpose", keys, perm=[0, 1, 3, 2]))
        if heads != shared:
            scores = emit.one("Reshape", scores, emit.constant([0, heads, -1, 0]))
        if cap := node.attributes.get_float("softcap", 0.0):
            scores = emit.one("Div", scores, self._number(cap))
            scores = emit.one("Mul", emit.one("Tanh", scores), self._number(cap))
        scores = emit.one("Softmax", emit.one("Add", scores, self._masks.additive(mask)), axis=-1)
        if heads != shared:
            scores = emit.one("Reshape", scores, emit.constant([0, shared, -1, 0]))
        output = emit.one("MatMul", scores, values)
        if heads != shared:
            output = emit.one("Reshape", output, emit.constant([0, heads, -1, head_dim]))
        return [output, keys, values]

    def rotary(self, node: ir.Node) -> ir.Value:
        """The value that replaces the output of a `Rotary`."""
        emit = self._emit
        states, cos, sin = (_required(found) for found in node.inputs)
        channels, rotated = _size(states, 3), _size(cos, 2)
        passed = None
        if rotated < channels:
            states, passed = emit("Split", states, emit.constant([rotated, channels - rotated]), axis=-1, outputs=2)
        cos, sin = (emit.one("Unsqueeze", found, emit.constant([1])) for found in (cos, sin))
        first, second = emit("Split", states, axis=-1, num_outputs=2, outputs=2)
        turned = emit.one("Concat", emit.one("Neg", second), first, axis=-1)
        output = emit.one("Add", emit.one("Mul", states, cos), emit.one("Mul", turned, sin))
        return output if passed is None else emit.one("Concat", output, passed, axis=-1)

    def _number(self, value: float) -> ir.Value:
        return self._emit.constant(np.array(value, dtype=self._activations.numpy()))


def refuse_unfused(cache: Cache) -> None:
    """Refuses head sizes that GroupQueryAttention does not take; ONNX Runtime checks them only when the graph runs.

    Raises:
        CompatibilityError: the head_dim is not a multiple of 8, or differs between keys and values.
    """
    layers = {tuple(sorted({tensor.shape[-1] or 0 for tensor in tensors if tensor.grows})) for tensors in cache}
    if wrong := sorted(sizes for sizes in layers if len(sizes) > 1 or sizes[0] % 8):
        raise CompatibilityError(
            f"GroupQueryAttention has one head_dim per layer, a multiple of 8, not {' and '.join(map(str, wrong[0]))}",
            where="export: onnx, attention",
            mend="use `attention: plain`",
        )


class FusedAttention:
    """ONNX Runtime's GroupQueryAttention and RotaryEmbedding.

    The mask is passed as a bias on the scores, so padding, sliding windows and ALiBi are those of the model.

    Args:
        emit: writes the nodes.
        activations: the dtype of the scores.
    """

    def __init__(self, emit: Emitter, activations: ir.DataType) -> None:
        self._emit, self._masks = emit, AdditiveMasks(emit, activations)
        self._lengths: tuple[ir.Value, ir.Value] | None = None
        self._row_numbers: ir.Value | None = None
        self._tables: dict[ir.Value, ir.Value] = {}
        self._tokens: dict[ir.Value, ir.Value] = {}

    def attention(self, node: ir.Node) -> list[ir.Value]:
        """The values that replace the outputs of an `Attention`."""
        emit = self._emit
        query, key, value, past_key, past_value, mask = (_required(found) for found in node.inputs)
        heads, shared = _size(query, 1), _size(past_key, 1)
        last, total = self._sequence_lengths()
        output, keys, values = emit(
            "GroupQueryAttention",
            *(self._by_token(states) for states in (query, key, value)),
            past_key,
            past_value,
            last,
            total,
            None,
            None,
            None,
            self._masks.additive(mask),
            domain=MICROSOFT,
            outputs=3,
            num_heads=heads,
            kv_num_heads=shared,
            scale=node.attributes.get_float("scale", 1.0),
            softcap=node.attributes.get_float("softcap", 0.0),
        )
        _skip_swapping(node.outputs[0], output)
        return [self._by_head(output, heads), keys, values]

    def rotary(self, node: ir.Node) -> ir.Value:
        """The value that replaces the output of a `Rotary`. The model computes its table, with one row per token of the
        batch, so every way to scale the angles is supported.
        """
        states, cos, sin = (_required(found) for found in node.inputs)
        heads, channels, rotated = _size(states, 1), _size(states, 3), _size(cos, 2)
        turned = self._emit.one(
            "RotaryEmbedding",
            self._by_token(states),
            self._rows(),
            self._table(cos),
            self._table(sin),
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=rotated if rotated < channels else 0,
        )
        by_head = self._by_head(turned, heads)
        self._tokens[by_head] = turned
        return by_head

    def _table(self, cos_or_sin: ir.Value) -> ir.Value:
        """[batch, sequence, channels] -> [batch * sequence, channels / 2]."""
        if cos_or_sin not in self._tables:
            emit, half = self._emit, _size(cos_or_sin, 2) // 2
            rows = emit.one("Reshape", cos_or_sin, emit.constant([-1, 2 * half]))
            bounds = (emit.constant([number]) for number in (0, half, 1))
            self._tables[cos_or_sin] = emit.one("Slice", rows, *bounds)
        return self._tables[cos_or_sin]

    def _rows(self) -> ir.Value:
        """int64 [batch, sequence]: the row of each token in the table."""
        if self._row_numbers is None:
            emit = self._emit
            shape = emit.one("Shape", emit.graph.inputs[0])
            count = emit.one("Squeeze", emit.one("ReduceProd", shape, keepdims=1))
            zero, one = emit.constant(np.array(0, dtype=np.int64)), emit.constant(np.array(1, dtype=np.int64))
            self._row_numbers = emit.one("Reshape", emit.one("Range", zero, count, one), shape)
        return self._row_numbers

    def _sequence_lengths(self) -> tuple[ir.Value, ir.Value]:
        """int32 [batch], the last token's position, and the number of tokens. Padding counts; the mask excludes it."""
        if self._lengths is None:
            emit = self._emit
            batch, total = emit("Split", emit.one("Shape", emit.graph.inputs[1]), axis=0, num_outputs=2, outputs=2)
            total = emit.one("Cast", total, to=ir.DataType.INT32)
            last = emit.one("Sub", total, emit.constant(np.array([1], dtype=np.int32)))
            self._lengths = emit.one("Expand", last, batch), emit.one("Squeeze", total)
        return self._lengths

    def _by_token(self, states: ir.Value) -> ir.Value:
        """[batch, heads, sequence, head_dim] -> [batch, sequence, heads * head_dim], the shape that linears yield."""
        if states in self._tokens:
            return self._tokens[states]
        width = _size(states, 1) * _size(states, 3)
        swapped = _input_of(states, "Transpose")
        if swapped is None:
            swapped = self._emit.one("Transpose", states, perm=_SWAPPED_HEADS)
        elif (joined := _input_of(swapped, "Reshape")) is not None and _is_by_token(joined, width):
            return joined
        return self._emit.one("Reshape", swapped, self._emit.constant([0, 0, width]))

    def _by_head(self, states: ir.Value, heads: int) -> ir.Value:
        """[batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim]."""
        split = self._emit.one("Reshape", states, self._emit.constant([0, 0, heads, -1]))
        return self._emit.one("Transpose", split, perm=_SWAPPED_HEADS)


def _skip_swapping(by_head: ir.Value, by_token: ir.Value) -> None:
    """If the model transposes and reshapes the output to [batch, sequence, width] again, uses `by_token` there."""
    width = _size(by_head, 1) * _size(by_head, 3)
    for swap in [use.node for use in by_head.uses() if _swaps_heads(use.node)]:
        for join in [use.node for use in swap.outputs[0].uses() if use.node.op_type == "Reshape"]:
            if _is_by_token(join.outputs[0], width):
                join.outputs[0].replace_all_uses_with(by_token)


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == _SWAPPED_HEADS


def _input_of(value: ir.Value, op_type: str) -> ir.Value | None:
    """The input of the node that yields the value, if it is a Reshape, or a Transpose of heads and tokens."""
    node = value.producer()
    if node is None or node.op_type != op_type or (op_type == "Transpose" and not _swaps_heads(node)):
        return None
    return node.inputs[0]


def _is_by_token(value: ir.Value, width: int) -> bool:
    return value.shape is not None and len(value.shape) == 3 and value.shape[2] == width


def count_past_by_mask(emit: Emitter) -> None:
    """Takes the number of past tokens from the mask and the new tokens, in place of the size of a past.

    So keys and values may lie in a buffer that has room for later tokens, to which GroupQueryAttention appends if past
    and present are the same memory; with a buffer of just the past tokens the number is the same.
    """
    ids, mask = emit.graph.inputs[:2]
    for node in [node for node in emit.graph if _counts_past(node)]:
        emit.before = node
        total, new = (emit.one("Shape", value, start=1, end=2) for value in (mask, ids))
        node.outputs[0].replace_all_uses_with(emit.one("Sub", total, new))
        emit.graph.remove(node, safe=True)


def _counts_past(node: ir.Node) -> bool:
    of = node.inputs[0] if node.op_type == "Shape" else None
    bounds = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
    return of is not None and of.is_graph_input() and str(of.name).startswith(PAST) and bounds == (2, 3)


class AdditiveMasks:
    """Masks that are added to the scores, each made once.

    Masked scores are lowered by half of the dtype's range, not to minus infinity: padding tokens see no token, and
    their outputs must stay finite, since their keys and values are multiplied with zeros later.

    Args:
        emit: writes the nodes.
        activations: the dtype of the scores.
    """

    def __init__(self, emit: Emitter, activations: ir.DataType) -> None:
        self._emit, self._made = emit, dict[ir.Value, ir.Value]()
        dtype = activations.numpy()
        self._lowest = np.array(np.finfo(dtype).min / 2, dtype=dtype)
        self._zero = np.array(0, dtype=dtype)

    def additive(self, mask: ir.Value) -> ir.Value:
        """The mask in the dtype of the scores. A mask of numbers is limited to the same lowest value."""
        if mask not in self._made:
            emit, lowest = self._emit, self._emit.constant(self._lowest)
            if mask.dtype == ir.DataType.BOOL:
                self._made[mask] = emit.one("Where", mask, emit.constant(self._zero), lowest)
            else:
                self._made[mask] = emit.one("Max", mask, lowest)
        return self._made[mask]


def _required(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _size(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int), f"{value.name} has a dynamic axis {axis}"
    return size
