"""What a format of quantized weights in a finished folder is to its reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.tensors import Quantized, TensorSpec, WeightSource

WHERE: Final = "config.json: quantization_config"

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one module, by their names inside it: `qweight`, or `weight.absmax`."""


@dataclass(frozen=True)
class Scheme:
    """How a module's codes are to be read. `group_size` is -1 for one group per row."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclass(frozen=True)
class StoredLayer:
    """One quantized module, as a reader is told of it.

    Attributes:
        method: how it was quantized, as far as its format tells: `gptq` for all codes in groups along the inputs.
        bits: of a code.
        group_size: values that share a scale.
        shape: [out, in].
    """

    method: str
    bits: int
    group_size: int
    shape: tuple[int, int]


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


def refuse_missing(module: str, parts: Iterable[str], specs: Mapping[str, TensorSpec]) -> None:
    """Refuses a quantized module that lacks one of its tensors.

    Raises:
        InputError: all that are missing are named.
    """
    if missing := [part for part in parts if f"{module}.{part}" not in specs]:
        raise InputError(f"a quantized module lacks {', '.join(missing)}", where=module)


def int8_shape(module: str, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """[out, in] of a module whose `weight` is a matrix of int8 codes.

    Raises:
        InputError: it is none.
    """
    codes = specs[f"{module}.weight"]
    if len(codes.shape) != 2 or codes.dtype != torch.int8:
        raise InputError(f"{codes.dtype} {list(codes.shape)} is no int8 matrix", where=f"{module}.weight")
    return codes.shape[0], codes.shape[1]
