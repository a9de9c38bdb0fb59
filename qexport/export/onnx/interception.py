"""Where a model's forward is turned aside while it is traced, so that what matters arrives as one node.

The places are those that transformers (5.23) gives its attention, rotary embeddings and mixers in every family.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from qexport.export.onnx import placeholders
from qexport.export.onnx.frequencies import LONGROPE, switched
from qexport.export.onnx.traced_cache import Handover

_ATTENTION: Final = "qexport"


@contextmanager
def intercepted(model: PreTrainedModel, handover: Handover) -> Iterator[None]:
    """Inside, linears, attention, rotary embeddings and mamba's scan become nodes of our own; LongRoPE chooses its
    frequencies in the graph.

    Args:
        model: the model, which will be called with a `TracedCache`.
        handover: the cache's.
    """
    module = sys.modules[type(model).__module__]
    with ExitStack() as stack:
        for linear in (found for found in model.modules() if isinstance(found, nn.Linear | Conv1D)):
            stack.enter_context(patch.object(linear, "forward", _linear_forward(linear)))
        for rotary in (found for found in model.modules() if getattr(found, "rope_type", None) == LONGROPE):
            stack.enter_context(patch.object(rotary, "forward", switched(rotary)))
        stack.enter_context(_attention_intercepted(model, handover))
        if _turns_halves(getattr(module, "apply_rotary_pos_emb", None)):
            stack.enter_context(patch.object(module, "apply_rotary_pos_emb", _apply_rotary))
        if hasattr(module, "mamba2_chunk_scan"):
            stack.enter_context(patch.object(module, "mamba2_chunk_scan", _chunk_scan))
        yield


def _linear_forward(linear: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        product = placeholders.linear(inputs, linear.weight, transposed=isinstance(linear, Conv1D))
        return product if linear.bias is None else product + linear.bias

    return forward


@contextmanager
def _attention_intercepted(model: PreTrainedModel, handover: Handover) -> Iterator[None]:
    """In transformers' registry of attentions, and in torch's function for the families that call it themselves."""

    def attend(query: Tensor, mask: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        tensors, key, value = handover.take()
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        past = tensors["key"], tensors["value"]
        output, *joined = placeholders.attention(query, key, value, past, mask, scale, float(softcap or 0))
        tensors["key"], tensors["value"] = joined
        return output

    def registered(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        output = attend(query, attention_mask, options.get("scaling"), options.get("softcap"))
        return output.transpose(1, 2), None

    def torchs_own(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        return attend(query, attn_mask, options.get("scale"), None)

    usual = model.config._attn_implementation
    with (
        patch.object(functional, "scaled_dot_product_attention", torchs_own),
        patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {_ATTENTION: registered}),
        patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, {_ATTENTION: sdpa_mask}),
    ):
        if hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
            model.config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            model.config._attn_implementation = usual


def _turns_halves(function: Callable[..., Any] | None) -> bool:
    """Whether it is the rotation of `placeholders.rotary`: found out by calling it."""
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 3, 8, generator=random) for _ in range(2))
    cos, sin = (torch.randn(1, 3, 4, generator=random).repeat(1, 1, 2) for _ in range(2))
    found = function(query, key, cos, sin)
    return all(torch.equal(own, _turned(states, cos, sin)) for own, states in zip(found, (query, key), strict=True))


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """In the dtype of the angles, which some families (OLMo) leave in float32."""
    assert unsqueeze_dim == 1, "heads are expected on the second axis"
    query_wide, key_wide = (placeholders.rotary(states.to(cos.dtype), cos, sin) for states in (query, key))
    return query_wide.to(query.dtype), key_wide.to(key.dtype)


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor,
    dt_limit: tuple[float, float],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Mamba 2's scan token by token: the same sum as transformers' chunks, for one token and for many."""
    heads = hidden_states.shape[2]
    step = functional.softplus(dt + dt_bias.to(dt.dtype)).clamp(*dt_limit).float()
    inputs = hidden_states.float()
    outputs, state = placeholders.selective_scan(
        inputs * step[..., None], (A.float() * step).exp(), _each_head(B, heads), _each_head(C, heads), initial_states
    )
    return outputs + D[:, None] * inputs, state


def _each_head(states: Tensor, heads: int) -> Tensor:
    """[batch, sequence, groups, state_size] -> [batch, sequence, heads, state_size]; a group's heads are together."""
    batch, sequence, groups, size = states.shape
    widened = states.float()[:, :, :, None].expand(batch, sequence, groups, heads // groups, size)
    return widened.reshape(batch, sequence, heads, size)
