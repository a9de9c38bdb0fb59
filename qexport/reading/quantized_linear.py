"""A linear layer that keeps its weight as it is stored."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qexport.errors import CompatibilityError
from qexport.reading.dequantization import dequantize
from qexport.reading.stored_format import StoredWeight, Tensors


class QuantizedLinear(nn.Module):
    """Takes the place of a linear layer; holds the tensors of the file and dequantizes them in each forward.

    The product is the one of the class that it replaces (`nn.Linear`, `FalconLinear`, GPT-2's `Conv1D`), so that the
    outputs are those of the dense layer with the dequantized weight, bit for bit.

    Args:
        linear: the layer to replace, on any device.
        weight: how the weight is stored.
        tensors: the weight, as `weight.parts` names it.
        bias: [out], or None.

    Raises:
        InputError: the tensors contradict each other or the config, or a value is out of range.
    """

    def __init__(self, linear: nn.Module, weight: StoredWeight, tensors: Tensors, bias: Tensor | None) -> None:
        super().__init__()
        weight.quantized(tensors)
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._transposed = isinstance(linear, Conv1D)
        self._product: Callable[..., Tensor] = type(linear).forward
        for part in weight.parts:
            self.register_buffer(_attribute(part), tensors[part])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's outputs [..., out] for inputs [..., in], with the weight in the dtype of the inputs."""
        with torch.no_grad():
            weight = self.dequantized(inputs.dtype)
            weight = weight.t().contiguous() if self._transposed else weight
        return self._product(SimpleNamespace(weight=weight, bias=self.bias, nf=self.out_features), inputs)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""
        tensors = {part: getattr(self, _attribute(part)) for part in self._weight.parts}
        return dequantize(self._weight.quantized(tensors), dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {type(self._weight).__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Codes and scales follow to another device; `model.half()` and its like change the bias only."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        raise CompatibilityError(
            "a loaded artifact cannot be saved again: readers would take its codes for weights",
            mend="copy the artifact's folder",
        )


def _attribute(part: str) -> str:
    """A buffer's name has no dots."""
    return part.replace(".", "_")
