"""What nodes other than linear layers read of a parameter: some of its rows, or all of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.errors import CompatibilityError
from qexport.export.onnx.files import DTYPES, Weights
from qexport.export.onnx.nodes import Emitter
from qexport.formats import Outputs
from qexport.formats.onnx import OnnxFormat
from qexport.formats.onnx.lookups import HIGH_BITS, LOW_BITS, ZERO
from qexport.formats.onnx.nibbles import FACTOR, HIGH, LOW
from qexport.tensors import GroupQuantizedSpec, TensorSpec


class Lookups:
    """Parameters as the nodes read them, in the dtype of the activations.

    Args:
        emit: writes the nodes.
        weights: the initializers.
        outputs: how each parameter is quantized.
        encoding: how it is stored.
    """

    def __init__(self, emit: Emitter, weights: Weights, outputs: Outputs, encoding: OnnxFormat) -> None:
        self._emit, self._weights, self._outputs, self._encoding = emit, weights, outputs, encoding
        self._dtype = DTYPES[encoding.dtype]

    def rows(self, name: str, indices: ir.Value) -> ir.Value:
        """Some rows of a parameter.

        Args:
            name: the parameter's.
            indices: int64 [batch, sequence].

        Raises:
            CompatibilityError: it is quantized.
        """
        spec = self._encoding.stored(name, self._outputs.specs[name])
        if name in self._encoding.rounded and isinstance(spec, GroupQuantizedSpec):
            return self._dequantized(name.removesuffix(".weight"), spec, indices)
        self._refuse_codes(name, spec, "Gather")
        return self._weights.rows(name, indices)

    def whole(self, name: str, reader: str) -> ir.Value:
        """A parameter.

        Args:
            name: its name.
            reader: the operator that reads it.

        Raises:
            CompatibilityError: it is quantized or rounded.
        """
        self._refuse_codes(name, self._encoding.stored(name, self._outputs.specs[name]), reader)
        return self._weights.unquantized(name)

    def _refuse_codes(self, name: str, spec: object, reader: str) -> None:
        if isinstance(spec, TensorSpec):
            return
        own = name in self._encoding.rounded
        raise CompatibilityError(
            f"a {'rounded' if own else 'quantized'} weight is used by {reader}",
            where=f"export: onnx, {name}",
            mend="leave out token_embedding_type and output_tensor_type"
            if own
            else "leave this layer unquantized: `quantize.overrides` (gptq), else `quantize.skip_modules`",
        )

    def _dequantized(self, module: str, spec: GroupQuantizedSpec, indices: ir.Value) -> ir.Value:
        """`(code - 128) * scale`, in operators of ONNX alone; read back by `qexport.formats.onnx.lookups`."""
        emit = self._emit
        apart = self._encoding.in_nibbles(spec) and f"{module}.weight" not in self._encoding.looked_up
        codes = self._joined(module, spec, indices) if apart else self._whole(module, indices)
        steps = emit.one("Sub", codes, self._number(ZERO))
        scales = emit.one("Unsqueeze", self._gathered(f"{module}.scales", indices), emit.constant([-1]))
        return emit.one("Reshape", emit.one("Mul", steps, scales), emit.constant([0, 0, spec.in_features]))

    def _whole(self, module: str, indices: ir.Value) -> ir.Value:
        return self._emit.one("Cast", self._gathered(f"{module}.qweight", indices), to=self._dtype)

    def _joined(self, module: str, spec: GroupQuantizedSpec, indices: ir.Value) -> ir.Value:
        """The codes out of their nibbles. A byte has those of two codes, the earlier one in its low bits."""
        emit = self._emit
        high, low = (self._gathered(f"{module}.qweight_{part}", indices) for part in (HIGH, LOW))
        up, down = self._number(FACTOR), self._number(1 / FACTOR)
        even = emit.one("Add", emit.one("Mul", self._bits(high, LOW_BITS), up), self._bits(low, LOW_BITS))
        odd = emit.one("Add", self._bits(high, HIGH_BITS), emit.one("Mul", self._bits(low, HIGH_BITS), down))
        pairs = emit.one("Concat", *(emit.one("Unsqueeze", each, emit.constant([-1])) for each in (even, odd)), axis=-1)
        return emit.one("Reshape", pairs, emit.constant([0, 0, spec.groups, spec.group_size]))

    def _bits(self, values: ir.Value, mask: int) -> ir.Value:
        kept = self._emit.one("BitwiseAnd", values, self._emit.constant(np.array(mask, dtype=np.uint8)))
        return self._emit.one("Cast", kept, to=self._dtype)

    def _gathered(self, name: str, indices: ir.Value) -> ir.Value:
        return self._emit.one("Gather", self._weights.stored(name), indices, axis=0)

    def _number(self, value: float) -> ir.Value:
        return self._emit.constant(np.array(value, dtype=self._dtype.numpy()))
