"""The weights of an artifact as safetensors shards, fed by the pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from qexport.errors import CompatibilityError, listed
from qexport.export.encodings import Encoding
from qexport.export.shards import ShardWriter
from qexport.tensors import Outputs, TensorRecord, TensorSpec


@dataclass(frozen=True)
class WeightFiles:
    """What will be written, known before anything is loaded.

    Attributes:
        encoding: the format of the tensors.
        outputs: what the pass will yield.
        max_shard_size: bytes of tensors in one file.
    """

    encoding: Encoding
    outputs: Outputs
    max_shard_size: int

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the files."""
        return {
            tensor: stored
            for name, spec in self.outputs.specs.items()
            for tensor, stored in self.encoding.specs(name, spec).items()
        }

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors; the most where the length of one is known only when it comes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def parameters(self) -> int:
        """Parameters of the model, each quantized weight counted once."""
        return sum(prod(spec.shape) for spec in self.outputs.specs.values())

    def equal(self, other: WeightFiles) -> bool:
        """Whether both would write the same bytes from the same pass."""
        return type(self.encoding) is type(other.encoding) and self.max_shard_size == other.max_shard_size

    def refuse_faults(self) -> None:
        """Holds every quantized matrix against the format.

        Raises:
            CompatibilityError: one or more cannot be stored; all are listed.
        """
        faults = [
            f"{module}.weight: {reason}"
            for module, spec in self.outputs.quantized.items()
            if (reason := self.encoding.fault(spec))
        ]
        if faults:
            raise CompatibilityError(
                f"{len(faults)} layers do not fit the format of the file",
                where=listed(faults),
                mend="choose other bits or groups for these layers, or leave them dense",
            )

    def writer(self, folder: Path) -> WeightWriter:
        """Starts the files in an existing, empty folder."""
        return WeightWriter(self, folder)


@dataclass(frozen=True)
class WrittenWeights:
    """What lies in a folder after `WeightWriter.finish`.

    Attributes:
        specs: every tensor.
        digests: the hex SHA-256 of each tensor's bytes.
        files: the names of the files.
    """

    specs: Mapping[str, TensorSpec]
    digests: Mapping[str, str]
    files: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def link_into(self, source: Path, target: Path) -> None:
        """Puts the same files into another folder: as hard links where the file system can, else as copies."""
        for name in self.files:
            try:
                os.link(source / name, target / name)
            except OSError:
                shutil.copyfile(source / name, target / name)


class WeightWriter:
    """Takes the pass's records one by one, in any order."""

    def __init__(self, files: WeightFiles, folder: Path) -> None:
        self._files = files
        self._shards = ShardWriter(folder, files.specs, files.max_shard_size)

    def write(self, record: TensorRecord) -> None:
        """Packs and writes one parameter.

        Raises:
            QexportError: it was not planned so, or was written before.
            OSError: the disk is full or failed.
        """
        for name, tensor in self._files.encoding.tensors(record).items():
            self._shards.write(name, tensor)

    def finish(self) -> WrittenWeights:
        """Completes the files.

        Raises:
            QexportError: a planned parameter never came.
            OSError: the disk is full or failed.
        """
        names = self._shards.finish()
        return WrittenWeights(self._shards.written, self._shards.digests, names)
