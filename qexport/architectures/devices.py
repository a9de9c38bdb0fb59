"""The device to compute on, and what gives the same bits on a CPU every time, whatever its instructions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Final

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


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA, operations whose sums have one order, wherever torch has such ones; it warns of others. The setting is
    the process's.

    cuBLAS reads its variable when it is first used; it makes products independent of what ran before.
    """
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # every tensor is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for what torch computes; the bits of many functions depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


VECTOR_MATH: Final = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log1p", "log2", "sin", "sqrt",
    "tan", "tanh", "trunc",
)  # fmt: skip
"""The functions that torch takes from MKL (`aten/src/ATen/cpu/vml.h`)."""


@cache
def start_vector_math() -> None:
    """Calls each of MKL's vector functions once on one thread, so that its results are the same in every process.

    MKL chooses their code at the first call. Where two threads make it together, one of them may compute with other
    code: measured with torch 2.13 on a CPU with AVX512, where the first cosines of a process, a model's rotary angles,
    had other bits in 2 of 40 runs.
    """
    with single_thread():
        for name in VECTOR_MATH:
            for dtype in (torch.float32, torch.float64):
                getattr(torch, name)(torch.full((64,), 0.5, dtype=dtype))


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
