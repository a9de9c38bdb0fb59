"""Linear layers that servers join into one when they load a model, so that they must be quantized alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final

JOINED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names of siblings, in the order of their outputs, by the name of the layer that they become."""

_BECOMES: Final = {leaf: name for name, leaves in JOINED.items() for leaf in leaves}


def joined_modules(modules: Mapping[str, Hashable]) -> list[list[str]]:
    """The groups of modules that become one layer each; modules that are not joined are omitted."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        if name := joined_name(module):
            groups.setdefault(name, []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def joined_name(module: str) -> str | None:
    """The path of the layer that a module becomes with its siblings; None if it is not joined."""
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_BECOMES[leaf]}" if leaf in _BECOMES else None
