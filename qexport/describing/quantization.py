"""How the weights of a folder are quantized, as its config.json and the headers say, for any maker's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from qexport.describing.tensors import StoredTensor

_CODES: Final = ("qweight", "weight_packed")
"""The names of packed codes inside a module: GPTQ and AWQ, compressed-tensors and ModelOpt."""

_BESIDE: Final = (
    "scales", "qzeros", "g_idx", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point",
    "weight_shape", "weight_global_scale", "weight_g_idx", "input_scale", "input_global_scale", "SCB", "weight_format",
    "absmax", "quant_map", "nested_absmax", "nested_quant_map",
)  # fmt: skip
"""The names of what belongs to codes."""

_OF_CODES: Final = ("weight_scale", "weight_scale_inv", "SCB", "weight.absmax")
"""The module's `weight` holds codes if one of these stands beside it."""

_BITS: Final = ("bits", "w_bit", "num_bits")
_SETTINGS: Final = (
    "group_size", "sym", "zero_point", "desc_act", "version", "fmt", "weight_block_size", "activation_scheme",
)  # fmt: skip
_ELEMENT_BITS: Final = {"I32": 32, "U8": 8, "I8": 8}


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        method: `quant_method` of config.json; None if nothing is quantized.
        bits: per code; None if layers differ or nothing says it.
        settings: groups, symmetry and the like, in the method's own words.
        modules: how many modules have codes.
        parameters: of the whole model, without scales and zero points.
    """

    method: str | None
    bits: int | None
    settings: Mapping[str, Any]
    modules: int
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def words(self) -> str:
        """The same for the terminal."""
        if self.method is None:
            return (
                "not quantized"
                if not self.modules
                else f"{self.modules} modules hold codes, and config.json names none"
            )
        settings = [f"{key} {_shown(value)}" for key, value in self.settings.items()]
        bits = [] if self.bits is None else [f"{self.bits} bits"]
        return f"{', '.join([self.method, *bits, *settings])}; {self.modules} modules"


def quantization_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Quantization:
    """The quantization of a model.

    Args:
        config: the content of config.json.
        tensors: all tensors of the folder.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    found: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    method = found.get("quant_method")
    bits, settings = _settings(found)
    coded = dict(_coded(tensors))
    return Quantization(
        method=str(method) if found else None,
        bits=bits,
        settings=settings,
        modules=len(coded),
        parameters=_parameters(tensors, coded, bits),
    )


def _settings(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    match config.get("quant_method"):
        case "bitsandbytes":
            return _of_bitsandbytes(config)
        case "compressed-tensors":
            return _of_compressed_tensors(config)
        case _:
            bits = next((config[key] for key in _BITS if type(config.get(key)) is int), None)
            return bits, {key: config[key] for key in _SETTINGS if key in config}


def _of_bitsandbytes(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    if config.get("load_in_4bit"):
        keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        return 4, {key.removeprefix("bnb_4bit_"): config[key] for key in keys if key in config}
    return (8, {"llm_int8_threshold": config.get("llm_int8_threshold")}) if config.get("load_in_8bit") else (None, {})


def _of_compressed_tensors(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    groups = config.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    weights = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), Mapping)]
    bits = {count for each in weights if type(count := each.get("num_bits")) is int}
    settings: dict[str, Any] = {"format": config.get("format")}
    for key in ("type", "strategy", "group_size", "symmetric", "actorder"):
        if values := {repr(each.get(key)): each.get(key) for each in weights if each.get(key) is not None}:
            settings[key] = next(iter(values.values())) if len(values) == 1 else sorted(values)
    if any(scheme.get("input_activations") for scheme in schemes):
        settings["activations"] = "rounded"
    return (next(iter(bits)) if len(bits) == 1 else None), settings


def _coded(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """The modules that hold codes, and the tensor with the codes."""
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in _CODES or (part == "weight" and any(f"{module}.{beside}" in tensors for beside in _OF_CODES)):
            yield module, name


def _parameters(tensors: Mapping[str, StoredTensor], coded: Mapping[str, str], bits: int | None) -> int:
    codes = {name: module for module, name in coded.items()}
    total = 0
    for name, tensor in tensors.items():
        if name in codes:
            total += _values(tensors, codes[name], tensor, bits)
        elif name.rpartition(".")[2] not in _BESIDE and ".quant_state." not in name:
            total += tensor.values
    return total


def _values(tensors: Mapping[str, StoredTensor], module: str, codes: StoredTensor, bits: int | None) -> int:
    """Weights of a module. Bits of the whole model stand in where the headers leave them open."""
    order = tensors.get(f"{module}.g_idx")
    if order is not None and len(codes.shape) == 2:
        return order.values * codes.shape[1]
    if codes.dtype == "U8" and f"{module}.weight.absmax" in tensors:
        return codes.values * 2
    if codes.dtype == "I8" or codes.dtype.startswith("F"):
        return codes.values
    return codes.values * _ELEMENT_BITS.get(codes.dtype, 8) // max(1, bits or 4)


def _shown(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
