"""What a server sees of an artifact, planned or on the disk.

A folder is read from the disk alone, as the server would read it: nothing here knows how it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from qexport.errors import InputError
from qexport.tensors import TensorSpec
from qexport.tensors.strict_files import parse_json

CONFIG: Final = "config.json"

_LARGEST: Final = 1 << 26


@dataclass(frozen=True)
class ServedWeights:
    """The tensors that a server loads.

    Attributes:
        specs: shape and dtype by stored name; of a tensor that is in several files, those of the first file.
        files: the file of each tensor, by the tensor's name. Empty in a plan.
        twice: tensors that are in several files.
        unreadable: files that cannot be read, with the reason.
    """

    specs: Mapping[str, TensorSpec]
    files: Mapping[str, str] = field(default_factory=dict)
    twice: tuple[str, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModel:
    """An artifact as a server finds it. Each server has a class of its own, with what it derives from these.

    Attributes:
        files: the files beside the weights, by name. A folder is an entry without content, its name ends with a slash.
        weights: the tensors.
        folder: where it lies on the disk; None for a plan.
    """

    files: Mapping[str, bytes]
    weights: ServedWeights
    folder: Path | None = None
    _objects: dict[str, tuple[dict[str, Any], str | None]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def planned(cls, files: Mapping[str, bytes], tensors: Mapping[str, TensorSpec]) -> Self:
        """The artifact that will be written.

        Args:
            files: those that will lie beside the weights.
            tensors: those that the weights will consist of, by stored name.
        """
        return cls(files, ServedWeights(tensors))

    @classmethod
    def on_disk(cls, folder: Path) -> Self:
        """A finished folder, read as the server reads it: small files when asked for, and the headers of the weights.

        What cannot be read is a broken rule, and not an error here.
        """
        return cls(FolderFiles(folder), cls.read_weights(folder), folder)

    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        """The tensors that the server finds in a folder."""
        raise NotImplementedError

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor that is loaded, by stored name."""
        return self.weights.specs

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json; empty where it cannot be read."""
        return self.json(CONFIG)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config` of config.json; empty where there is none."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, Mapping) else {}

    @property
    def method(self) -> str | None:
        """The method that config.json names; None where there is none."""
        method = self.quantization.get("quant_method")
        return method if isinstance(method, str) else None

    def json(self, name: str) -> Mapping[str, Any]:
        """The object in a JSON file; empty where it cannot be read."""
        return self._parsed(name)[0]

    def json_fault(self, name: str) -> str | None:
        """Why a JSON file cannot be read; None where it can."""
        return self._parsed(name)[1]

    def _parsed(self, name: str) -> tuple[dict[str, Any], str | None]:
        if name not in self._objects:
            self._objects[name] = _parse(self.files, name)
        return self._objects[name]


class FolderFiles(Mapping[str, bytes]):
    """The files of a folder by name, each read when it is asked for; folders have a slash at the end of the name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = sorted(folder.rglob("*"))
        files = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
        self._names = dict.fromkeys([*files, *(f"{path.relative_to(folder)}/" for path in found if path.is_dir())])

    def __getitem__(self, name: str) -> bytes:
        """The content.

        Raises:
            KeyError: there is no such file.
            InputError: it cannot be read, or is too large for a file that is no weights.
        """
        if name not in self._names:
            raise KeyError(name)
        path = self._folder / name
        try:
            if (size := path.stat().st_size) > _LARGEST:
                raise InputError(f"{size} bytes are too many for this file; at most {_LARGEST} are read", where=name)
            return b"" if name.endswith("/") else path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=name) from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parse(files: Mapping[str, bytes], name: str) -> tuple[dict[str, Any], str | None]:
    if name not in files:
        return {}, f"there is no {name}"
    try:
        value = parse_json(files[name], where=name)
    except InputError as error:
        return {}, error.what
    return (value, None) if isinstance(value, dict) else ({}, f"must hold a JSON object, not {type(value).__name__}")
