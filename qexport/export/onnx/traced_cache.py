"""The cache of a model while it is traced: the graph's inputs for the past, and its outputs for the present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from qexport.errors import CompatibilityError

_TOKENS_AXIS: Final = 2


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a layer's cache.

    Attributes:
        name: `key`, `value`, `conv_state` or `recurrent_state`.
        shape: without the batch; None for the axis of tokens.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def grows(self) -> bool:
        """Whether it has one entry per token."""
        return None in self.shape


def cache_tensors(model: PreTrainedModel) -> list[tuple[CacheTensor, ...]]:
    """The tensors of each layer's cache, found by running the model on the meta device.

    Raises:
        CompatibilityError: a layer's cache is something else than keys and values, and the states of one mamba mixer.
    """
    with torch.no_grad():
        ids = torch.zeros((1, 3), dtype=torch.int64, device="meta")
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return [tuple(_layer_tensors(layer)) for layer in cache.layers]


def _layer_tensors(layer: Any) -> list[CacheTensor]:
    if not isinstance(layer, DynamicLayer):
        raise CompatibilityError(
            f"a layer's cache is a {type(layer).__name__}; onnx supports attention, and attention beside mamba",
            where="export: onnx",
        )
    assert layer.keys is not None
    assert layer.values is not None
    found = [
        CacheTensor(name, (states.shape[1], None, states.shape[3]), states.dtype)
        for name, states in (("key", layer.keys), ("value", layer.values))
    ]
    if isinstance(layer, LinearAttentionLayer):
        found += [
            CacheTensor(name, tuple(states[0].shape[1:]), states[0].dtype)
            for name, states in (("conv_state", layer.conv_states), ("recurrent_state", layer.recurrent_states))
        ]
    return found


class Handover:
    """Passes the keys and values that the cache receives on to the attention node that follows."""

    def __init__(self) -> None:
        self._pending: tuple[dict[str, Tensor], Tensor, Tensor] | None = None

    def give(self, tensors: dict[str, Tensor], key: Tensor, value: Tensor) -> None:
        """Stores a layer's tensors, and the new keys and values."""
        self.finish()
        self._pending = tensors, key, value

    def take(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Returns what `give` stored, once."""
        assert self._pending is not None, "attention without a cache"
        pending, self._pending = self._pending, None
        return pending

    def finish(self) -> None:
        """Checks that everything given was taken."""
        assert self._pending is None, "keys and values that no attention has used"


class TracedLayer(LinearAttentionLayer, DynamicLayer):  # type: ignore[misc, override] # as in transformers
    """One layer of the cache. Keys and values are joined by the attention's node, so `update` only passes them on."""

    def __init__(self, tensors: dict[str, Tensor], handover: Handover) -> None:
        DynamicLayer.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.tensors, self._handover = tensors, handover
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values to the attention that follows."""
        self._handover.give(self.tensors, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """The number of past tokens."""
        return self.tensors["key"].shape[_TOKENS_AXIS]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Past and new tokens. All are kept, even with a sliding window, which the mask applies."""
        return self.get_seq_length() + query_length, 0

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        """The old state and the new inputs, joined. Its zeros at the start equal the padding of the convolution."""
        state = self.tensors["conv_state"]
        joined = torch.cat([state, conv_states], dim=-1)
        self.tensors["conv_state"] = joined[..., -state.shape[-1] :]
        return joined

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keeps the state after the last token."""
        self.tensors["recurrent_state"] = recurrent_states
        return recurrent_states


class TracedCache(Cache):
    """The cache of all layers.

    Args:
        layers: the tensors of each layer by name; replaced by those after the new tokens.
        handover: to the attention.
    """

    def __init__(self, layers: list[dict[str, Tensor]], handover: Handover) -> None:
        super().__init__(layers=[TracedLayer(tensors, handover) for tensors in layers])

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The mixer's last inputs."""
        return self._tensors(layer_idx).get("conv_state")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The mixer's state."""
        return self._tensors(layer_idx).get("recurrent_state")

    def _tensors(self, layer_idx: int) -> dict[str, Tensor]:
        return cast(TracedLayer, self.layers[layer_idx]).tensors

    def outputs(self) -> list[list[Tensor]]:
        """The tensors of each layer's cache after the new tokens."""
        return [list(cast(TracedLayer, layer).tensors.values()) for layer in self.layers]
