"""config.json in the words of transformers 4.51 and of TGI's own config classes, from one of any version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedConfig

from qexport.architectures.structure import parse_config

_GENERAL: Final = frozenset(PreTrainedConfig().to_dict()) | {"rope_parameters", "layer_types"}
"""What every configuration of transformers has, or no older version knows."""

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
    result = {**values, **config}
    result |= {"torch_dtype": "float16", "is_encoder_decoder": False}
    result |= _rotary(full, config)
    if full["model_type"] == "falcon":
        result |= _falcon(full)
    if full["model_type"] == "gemma3_text":
        result |= _sliding_pattern(full)
    return result


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values, from a configuration that `tgi_config` has made."""
    for key in ("num_kv_heads", "num_key_value_heads"):
        if config.get(key) is not None:
            return int(config[key])
    return int(config.get("num_attention_heads") or config["n_head"])


def _rotary(full: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like: transformers 5 has moved them into `rope_parameters`."""
    parameters = full.get("rope_parameters")
    if not parameters:
        return {}
    by_layer = isinstance(parameters.get("full_attention"), Mapping)
    main = parameters["full_attention"] if by_layer else parameters
    result: dict[str, Any] = {"rope_theta": main["rope_theta"]}
    if by_layer:
        result["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if main.get("rope_type", "default") != "default":
        moved = ("rope_theta", "partial_rotary_factor")
        result["rope_scaling"] = {key: value for key, value in main.items() if key not in moved}
    if (factor := main.get("partial_rotary_factor")) is not None:
        result["partial_rotary_factor"] = factor
    if full["model_type"] == "gpt_neox":
        result |= {"rotary_emb_base": main["rope_theta"], "rotary_pct": main.get("partial_rotary_factor", 1.0)}
    return {key: value for key, value in result.items() if config.get(key) is None or key == "rope_theta"}


def _falcon(full: Mapping[str, Any]) -> dict[str, Any]:
    """TGI counts heads of keys and values itself, and has no default for the number of layer norms."""
    if not full["new_decoder_architecture"]:
        return {"num_kv_heads": 1 if full["multi_query"] else full["num_attention_heads"]}
    norms = full.get("num_ln_in_parallel_attn")
    return {"num_ln_in_parallel_attn": 2 if norms is None else norms}


def _sliding_pattern(full: Mapping[str, Any]) -> dict[str, Any]:
    """Every how many layers one has full attention; transformers 5 lists the layers instead."""
    layers = full.get("layer_types") or []
    if "full_attention" not in layers:
        return {"sliding_window_pattern": full.get("_sliding_window_pattern", len(layers) + 1)}
    return {"sliding_window_pattern": layers.index("full_attention") + 1}


def _plain(value: Any) -> bool:
    """Whether JSON has it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, str | int)
