"""What a stored format is to the writer of a folder and to its reader.

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
"""Every parameter that will leave the pass, by name: unquantized with its final dtype, or quantized."""


class Encoding(Protocol):
    """Which tensors stand for a parameter. Encodings are equal where they store the same bytes for the same record."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The tensors that will be stored for a parameter, by name."""
        ...

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The tensors of a parameter, by name, as `specs` has said."""
        ...

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why such a matrix cannot be stored, or None. Needs no weights."""
        ...


class StoredFormat(Encoding, Protocol):
    """A format of safetensors files that config.json names.

    Attributes:
        quant_method: in the `quantization_config`; None where nothing is quantized.
        config_file: a second file with the `quantization_config`, where some readers look for one.
    """

    quant_method: ClassVar[str | None]
    config_file: ClassVar[str | None]

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any] | None:
        """What config.json says of the codes; None where nothing is quantized."""
        ...


@dataclass(frozen=True)
class Card:
    """A format in the words of a model card.

    Attributes:
        tag: for the hub's search.
        title: a few words.
        text: what the weights are, after `Made with qexport from ...:`.
    """

    tag: str
    title: str
    text: str


class MethodFormat(StoredFormat, Protocol):
    """A format that a quantization method yields."""

    @property
    def card(self) -> Card:
        """For the model card."""
        ...

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether a `quantization_config`, or its absence, names this format.

        Raises:
            InputError: it contradicts itself.
        """
        ...

    @staticmethod
    def reader(config: Mapping[str, Any]) -> FormatReader:
        """What reads a folder with this `quantization_config`.

        Raises:
            InputError: the config cannot be followed.
        """
        ...


class FormatReader(Protocol):
    """One folder's format. Made from the `quantization_config`, which it checks."""

    @property
    def words(self) -> str:
        """The format and its settings, for a user."""
        ...

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """Every module that is stored quantized, by path. Reads headers, and tensors of a few bytes.

        Raises:
            InputError: a part of a module is missing, or has another shape or dtype than the others ask for.
        """
        ...

    def claimed(self, structure: Structure) -> set[str]:
        """The modules that the config calls quantized, by path."""
        ...


class ModuleEncoding(ABC):
    """The usual encoding: tensors `MODULE.part` take the place of a quantized `MODULE.weight`, the rest stays."""

    holds: ClassVar[tuple[type[Quantized], ...]]
    """The types of codes that the format can hold."""

    config_file: ClassVar[str | None] = None

    @abstractmethod
    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """The tensors of a quantized module, by their names inside it."""

    @abstractmethod
    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """The tensors of a quantized module, by their names inside it, as `parts` has said."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The parameter itself, or the tensors of its module."""
        return {name: spec} if isinstance(spec, TensorSpec) else _inside(name, self.parts(spec))

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The parameter itself, or the tensors of its module.

        Raises:
            QexportError: the codes are of a type that the format cannot hold.
        """
        if isinstance(record.value, torch.Tensor):
            return {record.name: record.value}
        if not isinstance(record.value, self.holds):
            found = type(record.value).__name__
            raise QexportError(f"{found} has reached a format that cannot hold it", where=record.name)
        return _inside(record.name, self.pack(record.value))

    def fault(self, spec: QuantizedSpec) -> str | None:
        """None: every matrix can be stored so, unless the format says otherwise."""
        return None


def quantized_modules(specs: Specs) -> dict[str, QuantizedSpec]:
    """What is quantized, by module path."""
    return {name.removesuffix(".weight"): spec for name, spec in specs.items() if isinstance(spec, QuantizedSpec)}


def _inside(name: str, parts: Mapping[str, _T]) -> dict[str, _T]:
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": value for part, value in parts.items()}
