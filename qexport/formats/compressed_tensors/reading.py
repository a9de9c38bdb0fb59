"""compressed-tensors read back: each module's scheme in the `quantization_config`, and the codes.

The reference is compressed-tensors 0.17.0 (`quantization/quant_config.py`, `utils/match.py`): a target or an entry of
`ignore` is a module's path, `re:` and an expression that matches from the start of the path, or a class (`Linear`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.compressed_tensors.tensors import unpack_groups, unpack_rows
from qexport.formats.stored_weight import (
    WHERE,
    GroupedWeight,
    Scheme,
    StoredLayer,
    StoredWeight,
    Tensors,
    compiled,
    int8_shape,
    modules_with,
    refuse_missing,
    strings,
)
from qexport.tensors import GroupQuantized, RowQuantized, TensorSpec, WeightSource

_LARGEST: Final = 1 << 31
_FORMATS: Final = ("int-quantized", "pack-quantized")
_LIBRARY_DEFAULTS: Final = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_TOKEN: Final = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


class CompressedTensorsRules:
    """How each module is quantized according to the `quantization_config`.

    Args:
        config: the `quantization_config`.

    Attributes:
        packed: whether the format is `pack-quantized`; else it is `int-quantized`.

    Raises:
        InputError: the format or a scheme is not supported, or a field is missing or has a wrong type.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("format") not in _FORMATS:
            raise InputError(f"format is {config.get('format')!r}; qexport reads {', '.join(_FORMATS)}", where=WHERE)
        if config.get("kv_cache_scheme") is not None:
            raise InputError("a quantized cache is not supported", where=f"{WHERE}: kv_cache_scheme")
        self.packed = config["format"] == "pack-quantized"
        self._ignore = _Names(config.get("ignore") or [], f"{WHERE}: ignore")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise InputError("config_groups must map names to groups", where=WHERE)
        self._groups = [_group(group, f"{WHERE}: config_groups: {name}") for name, group in groups.items()]

    def scheme(self, module: str) -> Scheme | None:
        """How the linear is quantized; None if it is not. The first group that names it applies."""
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
        raise InputError(f"values of weights that are not supported: {', '.join(wrong)}", where=where)
    scheme = Scheme(bits, group_size, sym, order == "group", _int8_inputs(group.get("input_activations"), where))
    return _Names(group.get("targets"), f"{where}: targets"), scheme


def _int8_inputs(activations: Any, where: str) -> bool:
    """Whether inputs are rounded to int8, each token with a scale of its own; the defaults are the library's."""
    if activations is None:
        return False
    found = {**_LIBRARY_DEFAULTS, **activations} if isinstance(activations, dict) else {}
    if any(found.get(key) != value for key, value in _TOKEN.items()):
        raise InputError(
            "input_activations other than symmetric int8 with a dynamic scale per token are not supported",
            where=where,
            mend="quantize the model again with dynamic activations",
        )
    return True


@dataclass(frozen=True)
class PackedWeight(GroupedWeight):
    """One module's packed codes, scales and shape, and the zero points and g_idx that its scheme requires."""

    def quantized(self, tensors: Tensors) -> GroupQuantized:
        """See `StoredWeight.quantized`."""
        if self.scheme is None:
            raise _unquantized_by_config(self.module)
        return unpack_groups(
            tensors,
            bits=self.scheme.bits,
            group_size=self.scheme.group_size,
            sym=self.scheme.sym,
            desc_act=self.scheme.desc_act,
            module=self.module,
        )


@dataclass(frozen=True)
class RowWeight:
    """One module's int8 codes and scales."""

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: tuple[str, ...] = ("weight", "weight_scale")

    grid = None

    @property
    def layer(self) -> StoredLayer:
        """See `StoredWeight.layer`."""
        rounding = None if self.scheme is None else self.scheme.input_rounding
        return StoredLayer("w8a8", 8, self.shape[1], self.shape, rounding)

    def quantized(self, tensors: Tensors) -> RowQuantized:
        """See `StoredWeight.quantized`."""
        if self.scheme is None:
            raise _unquantized_by_config(self.module)
        if replace(self.scheme, int8_inputs=False) != Scheme(8, -1, sym=True, desc_act=False):
            raise InputError("only symmetric int8 rows are supported in the format int-quantized", where=self.module)
        rows = unpack_rows(tensors, module=self.module)
        if int(rows.codes.min()) < -127:
            raise InputError("a code is -128", where=f"{self.module}.weight")
        return rows


class CompressedTensorsReader:
    """The reader for `quant_method: compressed-tensors`.

    Args:
        config: the `quantization_config`; see `CompressedTensorsRules` for errors.

    Attributes:
        description: the format's name, for users.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rules = CompressedTensorsRules(config)
        self.description = f"compressed-tensors, {config['format']}"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules with a `weight_packed` (whose `weight_shape` is read), or a `weight_scale` in `int-quantized`."""
        suffix = ".weight_packed" if self._rules.packed else ".weight_scale"
        make = self._packed if self._rules.packed else self._rows
        return {module: make(module, source) for module in modules_with(suffix, source.specs())}

    def claimed(self, structure: Structure) -> set[str]:
        """The quantized modules according to the config: linears of the blocks, and the head unless it is tied."""
        linears = {linear.name for linear in structure.block_linears}
        heads = set() if structure.tied else {structure.head}
        return {module for module in linears | heads if self._rules.scheme(module)}

    def _packed(self, module: str, source: WeightSource) -> PackedWeight:
        scheme, specs = self._rules.scheme(module), source.specs()
        parts = ["weight_packed", "weight_scale", "weight_shape"]
        if scheme and not scheme.sym:
            parts.append("weight_zero_point")
        if scheme and scheme.desc_act:
            parts.append("weight_g_idx")
        refuse_missing(module, parts, specs)
        if specs[f"{module}.weight_shape"] != TensorSpec((2,), torch.int64):
            raise InputError("the shape of a packed layer must be int64 [2]", where=f"{module}.weight_shape")
        rows, columns = source.read(f"{module}.weight_shape").tolist()
        if not (0 < rows < _LARGEST and 0 < columns < _LARGEST):
            raise InputError(f"[{rows}, {columns}] is not a shape", where=f"{module}.weight_shape")
        return PackedWeight(module, (rows, columns), scheme, tuple(parts))

    def _rows(self, module: str, source: WeightSource) -> RowWeight:
        refuse_missing(module, RowWeight.parts, source.specs())
        return RowWeight(module, int8_shape(module, source.specs()), self._rules.scheme(module))


def _unquantized_by_config(module: str) -> InputError:
    return InputError(
        "the module is quantized, but unquantized according to the config",
        where=f"quantization_config: ignore, {module}",
    )
