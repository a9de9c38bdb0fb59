"""Linear layers that servers join into one when they load a model, so that they must be quantized alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final

Joined = Mapping[str, tuple[str, ...]]
"""Names of siblings, in the order of their outputs, by the name of the layer that they become."""

JOINED: Final[Joined] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

SHARING: Final[Joined] = {**JOINED, "w13": ("w1", "w3")}
"""What shares the global scale of NVFP4: those above, and gate and up of Mixtral's experts."""


def joined_modules(modules: Mapping[str, Hashable], joined: Joined = JOINED) -> list[list[str]]:
    """The groups of modules that become one layer each; modules that are not joined are omitted."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        if name := joined_name(module, joined):
            groups.setdefault(name, []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def joined_name(module: str, joined: Joined = JOINED) -> str | None:
    """The path of the layer that a module becomes with its siblings; None if it is not joined."""
    parent, _, leaf = module.rpartition(".")
    return next((f"{parent}.{name}" for name, leaves in joined.items() if leaf in leaves), None)
