"""The data types that flow between the stages."""

from qexport.tensors.calibration import CalibrationSet
from qexport.tensors.checkpoint import Checkpoint, Origin
from qexport.tensors.quantized import GroupQuantized, GroupQuantizedSpec, LayerReport, TensorRecord
from qexport.tensors.source import TensorSpec, WeightSource

__all__ = [
    "CalibrationSet",
    "Checkpoint",
    "GroupQuantized",
    "GroupQuantizedSpec",
    "LayerReport",
    "Origin",
    "TensorRecord",
    "TensorSpec",
    "WeightSource",
]
