"""bitsandbytes' LLM.int8 tensors: the codes, the absmaxes of the rows as `SCB`, and a mark for the row-major format.

The reference is bitsandbytes 0.50 (`Linear8bitLt._save_to_state_dict`). bitsandbytes itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.errors import InputError
from qexport.packing.checks import place
from qexport.tensors import RowQuantized, RowQuantizedSpec, TensorSpec

_ROW_MAJOR = 0


def packed_specs(spec: RowQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of what `pack` makes, by the tensor's name inside the module."""
    return {
        "weight": TensorSpec(spec.shape, torch.int8),
        "SCB": TensorSpec((spec.out_features,), torch.float32),
        "weight_format": TensorSpec((), torch.uint8),
    }


def pack(quantized: RowQuantized) -> dict[str, torch.Tensor]:
    """The three tensors of a quantized linear, as `packed_specs` has said."""
    return {
        "weight": quantized.codes,
        "SCB": quantized.absmax,
        "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8),
    }


def unpack(tensors: Mapping[str, torch.Tensor], *, module: str = "") -> RowQuantized:
    """The inverse of `pack`, for tensors read from a file.

    Args:
        tensors: `weight`, `SCB` and `weight_format`.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape or dtype; or the format is not row-major.
    """
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2:
        raise InputError("an int8 layer lacks its matrix of codes", where=place(module, "weight"))
    out_features, in_features = weight.shape
    expected = packed_specs(RowQuantizedSpec(out_features, in_features, torch.float16))
    found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise InputError("not the tensors of an int8 layer", where=place(module, ", ".join(wrong)))
    if int(tensors["weight_format"]) != _ROW_MAJOR:
        raise InputError("only the row-major weight_format 0 is read", where=place(module, "weight_format"))
    return RowQuantized(weight, tensors["SCB"])
