"""One GGUF file: its metadata, its table of tensors, and their bytes.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` makes several
numpy arrays for every token of the vocabulary (150 MB and 3 s for 49,152 tokens) and maps the file; this reader skips
arrays until one is asked for, and reads by position.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qexport.errors import InputError

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct codes by the format's value types."""

_STRING, _ARRAY = 8, 9
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
_LONGEST_STRING: Final = 1 << 26
_MOST_STRINGS: Final = 1 << 22
"""In one array. Each is skipped on its own, and of a file of which only the head was fetched the rest is zeros, that is
empty strings, as many as fit into whatever size its host names."""

_MEND: Final = "fetch the file again; it is cut short, damaged, or not a GGUF file"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in the file.

    Attributes:
        shape: in torch's order, slowest dimension first.
        kind: how the values are stored.
        offset: the first byte, counted from the start of the file.
        row_bytes: the bytes of one row, that is of the last dimension.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return self.rows * self.row_bytes


class GgufFile:
    """An open GGUF file whose header is valid.

    Attributes:
        path: the file.
        paths: of all files of the model; here the one.
        metadata: the values that are numbers, booleans or strings, by key.
        array_lengths: the number of entries of each value that is an array.
        tensors: the tensors by name, in the order of the table.
        header_bytes: of the header, without what aligns the tensors.

    Raises:
        InputError: the file cannot be read, is not little-endian GGUF of version 2 or 3, has a name twice, or a
            tensor is outside the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths: tuple[Path, ...] = (path,)
        if path.exists() and not path.is_file():  # opening a FIFO waits for a writer
            raise InputError("not a regular file", where=str(path))
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
        try:
            header = _Header(self._file)
            self.metadata: Mapping[str, bool | int | float | str] = header.metadata
            self.array_lengths: Mapping[str, int] = header.array_lengths
            self._arrays: Mapping[str, int] = header.array_places
            self.tensors: Mapping[str, GgufTensor] = header.tensors
            self.header_bytes = header.end
        except (ValueError, struct.error) as error:
            self._file.close()
            raise InputError(f"not a valid GGUF file: {error}", where=str(path), mend=_MEND) from error

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The stored bytes of a tensor's rows `start` to `stop`: uint8 [rows, row_bytes].

        Raises:
            InputError: the file has become shorter.
        """
        tensor = self.tensors[name]
        rows = np.empty((stop - start, tensor.row_bytes), dtype=np.uint8)
        view, offset, done = rows.reshape(-1).data, tensor.offset + start * tensor.row_bytes, 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise InputError("the file ends inside this tensor", where=f"{self.path}: {name}", mend=_MEND)
            done += count
        return rows

    def array(self, key: str) -> list[bool | int | float | str]:
        """The entries of a value that is an array.

        Raises:
            KeyError: there is no such array.
            InputError: an entry is no text.
        """
        self._file.seek(self._arrays[key])
        try:
            return _Values(self._file).array()
        except (ValueError, struct.error) as error:
            raise InputError(f"not a valid GGUF file: {error}", where=f"{self.path}: {key}", mend=_MEND) from error

    def close(self) -> None:
        """Closes the file. Nothing can be read afterwards."""
        self._file.close()


class _Values:
    """Reads values one after the other; any fault is a ValueError or a struct.error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def array(self) -> list[bool | int | float | str]:
        """The entries of an array, whose kind and length come first."""
        kind, count = self._integer("I"), self._count()
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        code = self._scalar(kind)
        content = self._file.read(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", content))

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise ValueError("the file ends inside the header")
        self._file.seek(count, os.SEEK_CUR)

    def _scalar(self, kind: int) -> str:
        code = _SCALARS.get(kind)
        if code is None:
            raise ValueError(f"value type {kind} is not known")
        return code

    def _number(self, code: str) -> int | float | bool:
        """One little-endian value; the end of the file raises a struct.error."""
        size = struct.calcsize(f"<{code}")
        value: int | float | bool = struct.unpack(f"<{code}", self._file.read(size))[0]
        return value

    def _integer(self, code: str) -> int:
        return int(self._number(code))

    def _count(self) -> int:
        """A 64-bit count of things that take at least a byte each."""
        count = self._integer("Q")
        if count > self._size:
            raise ValueError(f"a count of {count} is more than the file can hold")
        return count

    def _string(self) -> str:
        length = self._count()
        if length > _LONGEST_STRING:
            raise ValueError(f"a text of {length} bytes is longer than {_LONGEST_STRING}")
        content = self._file.read(length)
        if len(content) < length:
            raise ValueError("the file ends inside the header")
        return content.decode("utf-8")


class _Header(_Values):
    """Reads the header from front to back; any fault is a ValueError."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        if file.read(4) != b"GGUF":
            raise ValueError("the first bytes are not GGUF")
        version = self._integer("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} or byte order is not supported")
        tensor_count, value_count = self._count(), self._count()
        self.metadata: dict[str, bool | int | float | str] = {}
        self.array_lengths: dict[str, int] = {}
        self.array_places: dict[str, int] = {}
        for _ in range(value_count):
            self._read_value()
        self.tensors = self._read_tensors(tensor_count)

    def _read_value(self) -> None:
        key, kind = self._string(), self._integer("I")
        if key in self.metadata or key in self.array_lengths:
            raise ValueError(f"the key {key!r} appears twice")
        if kind == _ARRAY:
            self.array_places[key] = self._file.tell()
            self.array_lengths[key] = self._skip_array()
        elif kind == _STRING:
            self.metadata[key] = self._string()
        else:
            self.metadata[key] = self._number(self._scalar(kind))

    def _read_tensors(self, count: int) -> dict[str, GgufTensor]:
        table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(count):
            name, dimensions = self._string(), self._integer("I")
            if name in table:
                raise ValueError(f"the tensor {name!r} appears twice")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise ValueError(f"the tensor {name!r} has {dimensions} dimensions")
            sizes = [self._integer("Q") for _ in range(dimensions)]
            table[name] = (tuple(reversed(sizes)), GGMLQuantizationType(self._integer("I")), self._integer("Q"))
        self.end = self._file.tell()
        return self._place(table, self._data_start())

    def _data_start(self) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0:
            raise ValueError(f"the alignment {alignment!r} is not possible")
        return -(-self._file.tell() // alignment) * alignment

    def _place(
        self, table: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType, int]], start: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for name, (shape, kind, offset) in table.items():
            if 0 in shape:  # no bytes are outside the file then, however many rows there are
                raise ValueError(f"the tensor {name!r} has no values")
            block, size = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(f"rows of {shape[-1]} in {name!r} do not divide into blocks of {block}")
            tensor = GgufTensor(shape, kind, start + offset, shape[-1] // block * size)
            if tensor.offset + tensor.nbytes > self._size:
                raise ValueError(f"the tensor {name!r} is outside the file")
            tensors[name] = tensor
        _refuse_overlaps(tensors)
        return tensors

    def _skip_array(self) -> int:
        """Skips an array and returns its length."""
        kind, count = self._integer("I"), self._count()
        if kind == _STRING:
            if count > _MOST_STRINGS:
                raise ValueError(f"an array of {count} texts; at most {_MOST_STRINGS} are read")
            for _ in range(count):
                self._skip(self._count())
        else:
            self._skip(count * struct.calcsize(self._scalar(kind)))
        return count


def _refuse_overlaps(tensors: Mapping[str, GgufTensor]) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ValueError(f"the tensor {name!r} overlaps another one")
        end = tensor.offset + tensor.nbytes
