"""Sibling modules that servers join into one layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from typing import Final

JOINED: Final[tuple[Set[str], ...]] = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Sibling modules that become `qkv_proj` and `gate_up_proj`."""

SHARING: Final = (*JOINED, {"w1", "w3"})
"""Sibling modules that share the global scale of NVFP4: those above, and gate and up of Mixtral's experts."""


def joined_modules(modules: Mapping[str, Hashable], joined: tuple[Set[str], ...] = JOINED) -> list[list[str]]:
    """The groups of modules that become one layer each; modules that are not joined are omitted."""
    groups: dict[tuple[str, int], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for index, names in enumerate(joined):
            if leaf in names:
                groups.setdefault((parent, index), []).append(module)
    return [group for group in groups.values() if len(group) > 1]
