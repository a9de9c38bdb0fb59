"""One safetensors file, read tensor by tensor.

The format (https://huggingface.co/docs/safetensors): eight bytes of little-endian header length, a JSON header, then
the tensors without holes. Reading is positional and never maps the file: mapped pages would count as resident memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import torch

from qexport.errors import InputError
from qexport.tensors.source import TensorSpec
from qexport.tensors.strict_files import parse_json

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
"""The dtype names of the format that torch has a type for."""

MAX_HEADER_BYTES: Final = 1 << 25
MAX_TENSORS: Final = 1 << 17
"""Of one file. The largest models have some 200,000 tensors in more than a hundred files."""

_MAX_DIMENSIONS: Final = 64

_LENGTH_BYTES: Final = 8
_CHUNK_BYTES: Final = 1 << 22
_SPLIT: Final = "no model has such a file; if this one is real, save it in more files (max_shard_size)"
_MEND: Final = "fetch or write the file again; it is cut short, damaged, or not a safetensors file"


@dataclass(frozen=True)
class _Entry:
    """A tensor's specification and where its bytes begin, counted from the start of the file."""

    spec: TensorSpec
    offset: int


class SafetensorsFile:
    """An open safetensors file whose header is valid. A `WeightSource`, and a context manager.

    Reading is safe from several threads.

    Attributes:
        path: the file.
        metadata: the header's `__metadata__`.

    Raises:
        InputError: the file cannot be opened, or its header is malformed: a length out of bounds, not JSON, a name that
            appears twice, an unknown dtype, a shape that does not match the size, offsets that overlap, leave a
            hole or leave the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        try:
            header, data_start = _read_header(self._file, path)
            self.metadata: Mapping[str, str] = _pop_metadata(header, path)
            size = os.fstat(self._file.fileno()).st_size
            self._entries = _parse_entries(header, data_start, size, path)
            self._specs = {name: entry.spec for name, entry in self._entries.items()}
        except BaseException:
            self._file.close()
            raise

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's name, shape and dtype, in the order of the bytes."""
        return self._specs

    def offsets(self) -> Mapping[str, int]:
        """Where each tensor's bytes begin, counted from the start of the file."""
        return {name: entry.offset for name, entry in self._entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor in newly allocated memory. Its values are not checked.

        Raises:
            InputError: there is no tensor with this name, or the file has become shorter.
        """
        entry = self._entry(name)
        tensor = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
        if tensor.numel():
            self._read_into(tensor.reshape(-1).view(torch.uint8), entry.offset, name)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most 4 MiB; a piece is valid until the next one is requested.

        Raises:
            InputError: there is no tensor with this name, or the file has become shorter.
        """
        entry = self._entry(name)
        buffer = torch.empty(min(_CHUNK_BYTES, entry.spec.nbytes), dtype=torch.uint8)
        for start in range(0, entry.spec.nbytes, _CHUNK_BYTES):
            piece = buffer[: entry.spec.nbytes - start]
            self._read_into(piece, entry.offset + start, name)
            yield piece.numpy().data

    def close(self) -> None:
        """Closes the file. Nothing can be read afterwards."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise InputError("there is no tensor with this name", where=f"{self.path}: {name}") from None

    def _read_into(self, buffer: torch.Tensor, offset: int, name: str) -> None:
        """Fills a uint8 [n] tensor from `offset`; the kernel may return less than requested at a time."""
        view, done = buffer.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise InputError("the file ends inside this tensor", where=f"{self.path}: {name}", mend=_MEND)
            done += count


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise InputError("the file does not exist", where=str(path))
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), _LENGTH_BYTES, 0), "little")
    if not 2 <= length <= size - _LENGTH_BYTES:
        raise InputError(
            f"the header's length, {length}, does not fit a file of {size} bytes", where=str(path), mend=_MEND
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"the header has {length} bytes; at most {MAX_HEADER_BYTES} are read", where=str(path), mend=_SPLIT
        )
    header = parse_json(os.pread(file.fileno(), length, _LENGTH_BYTES), where=f"{path}: header")
    if not isinstance(header, dict):
        raise InputError("the header must be a JSON object", where=str(path), mend=_MEND)
    if len(header) > MAX_TENSORS:
        raise InputError(
            f"the file has {len(header)} tensors; at most {MAX_TENSORS} are read", where=str(path), mend=_SPLIT
        )
    return header, _LENGTH_BYTES + length


def _pop_metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", where=f"{path}: header", mend=_MEND)
    return metadata


def _parse_entries(header: Mapping[str, Any], data_start: int, size: int, path: Path) -> dict[str, _Entry]:
    """The tensors in the order of their bytes, which must be contiguous up to the end of the file."""
    parsed = [(name, *_parse_entry(value, f"{path}: {name}")) for name, value in header.items()]
    entries: dict[str, _Entry] = {}
    position = 0
    for name, spec, begin, end in sorted(parsed, key=lambda item: item[2:]):
        if begin != position:
            fault = "overlaps another one" if begin < position else "leaves a hole before it"
            raise InputError(f"the tensor at {begin} {fault}", where=f"{path}: {name}", mend=_MEND)
        entries[name] = _Entry(spec, data_start + begin)
        position = end
    if data_start + position != size:
        raise InputError(
            f"the tensors end at byte {data_start + position}, the file at {size}", where=str(path), mend=_MEND
        )
    return entries


def _parse_entry(value: Any, where: str) -> tuple[TensorSpec, int, int]:
    """The specification with its first byte and the byte after its last, counted from the first tensor."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError("an entry consists of dtype, shape and data_offsets", where=where, mend=_MEND)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise InputError(f"the dtype {value['dtype']!r} is not known", where=where)
    if not _are_counts(value["shape"]) or len(value["shape"]) > _MAX_DIMENSIONS:
        raise InputError(
            f"the shape must be a list of whole numbers from 0, at most {_MAX_DIMENSIONS}", where=where, mend=_MEND
        )
    if not _are_counts(value["data_offsets"]) or len(value["data_offsets"]) != 2:
        raise InputError("data_offsets must be two whole numbers from 0", where=where, mend=_MEND)
    spec = TensorSpec(tuple(value["shape"]), dtype)
    begin, end = value["data_offsets"]
    if end - begin != spec.nbytes:
        raise InputError(
            f"shape {list(spec.shape)} of {value['dtype']} takes {spec.nbytes} bytes, not {end - begin}",
            where=where,
            mend=_MEND,
        )
    return spec, begin, end


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0
