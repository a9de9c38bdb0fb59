"""What a `quantization_config` of compressed-tensors says of each module.

The reference is compressed-tensors 0.17.0 (`quantization/quant_config.py`, `utils/match.py`): a target or an entry of
`ignore` is a module's path, `re:` and an expression that matches from the start of the path, or a class (`Linear`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from qexport.errors import InputError
from qexport.reading.module_patterns import compiled, strings
from qexport.reading.stored_format import WHERE, Scheme

_FORMATS: Final = ("int-quantized", "pack-quantized")


class CompressedTensorsRules:
    """The `quantization_config`.

    Args:
        config: the content.

    Attributes:
        packed: the format is `pack-quantized`, else it is `int-quantized`.

    Raises:
        InputError: another format, a field that is missing or of another type, or a scheme that no layout here has.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("format") not in _FORMATS:
            raise InputError(
                f"format is {config.get('format')!r}; this reader knows {', '.join(_FORMATS)}", where=WHERE
            )
        if config.get("kv_cache_scheme") is not None:
            raise InputError("a quantized cache is not read", where=f"{WHERE}: kv_cache_scheme")
        self.packed = config["format"] == "pack-quantized"
        self._ignore = _Names(config.get("ignore") or [], f"{WHERE}: ignore")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise InputError("config_groups must map names to groups", where=WHERE)
        self._groups = [_group(group, f"{WHERE}: config_groups: {name}") for name, group in groups.items()]

    def scheme(self, module: str) -> Scheme | None:
        """How the linear module is quantized, None where it is dense. The first group that names it holds."""
        if self._ignore.match(module):
            return None
        return next((scheme for names, scheme in self._groups if names.match(module)), None)


class _Names:
    def __init__(self, entries: Any, where: str) -> None:
        names = strings(entries, where)
        self._paths = frozenset(names)
        self._expressions: list[re.Pattern[str]] = [
            compiled(name.removeprefix("re:"), f"{where}: {name}") for name in names if name.startswith("re:")
        ]

    def match(self, module: str) -> bool:
        named = module in self._paths or "Linear" in self._paths
        return named or any(expression.match(module) for expression in self._expressions)


def _group(group: Any, where: str) -> tuple[_Names, Scheme]:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise InputError("a group must have targets and weights", where=where)
    weights = group["weights"]
    bits, group_size, sym = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric")
    strategy, order = weights.get("strategy"), weights.get("actorder")
    group_size = -1 if strategy == "channel" and group_size in (None, -1) else group_size
    faults = {
        "num_bits": bits not in (2, 4, 8) or type(bits) is not int,
        "type": weights.get("type") != "int",
        "symmetric": type(sym) is not bool,
        "strategy": strategy not in ("channel", "group"),
        "group_size": type(group_size) is not int or not (group_size > 0 or (group_size, strategy) == (-1, "channel")),
        "dynamic": weights.get("dynamic", False) is not False,
        "actorder": order not in (None, False, "group", "weight", "static"),
    }
    if wrong := [key for key, fault in faults.items() if fault]:
        raise InputError(f"weights cannot be read: {', '.join(wrong)}", where=where)
    return _Names(group.get("targets"), f"{where}: targets"), Scheme(bits, group_size, sym, order == "group")
