"""A linear layer that holds the codes of an artifact, and what it multiplies with."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qexport.errors import CompatibilityError
from qexport.formats.bitsandbytes import four_bit_tensors
from qexport.formats.stored_weight import StoredWeight, Tensors
from qexport.reading.computing import Kernel, WeightBudget
from qexport.reading.int4_kernel import FEW_ROWS, Int4Weight, int4_weight
from qexport.tensors import BlockQuantized, GroupQuantized, Quantized, ValuesQuantized

_ROWS_AT_ONCE: Final = 512


def dequantize(quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] on the device of the codes, computed in float32 and rounded to `dtype`.

    bitsandbytes' 4-bit codes are first rounded to the dtype that was quantized, as bitsandbytes does.
    """
    if isinstance(quantized, BlockQuantized):
        return four_bit_tensors.dequantize(quantized).to(dtype)
    if isinstance(quantized, ValuesQuantized):
        return quantized.dequantize(dtype)
    weight = torch.empty(quantized.codes.shape, dtype=dtype, device=quantized.codes.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        end = start + _ROWS_AT_ONCE
        weight[start:end] = quantized.rows(start, end).dequantize(dtype)
    return weight


class QuantizedLinear(nn.Module):
    """Replaces a linear layer; holds the stored tensors and dequantizes them, once if the weight may be kept.

    It calls the forward of the class that it replaces (`nn.Linear`, `FalconLinear`, GPT-2's `Conv1D`), so the outputs
    are those of the original layer with the dequantized weight, bit for bit. With the kernel `int4` that holds for more
    than `FEW_ROWS` inputs at a time; fewer are multiplied with the codes.

    Args:
        linear: the layer to replace, on any device.
        weight: how the weight is stored.
        tensors: the stored tensors that `weight.parts` names.
        bias: [out], or None.
        budget: the room for dequantized weights, shared with the model's other layers.
        kernel: see `qexport.reading.computing.Kernel`; `int4` only where the weight has no `layer_obstacle`.

    Raises:
        InputError: the tensors contradict each other or the config, or a value is out of range.
    """

    bias: nn.Parameter | None
    kept_weight: Tensor | None
    int4_codes: Tensor | None
    int4_scales: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        weight: StoredWeight,
        tensors: Tensors,
        bias: Tensor | None,
        *,
        budget: WeightBudget,
        kernel: Kernel,
    ) -> None:
        super().__init__()
        weight.quantized(tensors)
        self.out_features, self.in_features = weight.shape
        self._weight, self._budget, self._kernel = weight, budget, kernel
        self._transposed = isinstance(linear, Conv1D)
        self._product: Callable[..., Tensor] = type(linear).forward
        for part in weight.parts:
            self.register_buffer(_attribute(part), tensors[part])
        for made in _MADE:
            self.register_buffer(made, None, persistent=False)
        self._int4: Int4Weight | None = None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's outputs [..., out] for inputs [..., in], with the weight in the dtype of the inputs.

        Raises:
            CompatibilityError: the inputs are not bfloat16, and the kernel is `int4`.
        """
        if self._kernel == "int4" and inputs.numel() <= FEW_ROWS * self.in_features:
            outputs = (self._int4 or self._pack()).product(inputs)
            return outputs if self.bias is None else outputs + self.bias
        return self._product(
            SimpleNamespace(weight=self._factor(inputs.dtype), bias=self.bias, nf=self.out_features), inputs
        )

    def codes(self) -> Quantized:
        """The codes, on the layer's device."""
        return self._weight.quantized({part: getattr(self, _attribute(part)) for part in self._weight.parts})

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {type(self._weight).__name__}"

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """The weight as the replaced class has it, from the budget's memory if it is there or has room."""
        kept = self.kept_weight
        if kept is not None and kept.dtype == dtype:
            return kept
        with torch.inference_mode(False), torch.no_grad():
            weight = dequantize(self.codes(), dtype)
            weight = weight.t().contiguous() if self._transposed else weight
        if kept is None and self._budget.take(weight.nbytes):
            self.kept_weight = weight
        return weight

    def _pack(self) -> Int4Weight:
        """Brings the weight into the kernel's form."""
        with torch.inference_mode(False), torch.no_grad():
            codes = self.codes()
            assert isinstance(codes, GroupQuantized)
            packed = int4_weight(codes)
        self.int4_codes, self.int4_scales, self._int4 = packed.codes, packed.scales, packed
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Codes and scales move to another device; `model.half()` and similar calls change only the bias."""
        self._forget()
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _forget(self) -> None:
        """What was made of the codes, for their device and dtype."""
        if self.kept_weight is not None:
            self._budget.give_back(self.kept_weight.nbytes)
        for made in _MADE:
            self._buffers[made] = None
        self._int4 = None

    def _save_to_state_dict(self, *_: Any) -> None:
        raise CompatibilityError(
            "a loaded artifact cannot be saved again: loaders would take its codes for weights",
            mend="copy the artifact's folder",
        )


_MADE: Final = ("kept_weight", "int4_codes", "int4_scales")
"""Buffers that are made of the codes when they are first needed, so that torch and transformers count them."""


def _attribute(part: str) -> str:
    """The name of a part's buffer, which may not contain dots."""
    return part.replace(".", "_")
