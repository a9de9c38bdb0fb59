"""bitsandbytes' 4-bit formats (nf4, fp4): writing and reading. The tensors are in `four_bit_tensors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.bitsandbytes import QUANT_METHOD, BitsandbytesReader, bitsandbytes_config, loaded_bits
from qexport.formats.bitsandbytes.four_bit_tensors import (
    STATE_PREFIX,
    QuantType,
    pack,
    packed_specs,
    state_spec,
    unpack,
)
from qexport.formats.format import Card, ModuleEncoding, Specs
from qexport.formats.stored_weight import WHERE, StoredLayer, StoredWeight, Tensors, modules_with, refuse_missing
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, Quantized, QuantizedSpec, TensorSpec, WeightSource

ComputeDtype = Literal["bfloat16", "float16", "float32"]

_QUANT_TYPES: Final[tuple[QuantType, ...]] = ("nf4", "fp4")


@dataclass(frozen=True)
class FourBitFormat(ModuleEncoding):
    """bitsandbytes' 4-bit formats.

    Attributes:
        quant_type: the code book.
        block_size: values that share an absmax.
        double_quant: whether the absmaxes are quantized too.
        compute_dtype: the dtype in which the dequantized weights are multiplied.
    """

    quant_type: QuantType
    block_size: int
    double_quant: bool
    compute_dtype: ComputeDtype

    quant_method: ClassVar[str | None] = QUANT_METHOD
    holds: ClassVar = (BlockQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """Four tensors, or six with double quantization."""
        assert isinstance(spec, BlockQuantizedSpec)
        return packed_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """Four tensors, or six with double quantization."""
        assert isinstance(value, BlockQuantized)
        return pack(value)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """See `bitsandbytes_config`."""
        return bitsandbytes_config(
            4,
            specs,
            structure,
            bnb_4bit_compute_dtype=self.compute_dtype,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
        )

    @property
    def card(self) -> Card:
        """The format on the model card."""
        name = self.quant_type.upper()
        double = ", double quantization" if self.double_quant else ""
        return Card(QUANT_METHOD, name, f"{name} codes in blocks of {self.block_size}{double}")

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the config names bitsandbytes with `load_in_4bit`."""
        return loaded_bits(config) == 4

    @staticmethod
    def reader(config: Mapping[str, Any]) -> FourBitReader:
        """See `FourBitReader`."""
        return FourBitReader(config)


@dataclass(frozen=True)
class FourBitWeight:
    """One module's codes, absmaxes, code books and state."""

    module: str
    spec: BlockQuantizedSpec

    grid = None

    @property
    def layer(self) -> StoredLayer:
        """See `StoredWeight.layer`."""
        return StoredLayer(self.spec.quant_type, self.spec.bits, self.spec.group_size, self.shape)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors inside the module."""
        return tuple(packed_specs(self.spec))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.spec.shape

    def quantized(self, tensors: Tensors) -> BlockQuantized:
        """See `StoredWeight.quantized`."""
        blocks = unpack(tensors, module=self.module)
        if bool((blocks.absmax < 0).any()):
            raise InputError("an absmax is negative", where=f"{self.module}.weight.absmax")
        return blocks


class FourBitReader(BitsandbytesReader):
    """The reader for `quant_method: bitsandbytes` with `load_in_4bit`.

    Args:
        config: the `quantization_config`.

    Raises:
        InputError: a field is malformed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._quant_type = config.get("bnb_4bit_quant_type", "fp4")  # transformers' defaults
        self._double_quant = config.get("bnb_4bit_use_double_quant", False)
        if self._quant_type not in _QUANT_TYPES or type(self._double_quant) is not bool:
            raise InputError(
                "bnb_4bit_quant_type must be nf4 or fp4, and bnb_4bit_use_double_quant true or false", where=WHERE
            )

    @property
    def description(self) -> str:
        """The code book, for users."""
        return f"{self._quant_type.upper()}{', double quantization' if self._double_quant else ''}"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have a quant_state, which is read and compared with the config."""
        return {
            module: self._weight(module, quant_type, source)
            for quant_type in _QUANT_TYPES
            for module in modules_with(f".{STATE_PREFIX}{quant_type}", source.specs())
        }

    def _weight(self, module: str, quant_type: QuantType, source: WeightSource) -> FourBitWeight:
        content = source.read(f"{module}.{STATE_PREFIX}{quant_type}")
        weight = FourBitWeight(module, state_spec(content, quant_type, module=module))
        found, claimed = (quant_type, weight.spec.double_quant), (self._quant_type, self._double_quant)
        if found != claimed:
            names = [f"{name}{' with double quantization' if double else ''}" for name, double in (found, claimed)]
            raise InputError(f"a layer is {names[0]}, but the quantization config says {names[1]}", where=module)
        refuse_missing(module, weight.parts, source.specs())
        return weight
