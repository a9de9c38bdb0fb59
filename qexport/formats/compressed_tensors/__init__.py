"""compressed-tensors: writing. Reading is in `reading`, the bit layout in `tensors`.

The config has the keys of the library's `QuantizationConfig`. Only keys that exist since compressed-tensors 0.9 are
written: newer ones are errors in older versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qexport.architectures.structure import Structure
from qexport.formats.compressed_tensors.reading import CompressedTensorsReader
from qexport.formats.compressed_tensors.tensors import check_groups, group_specs, pack_groups, pack_rows, row_specs
from qexport.formats.format import Card, ModuleEncoding, Specs, quantized_modules
from qexport.tensors import (
    GroupQuantized,
    GroupQuantizedSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorSpec,
)

Scheme = tuple[int, int, bool, bool]
"""Bits, inputs per group (-1: one group per row), symmetric, groups in activation order."""


@dataclass(frozen=True)
class W8A8Format(ModuleEncoding):
    """`int-quantized`: int8 weights with one scale per output, and int8 activations with one scale per token, which the
    server computes.
    """

    quant_method: ClassVar[str | None] = "compressed-tensors"
    holds: ClassVar = (RowQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors weight and weight_scale."""
        assert isinstance(spec, RowQuantizedSpec)
        return row_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors weight and weight_scale."""
        assert isinstance(value, RowQuantized)
        return pack_rows(value)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """The `quantization_config` for config.json."""
        return _config(specs, structure)

    @property
    def card(self) -> Card:
        """The format on the model card."""
        text = "int8 weights with one scale per output, int8 activations when served"
        return Card("compressed-tensors", "W8A8", text)

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the `quant_method` is compressed-tensors."""
        return config is not None and config.get("quant_method") == cls.quant_method

    @staticmethod
    def reader(config: Mapping[str, Any]) -> CompressedTensorsReader:
        """See `CompressedTensorsReader`, which reads both of the library's formats."""
        return CompressedTensorsReader(config)


@dataclass(frozen=True)
class PackQuantizedFormat(ModuleEncoding):
    """`pack-quantized`: codes in groups, for layouts whose server reads GPTQ codes in this format."""

    quant_method: ClassVar[str | None] = "compressed-tensors"
    holds: ClassVar = (GroupQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """Three to five tensors; see `group_specs`."""
        assert isinstance(spec, GroupQuantizedSpec)
        return group_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """Three to five tensors; see `group_specs`."""
        assert isinstance(value, GroupQuantized)
        return pack_groups(value)

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Codes must fill whole int32 words."""
        assert isinstance(spec, GroupQuantizedSpec)
        return check_groups(spec)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """The `quantization_config` for config.json."""
        return _config(specs, structure)


def _config(specs: Specs, structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of an artifact whose quantized layers are all of one kind, rows or groups.

    If all layers have the same scheme, its target is every `Linear` that is not in `ignore`. Else each scheme names its
    modules.
    """
    schemes: dict[Scheme | None, list[str]] = {}
    for module, spec in quantized_modules(specs).items():
        schemes.setdefault(_scheme(spec), []).append(module)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            "weights": _weights(scheme),
            "input_activations": _token_activations() if scheme is None else None,
            "output_activations": None,
        }
        for index, (scheme, modules) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if None in schemes else "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": _unquantized(specs, structure),
    }


def _scheme(spec: QuantizedSpec) -> Scheme | None:
    """The scheme of codes in groups; None for rows of int8 codes."""
    if isinstance(spec, RowQuantizedSpec):
        return None
    assert isinstance(spec, GroupQuantizedSpec)
    group_size = -1 if spec.group_size == spec.in_features else spec.group_size
    return spec.bits, group_size, spec.sym, spec.desc_act and spec.groups > 1


def _weights(scheme: Scheme | None) -> dict[str, Any]:
    bits, group_size, sym, desc_act = scheme or (8, -1, True, False)
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": "group" if desc_act else None,
    }


def _token_activations() -> dict[str, Any]:
    """Symmetric int8, with one scale per token that the server computes."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _unquantized(specs: Specs, structure: Structure) -> list[str]:
    """Every module whose matrix is unquantized, and the head: a loader may make a `Linear` of a router, for example."""
    unquantized = {
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if isinstance(spec, TensorSpec) and len(spec.shape) == 2 and name.endswith(".weight")
    }
    head = set() if isinstance(specs.get(f"{structure.head}.weight"), QuantizedSpec) else {structure.head}
    return sorted((unquantized | head) - {structure.embedding})
