"""The keys of a configuration that would load code."""

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
