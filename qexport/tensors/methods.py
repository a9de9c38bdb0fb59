"""How the quantized weights of a model came about, as far as the files that hold them must say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from qexport.tensors.quantized import OutputSpec, QuantizedSpec
from qexport.tensors.source import TensorSpec

ComputeDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Dense:
    """Nothing is quantized: the merged model itself."""


@dataclass(frozen=True)
class Gptq:
    """GPTQ, as in AutoGPTQ's quantize_config.json. Single modules may differ in bits and group_size.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs in a group; -1 for one group per row.
        sym: every zero point is 2**(bits - 1).
        desc_act: the groups follow activation order.
        static_groups: columns were solved in activation order, with groups in the original order.
        damp_percent: a fraction of the mean of the Hessian's diagonal.
        true_sequential: each linear saw inputs from the quantized ones before it.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    static_groups: bool
    damp_percent: float
    true_sequential: bool


@dataclass(frozen=True)
class FourBit:
    """bitsandbytes' 4-bit code books.

    Attributes:
        quant_type: the code book.
        block_size: values that share an absmax.
        double_quant: the absmaxes are quantized too.
        compute_dtype: what the dequantized weights are multiplied in.
    """

    quant_type: Literal["nf4", "fp4"]
    block_size: int
    double_quant: bool
    compute_dtype: ComputeDtype


@dataclass(frozen=True)
class LlmInt8:
    """bitsandbytes' LLM.int8 (arXiv:2208.07339).

    Attributes:
        threshold: activations above it are multiplied in 16 bits.
    """

    threshold: float


@dataclass(frozen=True)
class W8A8:
    """int8 weights with a scale per output, int8 activations with a scale per token found when serving."""


Method = Dense | Gptq | FourBit | LlmInt8 | W8A8


@dataclass(frozen=True)
class Outputs:
    """What the pass will yield, known before anything is loaded.

    Attributes:
        method: how it is quantized.
        specs: every parameter by name, dense with its final dtype or quantized, in the order of the files.
        notes: what a user should know of what stays dense.
    """

    method: Method
    specs: Mapping[str, OutputSpec]
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> dict[str, QuantizedSpec]:
        """What is quantized, by module path."""
        return {
            name.removesuffix(".weight"): spec for name, spec in self.specs.items() if isinstance(spec, QuantizedSpec)
        }

    def dense_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter that stays dense."""
        spec = self.specs[name]
        assert isinstance(spec, TensorSpec), f"{name} is quantized"
        return spec.dtype
