"""Holding the tensors of a quantized layer, as a file has them, against what they should be."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.errors import InputError
from qexport.tensors import TensorSpec


def check_specs(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], module: str) -> None:
    """Every planned tensor must be there as planned; others are not looked at.

    Args:
        tensors: by their names inside the module.
        specs: what they should be.
        module: the layer's path; may be empty.

    Raises:
        InputError: a tensor is missing, or has another shape or dtype.
    """
    for name, expected in specs.items():
        if name not in tensors:
            raise InputError("a tensor of a quantized layer is missing", where=place(module, name))
        found = TensorSpec(tuple(tensors[name].shape), tensors[name].dtype)
        if not expected.admits(found):
            raise InputError(
                f"expected {expected.dtype} {list(expected.shape)}, found {found.dtype} {list(found.shape)}",
                where=place(module, name),
                mend="check the quantization config against the tensors",
            )


def place(module: str, name: str) -> str:
    """Where a tensor lies, for an error."""
    return f"{module}.{name}" if module else name
