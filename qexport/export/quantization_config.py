"""The `quantization_config` of each method in its own format."""

from __future__ import annotations

from typing import Any

from qexport.architectures.structure import Structure
from qexport.export.bitsandbytes_config import bitsandbytes_config
from qexport.export.compressed_tensors_config import compressed_tensors_config
from qexport.export.gptq_config import gptq_config
from qexport.tensors import W8A8, Dense, FourBit, Gptq, LlmInt8, Outputs


def quantization_config(outputs: Outputs, structure: Structure) -> dict[str, Any] | None:
    """What config.json says of the codes; None where nothing is quantized."""
    match outputs.method:
        case Dense():
            return None
        case Gptq() as method:
            return gptq_config(method, outputs.specs, structure)
        case W8A8():
            return compressed_tensors_config(outputs, structure)
        case (FourBit() | LlmInt8()) as method:
            return bitsandbytes_config(method, outputs, structure)
