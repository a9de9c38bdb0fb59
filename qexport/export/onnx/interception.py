"""The parts of a model's forward that are replaced during tracing, so that each becomes one node."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.pytorch_utils import Conv1D

from qexport.errors import CompatibilityError
from qexport.export.onnx import nodes
from qexport.export.onnx.traced_cache import Handover

LONGROPE: Final = "longrope"


def refuse_dynamic_frequencies(config: PretrainedConfig) -> None:
    """Refuses rotary frequencies that depend on the text's length: a trace would have those of its sample.

    Raises:
        CompatibilityError: the model has such frequencies.
    """
    rotary_kinds = _kinds(config)
    kinds = {str(kind.get("rope_type")) for kind in rotary_kinds}
    if any("dynamic" in kind for kind in kinds) or (LONGROPE in kinds and len(rotary_kinds) > 1):
        raise CompatibilityError(
            f"a graph cannot compute rotary frequencies of the kind {', '.join(sorted(kinds))}",
            where="export: onnx, config.json: rope_parameters",
            mend="leave this layout out; the others support the model",
        )


def switching_length(config: PretrainedConfig) -> int | None:
    """Tokens after which LongRoPE (arXiv:2402.13753) uses its long factors; None for other kinds."""
    lengths = (kind["original_max_position_embeddings"] for kind in _kinds(config) if kind.get("rope_type") == LONGROPE)
    return next(map(int, lengths), None)


def switched(rotary: nn.Module) -> Callable[..., Any]:
    """A forward for a LongRoPE module that chooses its frequencies in the graph, by the last position of the batch.

    transformers chooses in the same way, but writes its choice into a buffer, which torch.export does not allow.
    """
    config, short = rotary.config, rotary.original_inv_freq
    assert isinstance(config, PretrainedConfig)
    assert isinstance(short, Tensor)
    length = switching_length(config)
    assert length is not None
    long, _ = ROPE_INIT_FUNCTIONS[LONGROPE](config, torch.device("cpu"), seq_len=length + 1)
    compute = inspect.unwrap(type(rotary).forward)

    def forward(states: Tensor, position_ids: Tensor) -> Any:
        chosen = torch.where(position_ids.max() + 1 > length, long, short)
        return compute(
            SimpleNamespace(inv_freq=chosen, attention_scaling=rotary.attention_scaling), states, position_ids
        )

    return forward


def _kinds(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The rotary parameters in config.json, one entry per kind of layer that has its own."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found:
        return [found]
    return [kind for kind in found.values() if isinstance(kind, Mapping)]


_ATTENTION: Final = "qexport"


@contextmanager
def intercepted(model: PreTrainedModel, handover: Handover) -> Iterator[None]:
    """In this context, linears, attention, rotary embeddings and mamba's scan become nodes of qexport's domain, and
    LongRoPE chooses its frequencies in the graph.

    Args:
        model: the model, which will be called with a `TracedCache`.
        handover: of the cache.
    """
    module = sys.modules[type(model).__module__]
    with ExitStack() as stack:
        for linear in (found for found in model.modules() if isinstance(found, nn.Linear | Conv1D)):
            stack.enter_context(patch.object(linear, "forward", _linear_forward(linear)))
        for rotary in (found for found in model.modules() if getattr(found, "rope_type", None) == LONGROPE):
            stack.enter_context(patch.object(rotary, "forward", switched(rotary)))
        stack.enter_context(_attention_intercepted(model, handover))
        for attention in (found for found in model.modules() if isinstance(found, FalconAttention)):
            stack.enter_context(patch.object(attention, "_split_heads", _split_heads(attention)))
        if _is_half_rotation(getattr(module, "apply_rotary_pos_emb", None)):
            stack.enter_context(patch.object(module, "apply_rotary_pos_emb", _apply_rotary))
        if hasattr(module, "mamba2_chunk_scan"):
            stack.enter_context(patch.object(module, "mamba2_chunk_scan", _chunk_scan))
        yield


def _linear_forward(linear: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        product = nodes.linear(inputs, linear.weight, transposed=isinstance(linear, Conv1D))
        return product if linear.bias is None else product + linear.bias

    return forward


@contextmanager
def _attention_intercepted(model: PreTrainedModel, handover: Handover) -> Iterator[None]:
    """Replaces attention in transformers' registry, and torch's function for the families that call it directly."""

    def attend(query: Tensor, mask: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        tensors, key, value = handover.take()
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        past = tensors["key"], tensors["value"]
        output, *joined = nodes.attention(query, key, value, past, mask, scale, float(softcap or 0))
        tensors["key"], tensors["value"] = joined
        return output

    def registered(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        output = attend(query, attention_mask, options.get("scaling"), options.get("softcap"))
        return output.transpose(1, 2), None

    def torch_function(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        return attend(query, attn_mask, options.get("scale"), None)

    previous = model.config._attn_implementation
    with (
        patch.object(functional, "scaled_dot_product_attention", torch_function),
        patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {_ATTENTION: registered}),
        patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, {_ATTENTION: sdpa_mask}),
    ):
        if hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
            model.config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            model.config._attn_implementation = previous


def _is_half_rotation(function: Callable[..., Any] | None) -> bool:
    """Whether the function computes the rotation of `nodes.rotary`, which is tested by calling it."""
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 3, 8, generator=random) for _ in range(2))
    cos, sin = (torch.randn(1, 3, 4, generator=random).repeat(1, 1, 2) for _ in range(2))
    found = function(query, key, cos, sin)
    return all(torch.equal(own, _rotated(states, cos, sin)) for own, states in zip(found, (query, key), strict=True))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _split_heads(attention: FalconAttention) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Falcon's queries, keys and values with one Split; transformers takes keys and values with lists of indices, which
    become five nodes each.
    """

    def forward(fused: Tensor) -> tuple[Tensor, ...]:
        batch, sequence, _ = fused.shape
        size = attention.head_dim
        if attention.new_decoder_architecture:
            assert attention.num_kv_heads is not None
            shared = attention.num_heads // attention.num_kv_heads
            query, key, value = fused.view(batch, sequence, -1, shared + 2, size).split([shared, 1, 1], dim=3)
            return tuple(part.expand(query.shape).flatten(2, 3) for part in (query, key, value))
        heads = attention.num_heads
        query, key, value = fused.view(batch, sequence, heads + 2, size).split([heads, 1, 1], dim=2)
        return query, key, value

    own: Callable[[Tensor], tuple[Tensor, ...]] = attention._split_heads
    return forward if attention.new_decoder_architecture or attention.multi_query else own


def _apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotates in the dtype of the angles, which is float32 in some families (OLMo)."""
    assert unsqueeze_dim == 1, "heads are expected on the second axis"
    query_wide, key_wide = (nodes.rotary(states.to(cos.dtype), cos, sin) for states in (query, key))
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
    """Mamba 2's scan token by token: the same sums as transformers' scan by chunks, for any number of tokens."""
    heads = hidden_states.shape[2]
    step = functional.softplus(dt + dt_bias.to(dt.dtype)).clamp(*dt_limit).float()
    inputs = hidden_states.float()
    outputs, state = nodes.selective_scan(
        inputs * step[..., None], (A.float() * step).exp(), _each_head(B, heads), _each_head(C, heads), initial_states
    )
    return outputs + D[:, None] * inputs, state


def _each_head(states: Tensor, heads: int) -> Tensor:
    """[batch, sequence, groups, state_size] -> [batch, sequence, heads, state_size]; a group's heads are adjacent."""
    batch, sequence, groups, size = states.shape
    widened = states.float()[:, :, :, None].expand(batch, sequence, groups, heads // groups, size)
    return widened.reshape(batch, sequence, heads, size)
