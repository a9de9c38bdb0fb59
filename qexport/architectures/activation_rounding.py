"""The rounding of activations to int8 that servers do, simulated in models of 16 or 32 bits.

With W8A8 each token is rounded with a scale of its own, as in vLLM 0.32 (`csrc/quantization/w8a8/int8/scaled_quant.cu`,
`dynamic_scaled_int8_quant_kernel`). compressed-tensors itself divides by 127.5; no server does. ONNX Runtime's
MatMulNBits does the same with each block of a token at `accuracy_level` 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from qexport.architectures.families import can_stage, staged_forward
from qexport.tensors.input_rounding import InputRounding

_LARGEST_CODE: Final = 127.0


def round_tokens(values: Tensor) -> Tensor:
    """The values after a round trip through int8: symmetric, one scale per token, ties to even.

    The scale is the token's absmax over 127, in float32; a token of zeros stays zero. The server multiplies the codes
    in integers; here code times scale is rounded to the dtype of the values, whose steps are far smaller than a code's.

    Args:
        values: [..., in], floating point.

    Returns:
        The same shape and dtype.
    """
    wide = values.to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    factors = (_LARGEST_CODE / absmax).nan_to_num_(posinf=0.0)
    codes = (wide * factors).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.mul_(absmax / _LARGEST_CODE).to(values.dtype)


def round_blocks(values: Tensor, rounding: InputRounding) -> Tensor:
    """The values after a round trip through int8, each block as `round_tokens` rounds a token.

    Args:
        values: [..., in], floating point.
        rounding: what a block is.

    Returns:
        The same shape and dtype.
    """
    if rounding.block is None:
        return round_tokens(values)
    width = values.shape[-1]
    order = torch.arange(width) if rounding.order is None else rounding.order
    placed = nn.functional.pad(values[..., order.to(values.device)], (0, -width % rounding.block))
    rounded = round_tokens(placed.unflatten(-1, (-1, rounding.block))).flatten(-2)[..., :width]
    return rounded[..., order.argsort().to(values.device)]


def round_inputs(module: nn.Module, rounding: InputRounding) -> bool:
    """Makes a linear layer, or all experts of a mixture, round its inputs from now on.

    Args:
        module: the layer, or the module that holds the experts' matrices.
        rounding: how; experts are known to round whole tokens alone.

    Returns:
        False if it is a mixture whose computation is not known; it stays as it is.
    """
    if "weight" in module._parameters:
        module.register_forward_pre_hook(lambda _, args: (round_blocks(args[0], rounding), *args[1:]))
        return True
    if rounding.block is not None or not can_stage(module):
        return False
    module.forward = _experts_forward(module)
    return True


def _experts_forward(module: nn.Module) -> Callable[..., Any]:
    rounded, plain = staged_forward(module, round_tokens), type(module).forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.is_meta:  # a probe for the types of the outputs: no tokens can be counted
            return plain(module, hidden_states, *args, **kwargs)
        return rounded(hidden_states, *args, **kwargs)

    return forward
