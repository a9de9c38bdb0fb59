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
            try:
                os.link(source / name, target / name)
            except OSError:
                shutil.copyfile(source / name, target / name)
