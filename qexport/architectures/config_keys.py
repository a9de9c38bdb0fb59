"""Keys of config.json: those that would load code, and those of transformers before version 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

CODE_KEYS: Final = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "trust_remote_code",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "kernel_config",
    }
)
"""Keys by which transformers finds code outside itself: Python files of the model's, or kernels of a hub."""

_MACHINE_KEYS: Final = frozenset({"_name_or_path", "_commit_hash"})
"""Keys that say where a file lay on somebody's machine."""


def without_code_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration without `CODE_KEYS` and machine paths at any depth, and the code keys that were dropped."""
    dropped: list[str] = []

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        dropped.extend(key for key in value if key in CODE_KEYS)
        return {key: clean(item) for key, item in value.items() if key not in CODE_KEYS | _MACHINE_KEYS}

    return clean(config), sorted(set(dropped))


def older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What each older key says where a configuration has it; which of them a reader needs depends on the family.

    Args:
        config: every value of a configuration, defaults included: `to_dict()` of a parsed one.
    """
    keys = _rotary(config.get("rope_parameters") or {})
    if config["model_type"] == "falcon":
        keys |= _falcon(config)
    if layers := config.get("layer_types"):
        keys["sliding_window_pattern"] = _pattern(list(layers), config)
    return keys


def _rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Families with two kinds of layers have one set of parameters for each kind."""
    main = parameters.get("full_attention", parameters)
    if not isinstance(main, Mapping) or "rope_theta" not in main:
        return {}
    moved = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in main.items() if key not in moved}
    keys = {
        "rope_theta": main["rope_theta"],
        "rotary_emb_base": main["rope_theta"],
        "rotary_pct": main.get("partial_rotary_factor", 1.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    if "partial_rotary_factor" in main:
        keys["partial_rotary_factor"] = main["partial_rotary_factor"]
    if isinstance(local := parameters.get("sliding_attention"), Mapping):
        keys["rope_local_base_freq"] = local["rope_theta"]
    return keys


def _falcon(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of keys and values, and layer norms in a layer; transformers finds them from other keys."""
    if config["new_decoder_architecture"]:
        norms = config.get("num_ln_in_parallel_attn")
        return {"num_kv_heads": config["num_kv_heads"], "num_ln_in_parallel_attn": 2 if norms is None else norms}
    return {"num_kv_heads": 1 if config["multi_query"] else config["num_attention_heads"]}


def _pattern(layers: list[str], config: Mapping[str, Any]) -> int:
    """Every how many layers one has full attention."""
    if "full_attention" in layers:
        return layers.index("full_attention") + 1
    return int(config.get("_sliding_window_pattern", len(layers) + 1))
