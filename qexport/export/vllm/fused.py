"""The linear layers that vLLM joins into one, and what it therefore demands of them.

Source: `packed_modules_mapping` and `orig_to_new_stacked` of the classes in `vllm/model_executor/models`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final

JOINED: Final = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Names of siblings that become `qkv_proj` and `gate_up_proj`."""


def joined_modules(modules: Mapping[str, Hashable]) -> list[list[str]]:
    """The modules that become one layer, together; modules that stay alone are left out."""
    groups: dict[tuple[str, int], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for index, names in enumerate(JOINED):
            if leaf in names:
                groups.setdefault((parent, index), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def disagreements(schemes: Mapping[str, Hashable]) -> list[str]:
    """Joined modules that are quantized in different ways, or not all quantized.

    Args:
        schemes: how each linear layer is quantized, by module path; None for a dense one.
    """
    return [
        f"{', '.join(group)}: vLLM makes them one layer, which cannot be quantized in two ways"
        for group in joined_modules(schemes)
        if len({schemes[module] for module in group}) > 1
    ]
