"""The interface of a stored format, for the code that writes a folder and the code that reads it back.

A format is a frozen dataclass that writes (`StoredFormat`) and names the class that reads (`FormatReader`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from qexport.architectures.structure import Structure
from qexport.errors import QexportError
from qexport.formats.stored_weight import StoredWeight
from qexport.tensors import OutputSpec, Quantized, QuantizedSpec, TensorRecord, TensorSpec, WeightSource

_T = TypeVar("_T")

Specs = Mapping[str, OutputSpec]
"""Every parameter that the pass yields, by name: unquantized with its final dtype, or quantized."""


class Encoding(Protocol):
    """Which tensors store a parameter. Encodings are equal if they store the same bytes for the same record."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The tensors that will be stored for a parameter, by name."""
        ...

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The tensors of a parameter, by name, with the shapes and dtypes of `specs`."""
        ...

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why this matrix cannot be stored, or None if it can. Needs no weights."""
        ...


class StoredFormat(Encoding, Protocol):
    """A format of safetensors files that config.json names.

    Attributes:
        quant_method: its value in the `quantization_config`; None if nothing is quantized.
        config_file: a second file with the `quantization_config`, if some loaders look for one.
    """

    quant_method: ClassVar[str | None]
    config_file: ClassVar[str | None]

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any] | None:
        """The `quantization_config` for config.json; None if nothing is quantized."""
        ...


@dataclass(frozen=True)
class Card:
    """What a model card says of a format.

    Attributes:
        tag: for the hub's search by tags.
        title: a few words for the heading.
        text: describes the weights; follows `Made with qexport from ...:`.
    """

    tag: str
    title: str
    text: str


class MethodFormat(StoredFormat, Protocol):
    """A format that a quantization method yields."""

    @property
    def card(self) -> Card:
        """The format on the model card."""
        ...

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether a `quantization_config` (or its absence) names this format.

        Raises:
            InputError: the config contradicts itself.
        """
        ...

    @staticmethod
    def reader(config: Mapping[str, Any]) -> FormatReader:
        """The reader of folders with this `quantization_config`.

        Raises:
            InputError: the config is malformed or not supported.
        """
        ...


class FormatReader(Protocol):
    """Reads one folder's format. Made from its `quantization_config`, which it checks."""

    @property
    def description(self) -> str:
        """The format and its settings, for users."""
        ...

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """Every module that is stored quantized, by path. Reads only headers and tensors of a few bytes.

        Raises:
            InputError: a tensor of a module is missing, or its shape or dtype does not fit the other tensors.
        """
        ...

    def claimed(self, structure: Structure) -> set[str]:
        """The modules that are quantized according to the config, by path."""
        ...


class ModuleEncoding(ABC):
    """The usual encoding: tensors `MODULE.part` replace a quantized `MODULE.weight`; all else stays as it is."""

    holds: ClassVar[tuple[type[Quantized], ...]]
    """The types of codes that the format can hold."""

    config_file: ClassVar[str | None] = None

    @abstractmethod
    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors of a quantized module, by their names inside it."""

    @abstractmethod
    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors of a quantized module, by their names inside it, with the shapes and dtypes of `parts`."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The parameter itself, or the tensors of its module."""
        return {name: spec} if isinstance(spec, TensorSpec) else inside(name, self.parts(spec))

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The parameter itself, or the tensors of its module.

        Raises:
            QexportError: the codes are of a type that the format cannot hold.
        """
        if isinstance(record.value, torch.Tensor):
            return {record.name: record.value}
        if not isinstance(record.value, self.holds):
            found = type(record.value).__name__
            raise QexportError(f"{found} cannot be stored in {type(self).__name__}", where=record.name)
        return inside(record.name, self.pack(record.value))

    def fault(self, spec: QuantizedSpec) -> str | None:
        """None: every matrix can be stored, unless a format overrides this."""
        return None


def quantized_modules(specs: Specs) -> dict[str, QuantizedSpec]:
    """The quantized modules, by path."""
    return {name.removesuffix(".weight"): spec for name, spec in specs.items() if isinstance(spec, QuantizedSpec)}


def inside(name: str, parts: Mapping[str, _T]) -> dict[str, _T]:
    """The parts of a parameter's module, by their names in the files."""
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": value for part, value in parts.items()}
