"""What the weights of a finished folder are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qexport.tensors import TensorSpec


@dataclass(frozen=True)
class WrittenWeights:
    """What lies in a folder after `WeightWriter.finish`.

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
        """Puts the same files into another folder: as hard links where the file system can, else as copies."""
        for name in self.files:
            link_or_copy(source / name, target / name)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second path: a hard link where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
