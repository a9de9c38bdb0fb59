"""DeepSeek's format for weights in e4m3: a scale for each block of 128 x 128, and inputs rounded in blocks of 128.

The reference is transformers 5.23 (`integrations/finegrained_fp8.py`) and vLLM 0.32
(`model_executor/layers/quantization/fp8.py`). Despite its name a `weight_scale_inv` is what a code is multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.float8_tensors import Float8Weight, pack, specs
from qexport.formats.format import Card, ModuleEncoding, Specs
from qexport.formats.stored_weight import (
    WHERE,
    Scheme,
    SkipList,
    StoredWeight,
    modules_with,
    refuse_missing,
    strings,
)
from qexport.formats.unquantized_modules import unquantized_modules
from qexport.tensors import Float8Quantized, Float8QuantizedSpec, Quantized, QuantizedSpec, TensorSpec, WeightSource
from qexport.tensors.float8 import Block
from qexport.tensors.input_rounding import InputRounding

BLOCK: Final = (128, 128)
"""The rows and columns of a block, for which runtimes have kernels."""

SCALE: Final = "weight_scale_inv"

_SKIPPED: Final = ("modules_to_not_convert", "ignored_layers")


@dataclass(frozen=True)
class BlockFp8Format(ModuleEncoding):
    """`quant_method: fp8`, as DeepSeek's models are stored."""

    quant_method: ClassVar[str | None] = "fp8"
    holds: ClassVar = (Float8Quantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors weight and weight_scale_inv."""
        assert isinstance(spec, Float8QuantizedSpec)
        return specs(spec, SCALE)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors weight and weight_scale_inv."""
        assert isinstance(value, Float8Quantized)
        return pack(value, SCALE)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """The `quantization_config` for config.json."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": unquantized_modules(specs, structure),
        }

    @property
    def card(self) -> Card:
        """The format on the model card."""
        text = "FP8 (e4m3) weights with one scale per block of 128 x 128, FP8 activations when served"
        return Card("fp8", "FP8", text)

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the `quant_method` is fp8."""
        return config is not None and config.get("quant_method") == cls.quant_method

    @staticmethod
    def reader(config: Mapping[str, Any]) -> BlockFp8Reader:
        """See `BlockFp8Reader`."""
        return BlockFp8Reader(config)


class BlockFp8Rules:
    """How each module is quantized according to the `quantization_config`.

    Args:
        config: the `quantization_config`.

    Attributes:
        block: the rows and columns that share a scale.

    Raises:
        InputError: the config is malformed or not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.block = _block(config.get("weight_block_size"))
        faults = {
            "fmt": config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"),
            "activation_scheme": config.get("activation_scheme", "dynamic") != "dynamic",
            "scale_fmt": config.get("scale_fmt", "float") not in ("float", "ue8m0"),
        }
        if wrong := [f"{key} {config.get(key)!r}" for key, fault in faults.items() if fault]:
            raise InputError(f"values that are not supported: {', '.join(wrong)}", where=WHERE)
        names = [name for key in _SKIPPED for name in strings(config.get(key) or [], f"{WHERE}: {key}")]
        self._skipped = SkipList(names, f"{WHERE}: {_SKIPPED[0]}")
        rounding = InputRounding(self.block[1], codes="float8")
        self._scheme = Scheme(8, self.block[1], sym=True, desc_act=False, block=self.block, input_rounding=rounding)

    def scheme(self, module: str) -> Scheme | None:
        """How the linear is quantized; None if it is not."""
        return None if self._skipped.matches(module) else self._scheme


def _block(value: Any) -> Block:
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int and each > 0 for each in value):
        raise InputError(
            f"weight_block_size is {value!r}; qexport reads FP8 weights with a scale for each block",
            where=WHERE,
            mend="name the 16-bit model that it was made from",
        )
    return value[0], value[1]


class BlockFp8Reader:
    """The reader for `quant_method: fp8`.

    Args:
        config: the `quantization_config`; see `BlockFp8Rules` for errors.

    Attributes:
        description: the format's name, for users.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rules = BlockFp8Rules(config)
        self.description = f"FP8, blocks of {' x '.join(map(str, self._rules.block))}"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules with a `weight_scale_inv`."""
        return {module: self._weight(module, source) for module in modules_with(f".{SCALE}", source.specs())}

    def claimed(self, structure: Structure) -> set[str]:
        """The linears of the blocks that the config does not skip. Loaders never quantize the head."""
        return {linear.name for linear in structure.block_linears if self._rules.scheme(linear.name)}

    def _weight(self, module: str, source: WeightSource) -> Float8Weight:
        refuse_missing(module, ("weight", SCALE), source.specs())
        return Float8Weight.found(module, source.specs(), self._rules.scheme(module), self._rules.block, SCALE)
