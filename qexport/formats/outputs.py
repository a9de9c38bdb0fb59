"""What a quantization pass will yield."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qexport.formats.format import Specs, quantized_modules
from qexport.formats.registry import Format
from qexport.tensors import QuantizedSpec, TensorSpec


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
