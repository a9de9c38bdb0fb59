"""Writing tensors directly to their places in files, in any order; and the record of what was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from qexport.artifact.digests import sha256_bytes, tensor_bytes
from qexport.errors import QexportError
from qexport.tensors import TensorSpec


class TensorWriter(Protocol):
    """Writes tensors into files of one container format."""

    digests: dict[str, str]
    written: dict[str, TensorSpec]

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compares a tensor with the plan."""
        ...

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor to its place."""
        ...

    def finish(self) -> tuple[str, ...]:
        """Completes the files and returns their names."""
        ...


class PlacedTensors:
    """Writes each planned tensor exactly once, to a place that is known in advance.

    Args:
        specs: every tensor that will come.
        places: the file of each tensor, and its offset there.

    Attributes:
        digests: the hex SHA-256 of the bytes of each tensor written so far.
        written: shape and dtype of each tensor written so far.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], places: Mapping[str, tuple[Path, int]]) -> None:
        self.digests: dict[str, str] = {}
        self.written: dict[str, TensorSpec] = {}
        self.places = places
        self._specs = specs

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compares a tensor with the plan.

        Raises:
            QexportError: the tensor differs from the plan, or was written before.
        """
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if name not in self._specs:
            raise QexportError("a tensor that was not planned has reached the export", where=name)
        if not self._specs[name].admits(found):
            raise QexportError(f"a tensor is {found} where {self._specs[name]} was planned", where=name)
        if name in self.digests:
            raise QexportError("a tensor has reached the export twice", where=name)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor to its place.

        Args:
            name: one of the planned names.
            tensor: on the CPU, with the planned shape and dtype.

        Raises:
            QexportError: see `check`.
            OSError: the disk is full or failed.
        """
        self.check(name, tensor)
        content = tensor_bytes(tensor)
        write_at(*self.places[name], content)
        self.digests[name] = sha256_bytes(content)
        self.written[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)

    def refuse_missing(self) -> None:
        """Refuses to finish without a planned tensor.

        Raises:
            QexportError: a planned tensor was not written.
        """
        missing = [name for name in self._specs if name not in self.digests]
        if missing:
            raise QexportError(f"{len(missing)} tensors never reached the export", where=", ".join(missing[:5]))


def write_at(path: Path, offset: int, content: memoryview) -> None:
    """Writes all of the content, into a new file if there is none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        write_fully(descriptor, offset, content)
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, offset: int, content: memoryview) -> None:
    """Writes all of the content; one system call writes at most 2 GiB."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


@dataclass(frozen=True)
class WrittenWeights:
    """What is in a folder after `WeightWriter.finish`.

    Attributes:
        specs: every tensor.
        digests: the hex SHA-256 of each tensor's bytes.
        files: the hex SHA-256 of each file, by its name; see `FileDigests`.
    """

    specs: Mapping[str, TensorSpec]
    digests: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def link_into(self, source: Path, target: Path) -> None:
        """Puts the same files into another folder: as hard links if the file system can, else as copies."""
        for name in self.files:
            link_or_copy(source / name, target / name)


def link_or_copy(source: Path, target: Path) -> None:
    """Puts the same file under a second path: a hard link if the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
