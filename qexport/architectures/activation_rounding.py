"""The rounding of activations to 8 bits that servers do, simulated in models of 16 or 32 bits.

With W8A8 each token is rounded with a scale of its own, as in vLLM 0.32 (`csrc/quantization/w8a8/int8/scaled_quant.cu`,
`dynamic_scaled_int8_quant_kernel`). compressed-tensors itself divides by 127.5; no server does. ONNX Runtime's
MatMulNBits does the same with each block of a token at `accuracy_level` 4. FP8 rounds tokens, or blocks of 128 of a
token, to e4m3 (`csrc/quantization/w8a8/fp8/common.cu`, `per_token_group_quant_fp8`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from qexport.architectures.families import can_stage, staged_forward
from qexport.tensors.float8 import LARGEST_FLOAT8
from qexport.tensors.input_rounding import CodeType, InputRounding

_LARGEST_CODE: Final = 127.0
_SMALLEST_SCALE: Final = 1 / (LARGEST_FLOAT8 * 512)
"""Of a token in e4m3: vLLM's `min_scaling_factor`."""


def round_tokens(values: Tensor, codes: CodeType = "int8") -> Tensor:
    """The values after a round trip through 8-bit codes: symmetric, one scale per token, ties to even.

    The scale is the token's absmax over 127 or 448, in float32; a token of zeros stays zero. The server multiplies the
    codes; here code times scale is rounded to the dtype of the values, whose steps are far smaller than a code's.

    Args:
        values: [..., in], floating point.
        codes: what the values become.

    Returns:
        The same shape and dtype.
    """
    wide = values.to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    if codes == "float8":
        scales = (absmax / LARGEST_FLOAT8).clamp_(min=_SMALLEST_SCALE)
        rounded = (wide / scales).to(torch.float8_e4m3fn)
        return rounded.to(torch.float32).mul_(scales).to(values.dtype)
    factors = (_LARGEST_CODE / absmax).nan_to_num_(posinf=0.0)
    steps = (wide * factors).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return steps.mul_(absmax / _LARGEST_CODE).to(values.dtype)


def round_blocks(values: Tensor, rounding: InputRounding) -> Tensor:
    """The values after a round trip through 8-bit codes, each block as `round_tokens` rounds a token.

    Args:
        values: [..., in], floating point.
        rounding: what a block is.

    Returns:
        The same shape and dtype.
    """
    if rounding.block is None:
        return round_tokens(values, rounding.codes)
    width = values.shape[-1]
    order = torch.arange(width) if rounding.order is None else rounding.order
    placed = nn.functional.pad(values[..., order.to(values.device)], (0, -width % rounding.block))
    rounded = round_tokens(placed.unflatten(-1, (-1, rounding.block)), rounding.codes).flatten(-2)[..., :width]
    return rounded[..., order.argsort().to(values.device)]


def round_inputs(module: nn.Module, rounding: InputRounding) -> bool:
    """Makes a linear layer, or all experts of a mixture, round its inputs from now on.

    Args:
        module: the layer, or the module that holds the experts' matrices.
        rounding: how; experts are known to round tokens or their blocks in order.

    Returns:
        False if it is a mixture whose computation is not known; it stays as it is.
    """
    if "weight" in module._parameters:
        module.register_forward_pre_hook(lambda _, args: (round_blocks(args[0], rounding), *args[1:]))
        return True
    if not _known_for_experts(rounding) or not can_stage(module):
        return False
    module.forward = _experts_forward(module, rounding)
    return True


def _known_for_experts(rounding: InputRounding) -> bool:
    """Blocks of int8 codes are ONNX Runtime's, whose graphs have no mixtures."""
    return rounding.block is None or rounding.codes == "float8"


def _experts_forward(module: nn.Module, rounding: InputRounding) -> Callable[..., Any]:
    rounded, plain = staged_forward(module, partial(round_blocks, rounding=rounding)), type(module).forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.is_meta:  # a probe for the types of the outputs: no tokens can be counted
            return plain(module, hidden_states, *args, **kwargs)
        return rounded(hidden_states, *args, **kwargs)

    return forward
