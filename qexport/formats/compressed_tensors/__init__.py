"""compressed-tensors: writing. Reading is in `reading`, the bit layout in `tensors`.

The config has the keys of the library's `QuantizationConfig`. Only keys that exist since compressed-tensors 0.9 are
written: newer ones are errors in older versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from qexport.architectures.structure import Structure
from qexport.formats import float4_tensors, float8_tensors
from qexport.formats.compressed_tensors.reading import (
    FLOAT4_FORMATS,
    FLOAT4_STRATEGIES,
    SCALE,
    CompressedTensorsReader,
)
from qexport.formats.compressed_tensors.tensors import check_groups, group_specs, pack_groups, pack_rows, row_specs
from qexport.formats.format import Card, ModuleEncoding, Specs, quantized_modules
from qexport.formats.unquantized_modules import unquantized_modules
from qexport.tensors import (
    Float4Quantized,
    Float4QuantizedSpec,
    Float8Quantized,
    Float8QuantizedSpec,
    GroupQuantized,
    GroupQuantizedSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorSpec,
)
from qexport.tensors.float4 import Float4Kind


class _CompressedTensorsFormat(ModuleEncoding):
    """A format of the library."""

    quant_method: ClassVar[str | None] = "compressed-tensors"

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """The `quantization_config` for config.json."""
        return _config(specs, structure)

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """False: `W8A8Format` reads what compressed-tensors stores."""
        return False

    @staticmethod
    def reader(config: Mapping[str, Any]) -> CompressedTensorsReader:
        """See `CompressedTensorsReader`, which reads all of the library's formats."""
        return CompressedTensorsReader(config)


@dataclass(frozen=True)
class W8A8Format(_CompressedTensorsFormat):
    """`int-quantized`: int8 weights with one scale per output, and int8 activations with one scale per token, which the
    server computes.
    """

    holds: ClassVar = (RowQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors weight and weight_scale."""
        assert isinstance(spec, RowQuantizedSpec)
        return row_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors weight and weight_scale."""
        assert isinstance(value, RowQuantized)
        return pack_rows(value)

    @property
    def card(self) -> Card:
        """The format on the model card."""
        text = "int8 weights with one scale per output, int8 activations when served"
        return Card("compressed-tensors", "W8A8", text)

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the `quant_method` is compressed-tensors."""
        return config is not None and config.get("quant_method") == cls.quant_method


@dataclass(frozen=True)
class PackQuantizedFormat(_CompressedTensorsFormat):
    """`pack-quantized`: codes in groups, for layouts whose server reads GPTQ codes in this format."""

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


@dataclass(frozen=True)
class FloatQuantizedFormat(_CompressedTensorsFormat):
    """`float-quantized`: e4m3 weights with one scale per output, and e4m3 activations with one scale per token, which
    the server computes.
    """

    holds: ClassVar = (Float8Quantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors weight and weight_scale."""
        assert isinstance(spec, Float8QuantizedSpec)
        return float8_tensors.specs(spec, SCALE)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors weight and weight_scale."""
        assert isinstance(value, Float8Quantized)
        return float8_tensors.pack(value, SCALE)

    @property
    def card(self) -> Card:
        """The format on the model card."""
        text = "FP8 (e4m3) weights with one scale per output, FP8 activations when served"
        return Card("compressed-tensors", "FP8", text)


@dataclass(frozen=True)
class Float4Format(_CompressedTensorsFormat):
    """`nvfp4-pack-quantized` and `mxfp4-pack-quantized`: e2m1 weights in groups, with 16-bit activations.

    Attributes:
        kind: which of the two.
    """

    kind: Float4Kind

    holds: ClassVar = (Float4Quantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors weight_packed, weight_scale and, of NVFP4, weight_global_scale."""
        assert isinstance(spec, Float4QuantizedSpec)
        return float4_tensors.specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors weight_packed, weight_scale and, of NVFP4, weight_global_scale."""
        assert isinstance(value, Float4Quantized)
        return float4_tensors.pack(value)

    @property
    def card(self) -> Card:
        """The format on the model card."""
        scales = "a scale in e4m3 per 16 inputs" if self.kind == "nvfp4" else "a power of two as the scale of 32 inputs"
        return Card("compressed-tensors", self.kind.upper(), f"{self.kind.upper()} (e2m1) weights with {scales}")


def _config(specs: Specs, structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of an artifact whose quantized layers are all of one kind: groups of integers or of
    e2m1 codes, or rows of int8 or e4m3 codes.

    If all layers have the same scheme, its target is every `Linear` that is not in `ignore`. Else each scheme names its
    modules.
    """
    schemes: dict[_Scheme, list[str]] = {}
    for module, spec in quantized_modules(specs).items():
        schemes.setdefault(_scheme(spec), []).append(module)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            "weights": _weights(scheme),
            "input_activations": None if scheme.activations is None else _token_activations(scheme.activations),
            "output_activations": None,
        }
        for index, (scheme, modules) in enumerate(schemes.items())
    }
    [form] = {scheme.form for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": unquantized_modules(specs, structure),
    }


_Number = Literal["int", "float"]


@dataclass(frozen=True)
class _Scheme:
    """How layers are quantized.

    Attributes:
        form: the name of the stored format.
        bits: of a weight.
        group_size: inputs per group; -1 for one group per row.
        sym: there are no zero points.
        desc_act: the groups are in activation order.
        number: what the codes are.
        activations: what 8-bit activations are; None for 16 bits.
        float4: which scales codes in e2m1 have; None for other codes.
    """

    form: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    number: _Number = "int"
    activations: _Number | None = None
    float4: Float4Kind | None = None


def _scheme(spec: QuantizedSpec) -> _Scheme:
    if isinstance(spec, RowQuantizedSpec):
        return _Scheme("int-quantized", 8, -1, sym=True, desc_act=False, activations="int")
    if isinstance(spec, Float8QuantizedSpec):
        return _Scheme("float-quantized", 8, -1, sym=True, desc_act=False, number="float", activations="float")
    if isinstance(spec, Float4QuantizedSpec):
        form = next(form for form, kind in FLOAT4_FORMATS.items() if kind == spec.kind)
        return _Scheme(form, 4, spec.group_size, sym=True, desc_act=False, number="float", float4=spec.kind)
    assert isinstance(spec, GroupQuantizedSpec)
    group_size = -1 if spec.group_size == spec.in_features else spec.group_size
    return _Scheme("pack-quantized", spec.bits, group_size, spec.sym, spec.desc_act and spec.groups > 1)


def _weights(scheme: _Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": scheme.number,
        "symmetric": scheme.sym,
        "strategy": _strategy(scheme),
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
        "actorder": "group" if scheme.desc_act else None,
    }


def _strategy(scheme: _Scheme) -> str:
    if scheme.float4 is not None:
        return FLOAT4_STRATEGIES[scheme.float4]
    return "channel" if scheme.group_size == -1 else "group"


def _token_activations(number: _Number) -> dict[str, Any]:
    """Symmetric, 8 bits, with one scale per token that the server computes."""
    return {"num_bits": 8, "type": number, "symmetric": True, "strategy": "token", "dynamic": True}
