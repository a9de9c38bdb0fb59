"""What a format of quantized weights in a finished folder is to its reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from qexport.architectures.structure import Structure
from qexport.tensors import Quantized, WeightSource

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one module, by their names inside it: `qweight`, or `weight.absmax`."""


class StoredWeight(Protocol):
    """One quantized weight, as headers and config describe it. Holds none of its large tensors."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors inside the module."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        ...

    def quantized(self, tensors: Tensors) -> Quantized:
        """The codes in those tensors, on the device where the tensors are.

        Raises:
            InputError: the tensors contradict each other or the config, or a value is out of range.
        """
        ...


class StoredFormat(Protocol):
    """One format. Made from the `quantization_config`, which it checks."""

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """Every module that is stored quantized, by path. Reads headers, and tensors of a few bytes.

        Raises:
            InputError: a part of a module is missing, or has another shape or dtype than the others ask for.
        """
        ...

    def claimed(self, structure: Structure) -> set[str]:
        """The modules that the config calls quantized, by path."""
        ...
