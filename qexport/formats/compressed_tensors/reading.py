"""compressed-tensors read back: each module's scheme in the `quantization_config`, and the codes.

The reference is compressed-tensors 0.17.0 and 0.20.1 (`quantization/quant_config.py`, `utils/match.py`): a target or an
entry of `ignore` is a module's path, `re:` and an expression that matches from the start of the path, or a class
(`Linear`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats import float4_tensors
from qexport.formats.compressed_tensors.tensors import unpack_groups, unpack_rows
from qexport.formats.float4_tensors import Float4Weight
from qexport.formats.float8_tensors import Float8Weight
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
from qexport.tensors.float4 import GROUP_SIZES, Float4Kind
from qexport.tensors.input_rounding import InputRounding

_LARGEST: Final = 1 << 31
_CHANNEL: Final = (1, _LARGEST)
FLOAT4_FORMATS: Final[Mapping[str, Float4Kind]] = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
"""The formats of codes in e2m1, with their scales."""

_FORMATS: Final = ("int-quantized", "float-quantized", "pack-quantized", *FLOAT4_FORMATS)
FLOAT4_STRATEGIES: Final[Mapping[Float4Kind, str]] = {"nvfp4": "tensor_group", "mxfp4": "group"}
_LIBRARY_DEFAULTS: Final = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_TOKEN: Final = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}

_PACKED: Final = ".weight_packed"

SCALE: Final = "weight_scale"
"""The name of the scales of rows and blocks."""


class CompressedTensorsRules:
    """How each module is quantized according to the `quantization_config`.

    Args:
        config: the `quantization_config`.

    Attributes:
        packed: whether the format is `pack-quantized`; else the codes are bytes, or two in a byte.
        float4: which scales codes in e2m1 have; None for other codes.

    Raises:
        InputError: the format or a scheme is not supported, or a field is missing or has a wrong type.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("format") not in _FORMATS:
            raise InputError(f"format is {config.get('format')!r}; qexport reads {', '.join(_FORMATS)}", where=WHERE)
        if config.get("kv_cache_scheme") is not None:
            raise InputError("a quantized cache is not supported", where=f"{WHERE}: kv_cache_scheme")
        self.packed = config["format"] == "pack-quantized"
        self.float4 = FLOAT4_FORMATS.get(config["format"])
        self._ignore = _Names(config.get("ignore") or [], f"{WHERE}: ignore")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise InputError("config_groups must map names to groups", where=WHERE)
        self._groups = [_group(group, self.float4, f"{WHERE}: config_groups: {name}") for name, group in groups.items()]

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


def _group(group: Any, float4: Float4Kind | None, where: str) -> tuple[_Names, Scheme]:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise InputError("a group must have targets and weights", where=where)
    weights, activations = group["weights"], group.get("input_activations")
    if float4 is not None:
        return _Names(group.get("targets"), f"{where}: targets"), _float4_scheme(weights, activations, float4, where)
    make = _float_scheme if weights.get("type") == "float" else _int_scheme
    return _Names(group.get("targets"), f"{where}: targets"), make(weights, activations, where)


def _int_scheme(weights: Mapping[str, Any], activations: Any, where: str) -> Scheme:
    bits, group_size, sym = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric")
    strategy, order = weights.get("strategy"), weights.get("actorder")
    group_size = -1 if strategy == "channel" and group_size in (None, -1) else group_size
    faults = {
        "num_bits": bits not in (2, 4, 8) or type(bits) is not int,
        "type": weights.get("type", "int") != "int",
        "symmetric": type(sym) is not bool,
        "strategy": strategy not in ("channel", "group"),
        "group_size": type(group_size) is not int or not (group_size > 0 or (group_size, strategy) == (-1, "channel")),
        "dynamic": weights.get("dynamic", False) is not False,
        "actorder": order not in (None, False, "group", "weight", "static"),
    }
    _refuse(faults, where)
    assert type(bits) is type(group_size) is int
    assert type(sym) is bool
    rounding = InputRounding() if _by_token(activations, "int", where) else None
    return Scheme(bits, group_size, sym, order == "group", input_rounding=rounding)


