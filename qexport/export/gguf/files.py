"""The files of the layout gguf, written during the pass and read back."""

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
from qexport.artifact.names import gguf_names
from qexport.errors import QexportError, listed
from qexport.export.tensor_writer import PlacedTensors, WrittenWeights, write_at
from qexport.export.weight_files import WeightFiles
from qexport.formats.gguf import DTYPES, Entry, GgufFormat
from qexport.formats.gguf.header import Short, Value, header_bytes, padded
from qexport.tensors import TensorSpec
from qexport.tensors.gguf_file import GgufFile
from qexport.tensors.gguf_parts import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS_COUNT, open_gguf

_PIECE: Final = 1 << 22


@dataclass(frozen=True)
class Part:
    """One file of the layout.

    Attributes:
        table: its tensors, in order.
        header: the bytes before them.
        offsets: where in the file each of them begins.
    """

    table: Mapping[str, Entry]
    header: bytes
    offsets: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max(self.offsets[name] + padded(entry.nbytes) for name, entry in self.table.items())


@dataclass(frozen=True)
class GgufFiles(WeightFiles):
    """The files of the layout: in each a header, a table, and every tensor at an offset that the table names.

    `max_shard_size` counts tensors alone, as in llama.cpp's `llama-gguf-split --split-max-size`; 0 for one file.

    Attributes:
        values: the header's, by key.
        constants: tensors that are no parameters of the model, by name.
    """

    values: Mapping[str, Value]
    constants: Mapping[str, Tensor]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Everything that is written: every tensor of the files, of stacked experts each one's part."""
        own = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.constants.items()}
        return own | dict(super().specs)

    @cached_property
    def table(self) -> Mapping[str, Entry]:
        """Every tensor of the files, in order."""
        form = self._format
        own = {name: Entry(tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in self.constants.items()}
        return own | {form.places.names[name]: form.entry(name, spec) for name, spec in self.outputs.specs.items()}

    @property
    def _format(self) -> GgufFormat:
        assert isinstance(self.encoding, GgufFormat)
        return self.encoding

    @cached_property
    def holders(self) -> Mapping[str, tuple[str, int]]:
        """The tensor that each entry of `specs` is in, and how many of its size are before it there."""
        places = self._format.places
        own = {name: (name, 0) for name in self.constants}
        parts = {places.part(name): (places.names[name], places.experts.get(name, 0)) for name in self.outputs.specs}
        return own | parts

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """The files by name. The first has the model's values; those of several say which they are."""
        tables = list(_split(self.table, self.max_shard_size)) if self.max_shard_size else [self.table]
        found = dict[str, Part]()
        for number, (name, table) in enumerate(zip(gguf_names(len(tables)), tables, strict=True)):
            own: dict[str, Value | Short] = dict(self.values) if number == 0 else {}
            if len(tables) > 1:
                own |= {
                    SPLIT_NO: Short(number),
                    SPLIT_COUNT: Short(len(tables)),
                    SPLIT_TENSORS_COUNT: Short(len(self.table), signed=True),
                }
            found[name] = Part(table, *header_bytes(own, table))
        return found

    @property
    def files(self) -> Mapping[str, int]:
        """Bytes of each file, by name."""
        return {name: part.size for name, part in self.parts.items()}

    @property
    def first(self) -> str:
        """The name of the file that programs are given."""
        return next(iter(self.parts))

    def container(self, folder: Path) -> GgufWriter:
        """The writer of the files, for an existing folder without them."""
        return GgufWriter(folder, self)

    def read_back(self, folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
        """Compares every tensor on disk with what was computed.

        Raises:
            QexportError: a tensor is missing, unexpected, stored in another way or in another file, or has other bytes.
        """
        with closing(open_gguf(folder / self.first)) as file:
            problems = [name for name in {**self.table, **file.tensors} if not self._is_planned(name, file)]
            problems += [path.name for path in file.paths if path.name not in self.parts]
            if problems:
                raise QexportError("tensors on disk are not those planned", where=f"{self.first}: {listed(problems)}")
            for name, (holder, number) in self.holders.items():
                rows = file.tensors[holder].rows // self._format.places.stacks.get(holder, 1)
                if sha256_chunks(_pieces(file, holder, number * rows, rows)) != written.digests[name]:
                    raise QexportError(
                        "a tensor's bytes on disk are not those written",
                        where=f"{self.first}: {name}",
                        mend="check the disk, then run again",
                    )

    def _is_planned(self, name: str, file: GgufFile) -> bool:
        planned, found = self.table.get(name), file.tensors.get(name)
        return planned is not None and found is not None and planned == Entry(found.shape, found.kind)


def _split(table: Mapping[str, Entry], most: int) -> Iterator[Mapping[str, Entry]]:
    """The tables of several files. A tensor begins the next one where it would lead over the limit."""
    current, total = dict[str, Entry](), 0
    for name, entry in table.items():
        if current and total + padded(entry.nbytes) > most:
            yield current
            current, total = {}, 0
        current[name] = entry
        total += padded(entry.nbytes)
    yield current


class GgufWriter(PlacedTensors):
    """Writes tensors into files whose headers are known from the plan.

    Args:
        folder: of the files, which do not exist.
        files: what they will hold.
    """

    def __init__(self, folder: Path, files: GgufFiles) -> None:
        self._folder, self._constants, self._parts = folder, files.constants, files.parts
        starts = {
            each: (folder / name, offset) for name, part in self._parts.items() for each, offset in part.offsets.items()
        }
        places = dict[str, tuple[Path, int]]()
        for name, (holder, number) in files.holders.items():
            path, start = starts[holder]
            places[name] = path, start + number * files.specs[name].nbytes
        super().__init__(files.specs, places)

    def finish(self) -> tuple[str, ...]:
        """Writes the constants, the headers, and zeros behind the last tensor of each file.

        Raises:
            QexportError: a planned tensor was not written.
        """
        for name, tensor in self._constants.items():
            if name not in self.written:
                self.write(name, tensor)
        self.refuse_missing()
        for name, part in self._parts.items():
            write_at(self._folder / name, 0, memoryview(part.header))
            os.truncate(self._folder / name, part.size)
        return tuple(self._parts)


def _pieces(file: GgufFile, name: str, first: int, rows: int) -> Iterator[memoryview]:
    step = max(1, _PIECE // file.tensors[name].row_bytes)
    for start in range(first, first + rows, step):
        yield file.read_rows(name, start, min(start + step, first + rows)).reshape(-1).data
