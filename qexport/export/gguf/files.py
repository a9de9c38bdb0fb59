"""The file of the layout gguf, written during the pass and read back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from torch import Tensor

from qexport.artifact.digests import sha256_chunks
from qexport.artifact.names import GGUF_NAME
from qexport.errors import QexportError, listed
from qexport.export.tensor_writer import PlacedTensors, WrittenWeights, write_at
from qexport.export.weight_files import WeightFiles
from qexport.formats import Outputs
from qexport.formats.gguf import DTYPES, Entry, GgufFormat
from qexport.formats.gguf.header import Value, header_bytes, padded
from qexport.tensors import TensorSpec
from qexport.tensors.gguf_file import GgufFile, GgufTensor

_PIECE: Final = 1 << 22


@dataclass(frozen=True)
class GgufFiles(WeightFiles):
    """The one file of the layout: header, table, and every tensor at an offset that the table names.

    Attributes:
        values: the header's, by key.
        constants: tensors that are no parameters of the model, by name.
    """

    values: Mapping[str, Value]
    constants: Mapping[str, Tensor]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the file."""
        own = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.constants.items()}
        return own | dict(super().specs)

    @cached_property
    def table(self) -> Mapping[str, Entry]:
        """Every tensor of the file, in order."""
        form = self.encoding
        assert isinstance(form, GgufFormat)
        own = {name: Entry(tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in self.constants.items()}
        return own | {form.places.names[name]: form.entry(name, spec) for name, spec in self.outputs.specs.items()}

    @cached_property
    def header(self) -> tuple[bytes, Mapping[str, int]]:
        """The bytes before the tensors, and where in the file each of them begins."""
        return header_bytes(self.values, self.table)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        _, offsets = self.header
        return max(offsets[name] + padded(entry.nbytes) for name, entry in self.table.items())

    @property
    def files(self) -> Mapping[str, int]:
        """Bytes of the one file, by name."""
        return {GGUF_NAME: self.size}

    def container(self, folder: Path) -> GgufWriter:
        """The writer of the file, for an existing folder without it."""
        return GgufWriter(folder / GGUF_NAME, self)

    def read_back(self, folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
        """Compares every tensor on disk with what was computed.

        Raises:
            QexportError: a tensor is missing, unexpected, stored in another way, or has other bytes.
        """
        with closing(GgufFile(folder / GGUF_NAME)) as file:
            problems = [name for name in {**self.table, **file.tensors} if not self._is_planned(name, file)]
            if problems:
                raise QexportError("tensors on disk are not those planned", where=f"{GGUF_NAME}: {listed(problems)}")
            for name, tensor in file.tensors.items():
                if sha256_chunks(_pieces(file, name, tensor)) != written.digests[name]:
                    raise QexportError(
                        "a tensor's bytes on disk are not those written",
                        where=f"{GGUF_NAME}: {name}",
                        mend="check the disk, then run again",
                    )

    def _is_planned(self, name: str, file: GgufFile) -> bool:
        planned, found = self.table.get(name), file.tensors.get(name)
        return planned is not None and found is not None and planned == Entry(found.shape, found.kind)


def gguf_files(
    outputs: Outputs, encoding: GgufFormat, values: Mapping[str, Value], constants: Mapping[str, Tensor]
) -> GgufFiles:
    """The file of the layout.

    Args:
        outputs: what the pass will yield.
        encoding: how parameters are stored.
        values: the header's, by key, in the order of the file.
        constants: tensors that are no parameters of the model, by name.
    """
    return GgufFiles(encoding, outputs, 0, values, constants)


class GgufWriter(PlacedTensors):
    """Writes tensors into a file whose header is known from the plan.

    Args:
        path: of the file, which does not exist.
        files: what it will hold.
    """

    def __init__(self, path: Path, files: GgufFiles) -> None:
        self._path, self._constants = path, files.constants
        (self._header, offsets), self._end = files.header, files.size
        super().__init__(files.specs, {name: (path, offset) for name, offset in offsets.items()})

    def finish(self) -> tuple[str, ...]:
        """Writes the header, the constants, and zeros behind the last tensor.

        Raises:
            QexportError: a planned tensor was not written.
        """
        for name, tensor in self._constants.items():
            if name not in self.written:
                self.write(name, tensor)
        self.refuse_missing()
        write_at(self._path, 0, memoryview(self._header))
        os.truncate(self._path, self._end)
        return (self._path.name,)


def _pieces(file: GgufFile, name: str, tensor: GgufTensor) -> Iterator[memoryview]:
    step = max(1, _PIECE // tensor.row_bytes)
    for start in range(0, tensor.rows, step):
        yield file.read_rows(name, start, min(start + step, tensor.rows)).reshape(-1).data
