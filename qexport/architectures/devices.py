"""The device to compute on, and bfloat16 linear layers on CPUs without bfloat16 instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from qexport.errors import RecipeError


def find_device(name: str) -> torch.device:
    """The device with this name; `auto` is CUDA if available, else the CPU.

    Raises:
        RecipeError: it is not the name of a CPU or CUDA device, or no CUDA device is available.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name, re.ASCII):
        raise RecipeError(
            f"{name!r} is not a device", where="device", mend="use auto, cpu, cuda or, for example, cuda:1"
        )
    device = torch.device(name)
    if device.type == "cuda" and not available:
        raise RecipeError("no CUDA device is available", where=f"device {name}", mend="use the device cpu or auto")
    return device


_VALUES_AT_ONCE: Final = 1 << 24
_MIN_ROWS: Final = 16
"""With fewer rows, converting the weights to float32 costs more than the product."""

_MIN_VALUES: Final = 1 << 16
"""Values of a weight; for smaller weights the difference in time is negligible."""


def has_bfloat16_instructions() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU. If not, torch uses a loop, four times slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply_in_float32(model: nn.Module) -> None:
    """Makes large bfloat16 linear layers on the CPU compute in float32 and round once, as the instructions do.

    The products of two bfloat16 values are exact in float32, so only the order of the sums differs.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() >= _MIN_VALUES:
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]


def _forward(linear: nn.Linear, usual: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    weight, bias = linear.weight, linear.bias
    rows = inputs.numel() // inputs.shape[-1]
    if not weight.dtype == inputs.dtype == torch.bfloat16 or rows < _MIN_ROWS:
        return usual(inputs)
    at_once = type(linear) is nn.Linear  # Falcon's own class rounds before it adds the bias
    values, output = inputs.to(torch.float32), inputs.new_empty(*inputs.shape[:-1], len(weight))
    step = max(1, _VALUES_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        added = bias[part].to(torch.float32) if at_once and bias is not None else None
        output[..., part] = nn.functional.linear(values, weight[part].to(torch.float32), added)
    return output if at_once or bias is None else output.add_(bias)
