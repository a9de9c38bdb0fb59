"""compressed-tensors: what is written. `reading` has the way back, `tensors` the bits.

The config is in the words of the library's `QuantizationConfig`. Only keys that readers since compressed-tensors 0.9
know are written: later ones are errors to older readers.
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
"""Bits, inputs in a group (-1: the whole row), symmetric, groups in activation order."""


@dataclass(frozen=True)
class W8A8Format(ModuleEncoding):
    """`int-quantized`: int8 weights with a scale per output, int8 activations with a scale per token found when
    serving.
    """

    quant_method: ClassVar[str | None] = "compressed-tensors"
    holds: ClassVar = (RowQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """Weight and weight_scale."""
        assert isinstance(spec, RowQuantizedSpec)
        return row_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """Weight and weight_scale."""
        assert isinstance(value, RowQuantized)
        return pack_rows(value)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """What config.json says of the codes."""
        return _config(specs, structure)

    @property
    def card(self) -> Card:
        """For the model card."""
        text = "int8 weights with one scale an output, int8 activations when served"
        return Card("compressed-tensors", "W8A8", text)

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the `quant_method` is compressed-tensors."""
        return config is not None and config.get("quant_method") == cls.quant_method

    @staticmethod
    def reader(config: Mapping[str, Any]) -> CompressedTensorsReader:
        """See `CompressedTensorsReader`, which knows both of the library's formats."""
        return CompressedTensorsReader(config)


@dataclass(frozen=True)
class PackQuantizedFormat(ModuleEncoding):
    """`pack-quantized`: codes in groups. Layouts store GPTQ's codes in it for servers that read no others."""

    quant_method: ClassVar[str | None] = "compressed-tensors"
    holds: ClassVar = (GroupQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """Three tensors or more."""
        assert isinstance(spec, GroupQuantizedSpec)
        return group_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """Three tensors or more."""
        assert isinstance(value, GroupQuantized)
        return pack_groups(value)

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Codes must fill whole int32 words."""
        assert isinstance(spec, GroupQuantizedSpec)
        return check_groups(spec)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """What config.json says of the codes."""
        return _config(specs, structure)


def _config(specs: Specs, structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of an artifact whose quantized layers are all of one kind.

    Where all layers have the same scheme, it holds for every `Linear` but those in `ignore`. Else each scheme names its
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
    """None for rows of int8 codes."""
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
    """Symmetric int8, one scale a token, found when serving."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _unquantized(specs: Specs, structure: Structure) -> list[str]:
    """Every module whose matrix stays as it is, and the head: a reader may make a `Linear` of a router, say."""
    unquantized = {
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if isinstance(spec, TensorSpec) and len(spec.shape) == 2 and name.endswith(".weight")
    }
    head = set() if isinstance(specs.get(f"{structure.head}.weight"), QuantizedSpec) else {structure.head}
    return sorted((unquantized | head) - {structure.embedding})
