"""Which format a folder's config.json claims."""

from __future__ import annotations

from typing import Any

from qexport.errors import InputError
from qexport.reading.bitsandbytes_format import bitsandbytes_format
from qexport.reading.compressed_tensors_format import CompressedTensorsFormat, PackedWeight
from qexport.reading.dense_format import DenseFormat
from qexport.reading.gptq_format import GptqFormat, GptqWeight
from qexport.reading.stored_format import WHERE, StoredFormat, StoredWeight
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
