"""What is special about a family. A family without an entry goes the general way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Family:
    """The quirks of one `model_type`.

    Attributes:
        keep_dense: patterns of module paths that no method quantizes unless the recipe insists, with the reason.
        unmergeable: patterns of module paths that an adapter must not touch, with the reason.
    """

    keep_dense: Mapping[str, str] = field(default_factory=dict)
    unmergeable: Mapping[str, str] = field(default_factory=dict)


_MAMBA = "the fused mamba kernel takes this weight directly and would bypass the change"

FAMILIES: Mapping[str, Family] = {
    "falcon_h1": Family(
        keep_dense={"*.mamba.out_proj": _MAMBA, "*.mamba.conv1d": _MAMBA},
        unmergeable={"*.mamba.out_proj": _MAMBA, "*.mamba.conv1d": _MAMBA},
    ),
}


def family(model_type: str) -> Family:
    """The quirks of `model_type`; none where the general way holds."""
    return FAMILIES.get(model_type, Family())


def matching(patterns: Mapping[str, str], module: str) -> str | None:
    """The reason of the first pattern (fnmatch, case-sensitive) that `module` matches, or None."""
    return next((reason for pattern, reason in patterns.items() if fnmatchcase(module, pattern)), None)