def _float_scheme(weights: Mapping[str, Any], activations: Any, where: str) -> Scheme:
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    faults = {
        "num_bits": weights.get("num_bits") != 8,
        "symmetric": weights.get("symmetric", True) is not True,
        "strategy": strategy not in ("tensor", "channel", "block"),
        "block_structure": strategy == "block" and not _is_block(block),
        "dynamic": weights.get("dynamic", False) is not False,
    }
    _refuse(faults, where)
    shared = {"tensor": (_LARGEST, _LARGEST), "channel": _CHANNEL}.get(strategy) or (block[0], block[1])  # type: ignore[arg-type, index]
    return Scheme(
        8, shared[1], sym=True, desc_act=False, block=shared, input_rounding=_float8_rounding(activations, where)
    )


def _float4_scheme(weights: Mapping[str, Any], activations: Any, kind: Float4Kind, where: str) -> Scheme:
    faults = {
        "num_bits": weights.get("num_bits") != 4,
        "type": weights.get("type") != "float",
        "symmetric": weights.get("symmetric", True) is not True,
        "strategy": weights.get("strategy") != FLOAT4_STRATEGIES[kind],
        "group_size": weights.get("group_size") != GROUP_SIZES[kind],
        "dynamic": weights.get("dynamic", False) is not False,
    }
    _refuse(faults, where)
    if activations is not None:
        raise InputError(
            f"input_activations of {kind.upper()} weights are not supported: their rounding is not simulated",
            where=where,
            mend="quantize the model again with 16-bit activations",
        )
    return Scheme(4, GROUP_SIZES[kind], sym=True, desc_act=False, float4=kind)


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value)


def _refuse(faults: Mapping[str, bool], where: str) -> None:
    if wrong := [key for key, fault in faults.items() if fault]:
        raise InputError(f"values of weights that are not supported: {', '.join(wrong)}", where=where)


def _float8_rounding(activations: Any, where: str) -> InputRounding | None:
    size = activations.get("group_size") if isinstance(activations, dict) else None
    if size is None:
        return InputRounding(codes="float8") if _by_token(activations, "float", where) else None
    if not _is_block([size, size]) or not _has(activations, {**_TOKEN, "type": "float", "strategy": "group"}):
        raise _other_activations("float", where)
    return InputRounding(size, codes="float8")


def _by_token(activations: Any, number: str, where: str) -> bool:
    """Whether inputs are rounded to 8 bits, each token with a scale of its own; the defaults are the library's."""
    if activations is None:
        return False
    if not isinstance(activations, dict) or not _has(activations, {**_TOKEN, "type": number}):
        raise _other_activations(number, where)
    return True


def _has(activations: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    found = {**_LIBRARY_DEFAULTS, **activations}
    return all(found.get(key) == value for key, value in wanted.items())


def _other_activations(number: str, where: str) -> InputError:
    kind = "int8" if number == "int" else "e4m3"
    return InputError(
        f"input_activations other than symmetric {kind} with a dynamic scale per token are not supported",
        where=where,
        mend="quantize the model again with dynamic activations",
    )


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
        if replace(self.scheme, input_rounding=None) != Scheme(8, -1, sym=True, desc_act=False):
            raise InputError("only symmetric int8 rows are supported in the format int-quantized", where=self.module)
        return unpack_rows(tensors, module=self.module)


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
        """The modules with a `weight_packed`, or a `weight_scale` where codes are bytes. A `weight_shape` is read."""
        if (kind := self._rules.float4) is not None:
            return {module: self._float4(module, kind, source) for module in modules_with(_PACKED, source.specs())}
        suffix = _PACKED if self._rules.packed else f".{SCALE}"
        make = self._packed if self._rules.packed else self._bytes
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

    def _float4(self, module: str, kind: Float4Kind, source: WeightSource) -> Float4Weight:
        refuse_missing(module, float4_tensors.parts(kind), source.specs())
        return Float4Weight.found(module, source.specs(), self._rules.scheme(module), kind)

    def _bytes(self, module: str, source: WeightSource) -> RowWeight | Float8Weight:
        """Codes in int8, or in e4m3 if the scheme says so; without one, which is refused later, as they are stored."""
        refuse_missing(module, RowWeight.parts, source.specs())
        scheme, specs = self._rules.scheme(module), source.specs()
        if scheme is None and specs[f"{module}.weight"].dtype == torch.float8_e4m3fn:
            return Float8Weight.found(module, specs, None, _CHANNEL, SCALE)
        if scheme is None or scheme.block is None:
            return RowWeight(module, int8_shape(module, specs), scheme)
        return Float8Weight.found(module, specs, scheme, scheme.block, SCALE)


def _unquantized_by_config(module: str) -> InputError:
    return InputError(
        "the module is quantized, but unquantized according to the config",
        where=f"quantization_config: ignore, {module}",
    )
