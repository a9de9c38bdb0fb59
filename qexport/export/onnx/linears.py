"""The product with each weight as the operator for its codes, and the recurrence of mamba as a Scan."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.export.onnx.files import DTYPES, Weights
from qexport.export.onnx.nodes import Emitter
from qexport.export.onnx.tracing import OPSET
from qexport.formats import LlmInt8Format, Outputs
from qexport.formats.onnx import OnnxFormat, matmul_bnb4, matmul_integer, matmul_nbits
from qexport.formats.onnx.nibbles import FACTOR, HIGH, LOW
from qexport.formats.onnx.operators import MICROSOFT
from qexport.tensors import (
    BlockQuantizedSpec,
    Float4QuantizedSpec,
    Float8QuantizedSpec,
    GroupQuantizedSpec,
    RowQuantizedSpec,
    TensorSpec,
)

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
    keys and queries [batch, heads, state_size]. Its names must differ from all names in the surrounding graph, even
    those added later, so they begin with `step`.
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


class Linears:
    """Replaces the nodes `Linear` of `qexport.export.onnx.nodes`.

    Args:
        emit: writes the nodes.
        weights: the initializers.
        outputs: how each weight is quantized.
        encoding: how it is stored; its dtype is that of inputs and outputs.
    """

    def __init__(self, emit: Emitter, weights: Weights, outputs: Outputs, encoding: OnnxFormat) -> None:
        self._emit, self._weights, self._outputs, self._encoding = emit, weights, outputs, encoding
        self._activations = DTYPES[encoding.dtype]

    def linear(self, node: ir.Node) -> ir.Value:
        """The value that replaces the output."""
        inputs, weight = node.inputs
        assert inputs is not None
        assert weight is not None
        name = str(weight.name)
        module = name.removesuffix(".weight")
        match self._encoding.stored(name, self._outputs.specs[name]):
            case TensorSpec():
                return self._unquantized(inputs, name, transposed=bool(node.attributes.get_int("transposed", 0)))
            case GroupQuantizedSpec() as groups:
                return self._groups(inputs, module, groups)
            case BlockQuantizedSpec() as blocks:
                return self._in_float32(inputs, module, blocks)
            case RowQuantizedSpec() as rows:
                return self._in_float32(inputs, module, rows)
            case Float8QuantizedSpec() | Float4QuantizedSpec():
                raise AssertionError("the layout has refused it")

    def _unquantized(self, inputs: ir.Value, name: str, *, transposed: bool) -> ir.Value:
        weight = self._weights.unquantized(name)
        if not transposed:
            weight = self._emit.one("Transpose", weight, perm=[1, 0])
        return self._emit.one("MatMul", inputs, weight, name=name.removesuffix(".weight"))

    def _groups(self, inputs: ir.Value, module: str, spec: GroupQuantizedSpec) -> ir.Value:
        if spec.desc_act:
            inputs = self._emit.one("Gather", inputs, self._weights.stored(f"{module}.order"), axis=-1)
        return self._matmul_nbits(inputs, module, spec)

    def _in_float32(self, inputs: ir.Value, module: str, spec: BlockQuantizedSpec | RowQuantizedSpec) -> ir.Value:
        """The operators require inputs in the scales' dtype, float32; float16 scales would change the weights."""
        narrow = self._activations != ir.DataType.FLOAT
        if narrow:
            inputs = self._emit.one("Cast", inputs, to=ir.DataType.FLOAT)
        if isinstance(spec, BlockQuantizedSpec):
            output = self._matmul_bnb4(inputs, module, spec)
        elif isinstance(self._outputs.format, LlmInt8Format):
            output = self._matmul_nbits(inputs, module, spec)
        else:
            output = self._matmul_integer(inputs, module)
        return self._emit.one("Cast", output, to=self._activations) if narrow else output

    def _matmul_nbits(self, inputs: ir.Value, module: str, spec: GroupQuantizedSpec | RowQuantizedSpec) -> ir.Value:
        asymmetric = isinstance(spec, GroupQuantizedSpec) and not spec.sym
        if not self._encoding.in_nibbles(spec):
            return self._nbits_node(inputs, module, spec, bits=spec.bits, zero_points=asymmetric)
        factor = self._emit.constant(np.array(FACTOR, dtype=np.float32))
        high = self._nbits_node(inputs, module, spec, bits=4, zero_points=asymmetric, part=f"_{HIGH}")
        low = self._nbits_node(inputs, module, spec, bits=4, zero_points=True, part=f"_{LOW}")
        return self._emit.one("Add", self._emit.one("Mul", high, factor), low)

    def _nbits_node(
        self,
        inputs: ir.Value,
        module: str,
        spec: GroupQuantizedSpec | RowQuantizedSpec,
        *,
        bits: int,
        zero_points: bool,
        part: str = "",
    ) -> ir.Value:
        zeros = [self._weights.stored(f"{module}.zero_points{part}")] if zero_points else []
        codes, scales = (self._weights.stored(f"{module}.{name}") for name in (f"qweight{part}", "scales"))
        return self._emit.one(
            "MatMulNBits",
            *(inputs, codes, scales, *zeros),
            domain=MICROSOFT,
            name=f"{module}{part}",
            K=spec.in_features,
            N=spec.out_features,
            bits=bits,
            block_size=matmul_nbits.block_size(spec),
            accuracy_level=self._encoding.accuracy_level,
        )

    def _matmul_bnb4(self, inputs: ir.Value, module: str, spec: BlockQuantizedSpec) -> ir.Value:
        return self._emit.one(
            "MatMulBnb4",
            inputs,
            self._weights.stored(f"{module}.weight"),
            self._weights.stored(f"{module}.weight.absmax"),
            domain=MICROSOFT,
            name=module,
            K=spec.in_features,
            N=spec.out_features,
            block_size=spec.block_size,
            quant_type=matmul_bnb4.QUANT_TYPES[spec.quant_type],
        )

    def _matmul_integer(self, inputs: ir.Value, module: str) -> ir.Value:
        """W8A8: each token's inputs are rounded to multiples of their largest magnitude / 127, as in vLLM's kernels
        (`csrc/quantization/compressed_tensors/int8_quant_kernels.cu`); the library compressed-tensors uses 127.5.

        Both sides are unsigned with zero point 128: with signed weights, kernels for processors without VNNI
        instructions saturate the sums of two products.
        """
        emit = self._emit
        largest = emit.one("ReduceMax", emit.one("Abs", inputs), emit.constant([-1]), keepdims=1)
        scale = emit.one("Div", largest, emit.constant(np.array(127, dtype=np.float32)))
        scale = emit.one("Max", scale, emit.constant(np.array(np.finfo(np.float32).tiny, dtype=np.float32)))
        codes = emit.one("Round", emit.one("Div", inputs, scale))
        shifted = emit.one("Add", codes, emit.constant(np.array(matmul_integer.ZERO_POINT, dtype=np.float32)))
        middle = emit.constant(np.array(matmul_integer.ZERO_POINT, dtype=np.uint8))
        product = emit.one(
            "MatMulInteger",
            emit.one("Cast", shifted, to=ir.DataType.UINT8),
            self._weights.stored(f"{module}.qweight"),
            middle,
            middle,
            name=module,
        )
        output = emit.one("Mul", emit.one("Cast", product, to=ir.DataType.FLOAT), scale)
        return emit.one("Mul", output, self._weights.stored(f"{module}.scales"))
