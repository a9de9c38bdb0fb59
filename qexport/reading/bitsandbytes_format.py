"""bitsandbytes' 4-bit and LLM.int8 tensors, as `qexport.packing` lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.packing import bitsandbytes_4bit, llm_int8
from qexport.packing.code_books import QuantType
from qexport.reading.module_patterns import SkipList, strings
from qexport.reading.stored_format import WHERE, StoredWeight, Tensors, int8_shape, refuse_missing
from qexport.tensors import BlockQuantized, BlockQuantizedSpec, RowQuantized, WeightSource

_QUANT_TYPES: Final[tuple[QuantType, ...]] = ("nf4", "fp4")


class _Claims:
    """What the two formats share: every linear is quantized but those in `llm_int8_skip_modules`; without such a list
    the head is not. The experts of a mixture never are: transformers quantizes modules, and experts are parameters.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        listed = config.get("llm_int8_skip_modules")
        where = f"{WHERE}: llm_int8_skip_modules"
        self._skip = None if listed is None else SkipList(strings(listed, where), where)

    def claimed(self, structure: Structure) -> set[str]:
        """The modules that the config calls quantized, by path."""
        linears = {linear.name for linear in structure.block_linears if not linear.expert}
        if self._skip is None:
            return linears
        heads = set() if structure.tied else {structure.head}
        return {module for module in linears | heads if not self._skip.matches(module)}


@dataclass(frozen=True)
class FourBitWeight:
    """One module's codes, absmaxes, code books and state."""

    module: str
    spec: BlockQuantizedSpec

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors inside the module."""
        return tuple(bitsandbytes_4bit.packed_specs(self.spec))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.spec.shape

    def quantized(self, tensors: Tensors) -> BlockQuantized:
        """The codes.

        Raises:
            InputError: see `qexport.packing.bitsandbytes_4bit.unpack`; or an absmax is negative.
        """
        blocks = bitsandbytes_4bit.unpack(tensors, module=self.module)
        if bool((blocks.absmax < 0).any()):
            raise InputError("an absmax is negative", where=f"{self.module}.weight.absmax")
        return blocks


class FourBitFormat(_Claims):
    """`quant_method: bitsandbytes` with `load_in_4bit`.

    Args:
        config: the `quantization_config`.

    Raises:
        InputError: a field is of another type.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._quant_type = config.get("bnb_4bit_quant_type", "fp4")  # transformers' own defaults
        self._double_quant = config.get("bnb_4bit_use_double_quant", False)
        if self._quant_type not in _QUANT_TYPES or type(self._double_quant) is not bool:
            raise InputError("bnb_4bit_quant_type or bnb_4bit_use_double_quant cannot be read", where=WHERE)

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have a quant_state, which is read.

        Raises:
            InputError: the quant_state is malformed, or contradicts the config; a part is missing.
        """
        return {
            module: self._weight(module, quant_type, source)
            for quant_type in _QUANT_TYPES
            for module in _modules(source, f".{bitsandbytes_4bit.STATE_PREFIX}{quant_type}")
        }

    def _weight(self, module: str, quant_type: QuantType, source: WeightSource) -> FourBitWeight:
        content = source.read(f"{module}.{bitsandbytes_4bit.STATE_PREFIX}{quant_type}")
        weight = FourBitWeight(module, bitsandbytes_4bit.state_spec(content, quant_type, module=module))
        found, claimed = (quant_type, weight.spec.double_quant), (self._quant_type, self._double_quant)
        if found != claimed:
            names = [f"{name}{' with double quantization' if double else ''}" for name, double in (found, claimed)]
            raise InputError(f"a layer is {names[0]}, the quantization config says {names[1]}", where=module)
        refuse_missing(module, weight.parts, source.specs())
        return weight


@dataclass(frozen=True)
class LlmInt8Weight:
    """One module's codes, absmaxes and format mark."""

    module: str
    shape: tuple[int, int]
    parts: tuple[str, ...] = ("weight", "SCB", "weight_format")

    def quantized(self, tensors: Tensors) -> RowQuantized:
        """The codes.

        Raises:
            InputError: see `qexport.packing.llm_int8.unpack`; an absmax is negative, or a code is -128.
        """
        rows = llm_int8.unpack(tensors, module=self.module)
        if bool((rows.absmax < 0).any()):
            raise InputError("an absmax is negative", where=f"{self.module}.SCB")
        if int(rows.codes.min()) < -127:
            raise InputError("a code is -128", where=f"{self.module}.weight")
        return rows


class LlmInt8Format(_Claims):
    """`quant_method: bitsandbytes` with `load_in_8bit`."""

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have an `SCB`.

        Raises:
            InputError: a part is missing, or the codes are no int8 matrix.
        """
        weights: dict[str, StoredWeight] = {}
        for module in _modules(source, ".SCB"):
            refuse_missing(module, LlmInt8Weight.parts, source.specs())
            weights[module] = LlmInt8Weight(module, int8_shape(module, source.specs()))
        return weights


def bitsandbytes_format(config: Mapping[str, Any]) -> FourBitFormat | LlmInt8Format:
    """The reader for `quant_method: bitsandbytes`.

    Raises:
        InputError: the config names both or none of the two formats, or one of its fields cannot be read.
    """
    four, eight = config.get("load_in_4bit", False), config.get("load_in_8bit", False)
    if type(four) is not bool or type(eight) is not bool or four == eight:
        raise InputError("exactly one of load_in_4bit and load_in_8bit must be true", where=WHERE)
    return FourBitFormat(config) if four else LlmInt8Format(config)


def _modules(source: WeightSource, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in source.specs() if name.endswith(suffix)]
