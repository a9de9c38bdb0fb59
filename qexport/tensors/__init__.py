"""The data types that stages pass to each other."""

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
from qexport.tensors.source import CalibrationSet, LargestSpec, Origin, TensorSpec, Terms, WeightSource

__all__ = [
    "BlockQuantized",
    "BlockQuantizedSpec",
    "CalibrationSet",
    "GroupQuantized",
    "GroupQuantizedSpec",
    "LargestSpec",
    "NestedAbsmax",
    "Origin",
    "OutputSpec",
    "Quantized",
    "QuantizedSpec",
    "RowQuantized",
    "RowQuantizedSpec",
    "TensorRecord",
    "TensorSpec",
    "Terms",
    "WeightSource",
]
