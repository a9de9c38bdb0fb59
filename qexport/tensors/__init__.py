"""The data types that stages pass to each other. Imported when they are used: headers can be read without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexport.tensors.float4 import Float4Quantized, Float4QuantizedSpec
    from qexport.tensors.float8 import Float8Quantized, Float8QuantizedSpec
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
        ValuesQuantized,
    )
    from qexport.tensors.source import CalibrationSet, LargestSpec, Origin, TensorSpec, Terms, WeightSource

__all__ = [
    "BlockQuantized",
    "BlockQuantizedSpec",
    "CalibrationSet",
    "Float4Quantized",
    "Float4QuantizedSpec",
    "Float8Quantized",
    "Float8QuantizedSpec",
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
    "ValuesQuantized",
    "WeightSource",
]

_IN_SOURCE = ("CalibrationSet", "LargestSpec", "Origin", "TensorSpec", "Terms", "WeightSource")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("Float"):
        place = name[: len("Float8")].lower()
    else:
        place = "source" if name in _IN_SOURCE else "quantized"
    return getattr(import_module(f"{__name__}.{place}"), name)
