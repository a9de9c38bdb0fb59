"""bitsandbytes' LLM.int8: the codes, the absmax of each row as `SCB`, and a number for the row-major format.

The reference is bitsandbytes 0.50 (`Linear8bitLt._save_to_state_dict`). bitsandbytes itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.bitsandbytes import QUANT_METHOD, BitsandbytesReader, bitsandbytes_config, loaded_bits
from qexport.formats.format import Card, ModuleEncoding, Specs
from qexport.formats.stored_weight import (
    StoredLayer,
    StoredWeight,
    Tensors,
    int8_shape,
    modules_with,
    place,
    refuse_missing,
)
from qexport.tensors import Quantized, QuantizedSpec, RowQuantized, RowQuantizedSpec, TensorSpec, WeightSource

_ROW_MAJOR = 0


def packed_specs(spec: RowQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack`, by their names inside the module."""
    return {
        "weight": TensorSpec(spec.shape, torch.int8),
        "SCB": TensorSpec((spec.out_features,), torch.float32),
        "weight_format": TensorSpec((), torch.uint8),
    }


def pack(quantized: RowQuantized) -> dict[str, torch.Tensor]:
    """The three tensors of a quantized linear, with the shapes and dtypes of `packed_specs`."""
    return {
        "weight": quantized.codes,
        "SCB": quantized.absmax,
        "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8),
    }


def unpack(tensors: Mapping[str, torch.Tensor], *, module: str = "") -> RowQuantized:
    """The inverse of `pack`, for tensors read from a file.

    Args:
        tensors: `weight`, `SCB` and `weight_format`.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing or unknown, has a wrong shape or dtype, or the format is not row-major.
    """
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2:
        raise InputError("an int8 layer lacks its matrix of codes", where=place(module, "weight"))
    out_features, in_features = weight.shape
    expected = packed_specs(RowQuantizedSpec(out_features, in_features, torch.float16))
    found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise InputError("not the tensors of an int8 layer", where=place(module, ", ".join(wrong)))
    if int(tensors["weight_format"]) != _ROW_MAJOR:
        raise InputError("only the row-major weight_format 0 is supported", where=place(module, "weight_format"))
    return RowQuantized(weight, tensors["SCB"])


def dequantize(quantized: RowQuantized) -> torch.Tensor:
    """float32 [out, in], with the bits of bitsandbytes' `int8_vectorwise_dequant`, which multiplies by 1 / 127."""
    return quantized.codes.to(torch.float32).mul_(quantized.absmax[:, None]).mul_(1 / 127)


@dataclass(frozen=True)
class LlmInt8Format(ModuleEncoding):
    """bitsandbytes' LLM.int8 (arXiv:2208.07339).

    Attributes:
        threshold: inputs whose magnitude is above it are multiplied in 16 bits.
    """

    threshold: float

    quant_method: ClassVar[str | None] = QUANT_METHOD
    holds: ClassVar = (RowQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """weight, SCB and weight_format."""
        assert isinstance(spec, RowQuantizedSpec)
        return packed_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """weight, SCB and weight_format."""
        assert isinstance(value, RowQuantized)
        return pack(value)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """See `bitsandbytes_config`."""
        return bitsandbytes_config(8, specs, structure, llm_int8_threshold=self.threshold)

    @property
    def card(self) -> Card:
        """The format on the model card."""
        return Card(QUANT_METHOD, "LLM.int8", "int8 codes with one scale per output, for LLM.int8")

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the config names bitsandbytes with `load_in_8bit`."""
        return loaded_bits(config) == 8

    @staticmethod
    def reader(config: Mapping[str, Any]) -> LlmInt8Reader:
        """See `LlmInt8Reader`."""
        return LlmInt8Reader(config)


@dataclass(frozen=True)
class LlmInt8Weight:
    """One module's codes, absmaxes and weight_format."""

    module: str
    shape: tuple[int, int]
    parts: tuple[str, ...] = ("weight", "SCB", "weight_format")

    grid = None

    @property
    def layer(self) -> StoredLayer:
        """See `StoredWeight.layer`."""
        return StoredLayer("int8", 8, self.shape[1], self.shape)

    def quantized(self, tensors: Tensors) -> RowQuantized:
        """See `StoredWeight.quantized`."""
        rows = unpack(tensors, module=self.module)
        if bool((rows.absmax < 0).any()):
            raise InputError("an absmax is negative", where=f"{self.module}.SCB")
        if int(rows.codes.min()) < -127:
            raise InputError("a code is -128", where=f"{self.module}.weight")
        return rows


class LlmInt8Reader(BitsandbytesReader):
    """The reader for `quant_method: bitsandbytes` with `load_in_8bit`."""

    description = "LLM.int8"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have an `SCB`."""
        weights: dict[str, StoredWeight] = {}
        for module in modules_with(".SCB", source.specs()):
            refuse_missing(module, LlmInt8Weight.parts, source.specs())
            weights[module] = LlmInt8Weight(module, int8_shape(module, source.specs()))
        return weights
