"""What an artifact's quantization config says of each module, read as gptqmodel reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from qexport.errors import InputError
from qexport.reading.module_patterns import compiled
from qexport.reading.stored_format import WHERE, Scheme

_SCHEME_TYPES: Final = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}


class QuantizationRules:
    """The `quantization_config` of an artifact in AutoGPTQ's v1 format.

    Args:
        config: the content.

    Raises:
        InputError: another format, a field that is missing or of another type, or a rule that is no plain
            regular expression (one that repeats could be made to hang).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("checkpoint_format") != "gptq":
            found = config.get("checkpoint_format")
            raise InputError(f"checkpoint_format is {found!r}; this reader knows 'gptq'", where=WHERE)
        self.lm_head = config.get("lm_head", False)
        if type(self.lm_head) is not bool:
            raise InputError("lm_head must be true or false", where=WHERE)
        self._common = _scheme(config, WHERE)
        self._rules = [_rule(pattern, {**config, **changes}) for pattern, changes in _dynamic(config).items()]

    def scheme(self, module: str) -> Scheme | None:
        """How the module is quantized, None where it is dense. The first rule of `dynamic` that matches holds."""
        for pattern, scheme in self._rules:
            if pattern.match(module):
                return scheme
        return self._common


def _dynamic(config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(changes, Mapping) for changes in dynamic.values()):
        raise InputError("dynamic must map patterns to objects", where=WHERE)
    return dynamic


def _rule(pattern: str, config: Mapping[str, Any]) -> tuple[re.Pattern[str], Scheme | None]:
    where = f"{WHERE}: dynamic: {pattern}"
    expression = compiled(pattern.removeprefix("-:").removeprefix("+:"), where)
    return expression, None if pattern.startswith("-:") else _scheme(config, where)


def _scheme(config: Mapping[str, Any], where: str) -> Scheme:
    for key, kind in _SCHEME_TYPES.items():
        if type(config.get(key)) is not kind:
            raise InputError(f"{key} must be there and be of type {kind.__name__}", where=where)
    if config["bits"] not in (2, 3, 4, 8) or not (config["group_size"] == -1 or config["group_size"] > 0):
        raise InputError(f"no reader knows {config['bits']} bits in groups of {config['group_size']}", where=where)
    return Scheme(**{key: config[key] for key in _SCHEME_TYPES})
