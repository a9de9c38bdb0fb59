"""Rotary frequencies that follow the length of a text: LongRoPE's two sets, and those that no graph can hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qexport.errors import CompatibilityError

LONGROPE: Final = "longrope"


def refuse_growing(config: PretrainedConfig) -> None:
    """Refuses frequencies that transformers computes anew as a text grows: a trace would hold those of its sample.

    Raises:
        CompatibilityError: the model has such.
    """
    several = _kinds(config)
    kinds = {str(kind.get("rope_type")) for kind in several}
    if any("dynamic" in kind for kind in kinds) or (LONGROPE in kinds and len(several) > 1):
        raise CompatibilityError(
            f"a graph cannot compute rotary frequencies of the kind {', '.join(sorted(kinds))}",
            where="export: onnx, config.json: rope_parameters",
            mend="leave this layout out; the others take the model as it is",
        )


def switching_length(config: PretrainedConfig) -> int | None:
    """Tokens after which LongRoPE (arXiv:2402.13753) takes its long factors; None for other kinds."""
    lengths = (kind["original_max_position_embeddings"] for kind in _kinds(config) if kind.get("rope_type") == LONGROPE)
    return next(map(int, lengths), None)


def switched(rotary: nn.Module) -> Callable[..., Any]:
    """A forward for a module of LongRoPE that chooses its frequencies in the graph, by the last position of the batch.

    transformers chooses so too, but writes what it has chosen into a buffer, which torch.export does not let pass.
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
    """What config.json says of the frequencies, once for each kind of layers that has its own."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found:
        return [found]
    return [kind for kind in found.values() if isinstance(kind, Mapping)]
