"""Stored formats, each with its writer and its reader, and what methods yield in them: the outputs of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch

from qexport.errors import InputError
from qexport.formats.awq import AwqFormat
from qexport.formats.bitsandbytes.four_bit import FourBitFormat
from qexport.formats.bitsandbytes.llm_int8 import LlmInt8Format
from qexport.formats.block_fp8 import BlockFp8Format
from qexport.formats.compressed_tensors import Float4Format, FloatQuantizedFormat, W8A8Format
from qexport.formats.format import FormatReader, MethodFormat, Specs, quantized_modules
from qexport.formats.gptq import GptqFormat
from qexport.formats.merged import MergedFormat
from qexport.formats.stored_weight import WHERE
from qexport.tensors import QuantizedSpec, TensorSpec

__all__ = [
    "FORMATS",
    "AwqFormat",
    "BlockFp8Format",
    "Float4Format",
    "FloatQuantizedFormat",
    "Format",
    "FourBitFormat",
    "GptqFormat",
    "LlmInt8Format",
    "MergedFormat",
    "Outputs",
    "W8A8Format",
    "reader_of",
]

Format = (
    MergedFormat
    | GptqFormat
    | AwqFormat
    | FourBitFormat
    | LlmInt8Format
    | W8A8Format
    | FloatQuantizedFormat
    | Float4Format
    | BlockFp8Format
)
"""How a method's weights are stored, with the settings of the method that the files state."""

FORMATS: Final[tuple[type[MethodFormat], ...]] = get_args(Format)


def reader_of(config: Any) -> FormatReader:
    """The reader for a folder's format.

    Args:
        config: the `quantization_config` in its config.json; None if it has none.

    Raises:
        InputError: no format has this `quant_method`, or the config is malformed or not supported.
    """
    if config is not None and not isinstance(config, dict):
        raise InputError("must be an object", where=WHERE)
    found: dict[str, Any] = config or {}
    for each in FORMATS:
        if each.reads(config):
            return each.reader(found)
    known = list(dict.fromkeys(each.quant_method for each in FORMATS if each.quant_method))
    raise InputError(
        f"quant_method is {found.get('quant_method')!r}; qexport reads {', '.join(known[:-1])} and {known[-1]}",
        where=WHERE,
    )


def config_file(quantization: Mapping[str, Any]) -> str | None:
    """The second file in which loaders look for this `quantization_config`; None if they do not."""
    return next((each.config_file for each in FORMATS if each.quant_method == quantization["quant_method"]), None)


@dataclass(frozen=True)
class Outputs:
    """What the pass will yield, known before any weight is loaded.

    Attributes:
        format: how quantized weights are stored, unless a layout has its own format for them.
        specs: every parameter by name, in the order of the files: unquantized with its final dtype, or quantized.
        notes: what a user should know about weights that stay unquantized.
    """

    format: Format
    specs: Specs
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> dict[str, QuantizedSpec]:
        """The quantized modules, by path."""
        return quantized_modules(self.specs)

    def unquantized_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter that stays unquantized."""
        spec = self.specs[name]
        assert isinstance(spec, TensorSpec), f"{name} is quantized"
        return spec.dtype
