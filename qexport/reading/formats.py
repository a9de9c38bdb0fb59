"""Which format a folder's config.json claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.errors import InputError
from qexport.reading.bitsandbytes_format import FourBitWeight, LlmInt8Weight, bitsandbytes_format
from qexport.reading.compressed_tensors_format import CompressedTensorsFormat, PackedWeight, RowWeight
from qexport.reading.dense_format import DenseFormat
from qexport.reading.gptq_format import GptqFormat, GptqWeight
from qexport.reading.stored_format import WHERE, Scheme, StoredFormat, StoredLayer, StoredWeight
from qexport.tensors import GroupQuantizedSpec


def stored_format(config: Any) -> StoredFormat:
    """The reader of a folder.

    Args:
        config: the `quantization_config` in its config.json; None where there is none.

    Raises:
        InputError: no reader knows the method, or the config cannot be followed.
    """
    if config is None:
        return DenseFormat()
    if not isinstance(config, dict):
        raise InputError("must be an object", where=WHERE)
    match config.get("quant_method"):
        case "gptq":
            return GptqFormat(config)
        case "bitsandbytes":
            return bitsandbytes_format(config)
        case "compressed-tensors":
            return CompressedTensorsFormat(config)
        case method:
            raise InputError(
                f"quant_method is {method!r}; this reader knows gptq, bitsandbytes and compressed-tensors",
                where=WHERE,
            )


def group_spec(weight: StoredWeight) -> GroupQuantizedSpec | None:
    """Bits, groups and symmetry of a module whose codes lie in groups of equal size along its inputs, else None."""
    if not isinstance(weight, GptqWeight | PackedWeight) or weight.scheme is None:
        return None
    scheme, (rows, columns) = weight.scheme, weight.shape
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    if columns % group_size:
        return None
    return GroupQuantizedSpec(rows, columns, scheme.bits, group_size, scheme.sym, scheme.desc_act)


def stored_layer(module: str, weight: StoredWeight) -> StoredLayer:
    """A quantized module for a reader.

    Raises:
        InputError: there are codes, and the config says nothing of them.
    """
    match weight:
        case FourBitWeight(spec=spec):
            return StoredLayer(spec.quant_type, 4, spec.block_size, weight.shape)
        case LlmInt8Weight():
            return StoredLayer("int8", 8, weight.shape[1], weight.shape)
        case RowWeight():
            return StoredLayer("w8a8", 8, weight.shape[1], weight.shape)
        case GptqWeight(scheme=Scheme() as scheme) | PackedWeight(scheme=Scheme() as scheme):
            group_size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
            return StoredLayer("gptq", scheme.bits, group_size, weight.shape)
        case _:
            raise InputError(
                "a module is quantized that should be dense",
                where=f"config.json: quantization_config, {module}",
                mend="fetch the artifact again, or ask its maker: weights and config.json do not belong together",
            )


def describe_method(quantization: Mapping[str, Any] | None) -> str:
    """A `quantization_config` for a reader."""
    config = quantization or {}
    match config.get("quant_method"):
        case None:
            return "dense"
        case "gptq":
            symmetry = "symmetric" if config["sym"] else "asymmetric"
            return f"GPTQ, {config['bits']} bits, group_size {config['group_size']}, {symmetry}"
        case "bitsandbytes" if config.get("load_in_4bit"):
            double = ", double quantization" if config.get("bnb_4bit_use_double_quant") else ""
            return f"{str(config.get('bnb_4bit_quant_type', 'fp4')).upper()}{double}"
        case "bitsandbytes":
            return "LLM.int8"
        case "compressed-tensors":
            return f"compressed-tensors, {config['format']}"
        case name:
            return str(name)
