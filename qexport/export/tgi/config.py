"""config.json in the words of transformers 4.51 and of TGI's own config classes, from one of any version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedConfig

from qexport.architectures.config_keys import older_keys
from qexport.architectures.structure import parse_config

_GENERAL: Final = frozenset(PreTrainedConfig().to_dict()) | {"rope_parameters", "layer_types"}
"""What every configuration of transformers has, or no older version knows."""

_ROTARY: Final = ("rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor")
_OWN: Final[Mapping[str, tuple[str, ...]]] = {
    "falcon": ("num_kv_heads", "num_ln_in_parallel_attn"),
    "gemma3_text": ("sliding_window_pattern",),
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
}
_KEPT: Final = ("rope_local_base_freq", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
"""Older keys that stay where the base has them; TGI takes the others blindly, and counts heads in its own way."""

FALCON_KEYS: Final = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads", "layer_norm_epsilon",
    "new_decoder_architecture", "multi_query", "parallel_attn", "bias", "alibi",
)  # fmt: skip
"""What TGI's `RWConfig` (flash_rw_modeling.py) reads, with defaults other than those of transformers."""


def tgi_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4.51 and TGI read as transformers 5 reads `config`.

    Every value that has a default is written: the defaults differ between versions and classes.

    Args:
        config: the base's config.json.
    """
    full: dict[str, Any] = parse_config(config).to_dict()
    values = {
        key: value
        for key, value in full.items()
        if key not in _GENERAL and not key.startswith("_") and value is not None and _plain(value)
    }
    read = (*_ROTARY, *_OWN.get(full["model_type"], ()))
    older = {
        key: value
        for key, value in older_keys(full).items()
        if key in read and value is not None and (key not in _KEPT or config.get(key) is None)
    }
    return {**values, **config, "torch_dtype": "float16", "is_encoder_decoder": False, **older}


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values, from a configuration that `tgi_config` has made."""
    for key in ("num_kv_heads", "num_key_value_heads"):
        if config.get(key) is not None:
            return int(config[key])
    return int(config.get("num_attention_heads") or config["n_head"])


def _plain(value: Any) -> bool:
    """Whether JSON has it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, str | int)
