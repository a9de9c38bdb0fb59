"""AutoGPTQ versions 1 and 2 read back: each module's scheme, as gptqmodel reads it from the config, and the codes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.gptq.tensors import unpack
from qexport.formats.stored_weight import (
    WHERE,
    GroupedWeight,
    Scheme,
    StoredWeight,
    Tensors,
    compiled,
    modules_with,
    refuse_missing,
)
from qexport.tensors import GroupQuantized, TensorSpec, WeightSource

_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_LESS_ONE: Final = {"gptq": True, "gptq_v2": False}
_SCHEME_TYPES: Final = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}


class GptqRules:
    """The `quantization_config` of an artifact in AutoGPTQ's format, version 1 or 2 (gptqmodel's).

    Args:
        config: the `quantization_config`.

    Attributes:
        common: how modules are quantized that no rule matches.
        lm_head: whether the output head is quantized.
        less_one: whether the stored zero points are less by one, as in version 1.

    Raises:
        InputError: the format is not supported, a field is missing or has a wrong type, or a rule is not a regular
            expression that `compiled` accepts.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        stored = config.get("checkpoint_format", "gptq")  # older files have none
        if not isinstance(stored, str) or stored not in _LESS_ONE:
            raise InputError(f"checkpoint_format is {stored!r}; qexport reads {' and '.join(_LESS_ONE)}", where=WHERE)
        self.less_one = _LESS_ONE[stored]
        self.lm_head = config.get("lm_head", False)
        if type(self.lm_head) is not bool:
            raise InputError("lm_head must be true or false", where=WHERE)
        self.common = _scheme(config, WHERE)
        self._rules = [_rule(pattern, {**config, **changes}) for pattern, changes in _dynamic(config).items()]

    def scheme(self, module: str) -> Scheme | None:
        """How the module is quantized; None if it is not. The first rule of `dynamic` that matches applies."""
        for pattern, scheme in self._rules:
            if pattern.match(module):
                return scheme
        return self.common


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
            raise InputError(f"{key} must be given, with type {kind.__name__}", where=where)
    if config["bits"] not in (2, 3, 4, 8) or not (config["group_size"] == -1 or config["group_size"] > 0):
        raise InputError(f"{config['bits']} bits in groups of {config['group_size']} are not supported", where=where)
    return Scheme(**{key: config[key] for key in _SCHEME_TYPES})


@dataclass(frozen=True)
class GptqWeight(GroupedWeight):
    """One module's four tensors.

    Attributes:
        less_one: whether its stored zero points are less by one.
    """

    parts: tuple[str, ...] = _PARTS
    less_one: bool = True

    def quantized(self, tensors: Tensors) -> GroupQuantized:
        """See `StoredWeight.quantized`."""
        if self.scheme is None:
            raise InputError(
                "the module is quantized, but unquantized according to the config",
                where=f"{WHERE}: dynamic, {self.module}",
            )
        return unpack(
            tensors,
            bits=self.scheme.bits,
            group_size=self.scheme.group_size,
            sym=self.scheme.sym,
            desc_act=self.scheme.desc_act,
            less_one=self.less_one,
            module=self.module,
        )


class GptqReader:
    """The reader for `quant_method: gptq`.

    Args:
        config: the `quantization_config`; see `GptqRules` for errors.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rules = GptqRules(config)

    @property
    def description(self) -> str:
        """Bits, groups and symmetry of the modules that no rule matches."""
        common = self._rules.common
        symmetry = "symmetric" if common.sym else "asymmetric"
        return f"GPTQ, {common.bits} bits, group_size {common.group_size}, {symmetry}"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have a `qweight`.

        Raises:
            InputError: one of the four tensors is missing.
        """
        specs = source.specs()
        return {
            module: GptqWeight(module, _shape(module, specs), self._rules.scheme(module), less_one=self._rules.less_one)
            for module in modules_with(".qweight", specs)
        }

    def claimed(self, structure: Structure) -> set[str]:
        """The blocks' linears, except those that a rule of `dynamic` leaves unquantized, and the head if `lm_head` is
        set.
        """
        linears = {linear.name for linear in structure.block_linears}
        claimed = {name for name in linears if self._rules.scheme(name)}
        return claimed | ({structure.head} if self._rules.lm_head else set())


def _shape(module: str, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    refuse_missing(module, _PARTS, specs)
    scales, g_idx = specs[f"{module}.scales"].shape, specs[f"{module}.g_idx"].shape
    if len(scales) != 2 or len(g_idx) != 1:
        raise InputError(
            f"scales {list(scales)} and g_idx {list(g_idx)} do not have the shapes [groups, out] and [in]", where=module
        )
    return scales[1], g_idx[0]
