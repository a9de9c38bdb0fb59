"""The cache that a model sees while it is traced: what comes in as the graph's inputs, and goes out as its outputs."""

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
        shape: without the batch; None where the tokens are counted.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def grows(self) -> bool:
        """Whether it has one entry for each token."""
        return None in self.shape


def cache_tensors(model: PreTrainedModel) -> list[tuple[CacheTensor, ...]]:
    """What each layer keeps, found out by running the model on the meta device.

    Raises:
        CompatibilityError: a layer keeps something else than keys and values, or the states of one mamba mixer.
    """
    with torch.no_grad():
        ids = torch.zeros((1, 3), dtype=torch.int64, device="meta")
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return [tuple(_layer_tensors(layer)) for layer in cache.layers]


def _layer_tensors(layer: Any) -> list[CacheTensor]:
    if not isinstance(layer, DynamicLayer):
        raise CompatibilityError(
            f"a layer keeps a {type(layer).__name__}; the onnx layout knows attention, and attention beside mamba",
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
    """What the cache was given last goes to the attention that follows."""

    def __init__(self) -> None:
        self._pending: tuple[dict[str, Tensor], Tensor, Tensor] | None = None

    def give(self, tensors: dict[str, Tensor], key: Tensor, value: Tensor) -> None:
        """A layer's tensors, and the new keys and values."""
        self.finish()
        self._pending = tensors, key, value

    def take(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The same, once."""
        assert self._pending is not None, "attention without a cache"
        pending, self._pending = self._pending, None
        return pending

    def finish(self) -> None:
        """What was given is taken."""
        assert self._pending is None, "keys and values that no attention has taken"


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
        """The tokens of the past."""
        return self.tensors["key"].shape[_TOKENS_AXIS]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens are kept, also where attention slides: the mask leaves the others out."""
        return self.get_seq_length() + query_length, 0

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        """The state before the new inputs; zeros there are what the convolution would pad with."""
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
        layers: the tensors of each layer by name, which are replaced by those after the new tokens.
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
        """What each layer keeps after the new tokens."""
        return [list(cast(TracedLayer, layer).tensors.values()) for layer in self.layers]
