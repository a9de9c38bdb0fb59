"""The formats that methods yield, what a pass will yield in one, and which format a folder's config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch

from qexport.errors import InputError
from qexport.formats.bitsandbytes.four_bit import FourBitFormat
from qexport.formats.bitsandbytes.llm_int8 import LlmInt8Format
from qexport.formats.compressed_tensors.format import W8A8Format
from qexport.formats.format import FormatReader, MethodFormat, Specs, quantized_modules
from qexport.formats.gptq.format import GptqFormat
from qexport.formats.merged import MergedFormat
from qexport.formats.stored_weight import WHERE
from qexport.tensors import QuantizedSpec, TensorSpec

Format = MergedFormat | GptqFormat | FourBitFormat | LlmInt8Format | W8A8Format
"""How a method's weights are stored, with what the files must say of the method."""

FORMATS: Final[tuple[type[MethodFormat], ...]] = get_args(Format)


def reader_of(config: Any) -> FormatReader:
    """The reader of a folder.

    Args:
        config: the `quantization_config` in its config.json; None where there is none.

    Raises:
        InputError: no reader knows the method, or the config cannot be followed.
    """
    if config is not None and not isinstance(config, dict):
        raise InputError("must be an object", where=WHERE)
    found: dict[str, Any] = config or {}
    for each in FORMATS:
        if each.reads(config):
            return each.reader(found)
    known = list(dict.fromkeys(each.quant_method for each in FORMATS if each.quant_method))
    raise InputError(
        f"quant_method is {found.get('quant_method')!r}; this reader knows {', '.join(known[:-1])} and {known[-1]}",
        where=WHERE,
    )


def config_file(quantization: Mapping[str, Any]) -> str | None:
    """The second file in which readers look for this `quantization_config`; None where there is none."""
    return next((each.config_file for each in FORMATS if each.quant_method == quantization["quant_method"]), None)


@dataclass(frozen=True)
class Outputs:
    """What the pass will yield, known before anything is loaded.

    Attributes:
        format: how the quantized weights are stored where a layout has no other format for them.
        specs: every parameter by name, unquantized with its final dtype or quantized, in the order of the files.
        notes: what a user should know of what stays unquantized.
    """

    format: Format
    specs: Specs
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> dict[str, QuantizedSpec]:
        """What is quantized, by module path."""
        return quantized_modules(self.specs)

    def unquantized_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter that stays unquantized."""
        spec = self.specs[name]
        assert isinstance(spec, TensorSpec), f"{name} is quantized"
        return spec.dtype
