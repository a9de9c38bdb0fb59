"""The data types that flow between the stages."""

from qexport.tensors.checkpoint import CalibrationSet, Origin
from qexport.tensors.methods import W8A8, Dense, FourBit, Gptq, LlmInt8, Method, Outputs
from qexport.tensors.quantized import (
    BlockQuantized,
    BlockQuantizedSpec,
    GroupQuantized,
    GroupQuantizedSpec,
    NestedAbsmax,
    OutputSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorRecord,
)
from qexport.tensors.source import LargestSpec, TensorSpec, WeightSource

__all__ = [
    "W8A8",
    "BlockQuantized",
    "BlockQuantizedSpec",
    "CalibrationSet",
    "Dense",
    "FourBit",
    "Gptq",
    "GroupQuantized",
    "GroupQuantizedSpec",
    "LargestSpec",
    "LlmInt8",
    "Method",
    "NestedAbsmax",
    "Origin",
    "OutputSpec",
    "Outputs",
    "Quantized",
    "QuantizedSpec",
    "RowQuantized",
    "RowQuantizedSpec",
    "TensorRecord",
    "TensorSpec",
    "WeightSource",
]
