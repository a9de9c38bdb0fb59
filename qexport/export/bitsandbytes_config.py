"""What config.json says of bitsandbytes' codes: the fields of transformers' `BitsAndBytesConfig.to_dict`."""

from __future__ import annotations

from typing import Any

from qexport.architectures.structure import Structure
from qexport.tensors import FourBit, LlmInt8, Outputs


def bitsandbytes_config(method: FourBit | LlmInt8, outputs: Outputs, structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of an artifact. Fields that do not concern the method have transformers' defaults."""
    four_bit = isinstance(method, FourBit)
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": method.compute_dtype if isinstance(method, FourBit) else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": method.quant_type if isinstance(method, FourBit) else "fp4",
        "bnb_4bit_use_double_quant": isinstance(method, FourBit) and method.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _skip_modules(outputs, structure),
        "llm_int8_threshold": method.threshold if isinstance(method, LlmInt8) else 6.0,
    }


def _skip_modules(outputs: Outputs, structure: Structure) -> list[str] | None:
    """The modules that transformers must not replace, by their whole path; None where its own choice is the same.

    Left to itself transformers spares the head and what is tied to it. A list takes the place of that choice, so the
    head stands in it. Each entry counts as a regular expression from the start of a path up to a dot or its end, and as
    the end of a path: whole paths match themselves alone.
    """
    quantized = outputs.quantized
    matrices = [
        name.removesuffix(".weight")
        for name, shape in structure.parameters.items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    ends = (structure.embedding, structure.head)
    dense = [name for name in matrices if name not in quantized and name not in ends]
    return [structure.head, *dense] if dense else None
