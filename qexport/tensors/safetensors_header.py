"""The header of a safetensors file: which tensors it holds, of which dtype and shape, and where. Needs no torch.

The format (https://huggingface.co/docs/safetensors): eight bytes of little-endian header length, a JSON header, then
the tensors without holes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from qexport.errors import InputError
from qexport.tensors.strict_files import parse_json

DTYPE_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of a value, by the dtype names of the format. Not all of them can be read: torch has no type for some."""

MAX_HEADER_BYTES: Final = 1 << 25
MAX_TENSORS: Final = 1 << 17
"""Of one file. The largest models have some 200,000 tensors in more than a hundred files."""

_MAX_DIMENSIONS: Final = 64

LENGTH_BYTES: Final = 8
"""Of the length that a file begins with."""

_SPLIT: Final = "no model has such a file; if this one is real, save it in more files (max_shard_size)"
MEND: Final = "fetch or write the file again; it is cut short, damaged, or not a safetensors file"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: the format's name for it, a key of `DTYPE_BITS`.
        shape: of the tensor.
        offset: where its bytes begin, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes; values of a valid header fill whole ones."""
        return -(-prod(self.shape) * DTYPE_BITS[self.dtype] // 8)


@dataclass(frozen=True)
class Header:
    """A valid header.

    Attributes:
        metadata: its `__metadata__`.
        entries: the tensors by name, in the order of their bytes.
    """

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]


def open_file(path: Path) -> BinaryIO:
    """The file, for positional reading.

    Raises:
        InputError: it cannot be opened.
    """
    if not path.is_file():
        raise InputError("the file does not exist", where=str(path))
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def read_header(file: BinaryIO, path: Path) -> Header:
    """The header of an open file.

    Raises:
        InputError: it is malformed: a length out of bounds, not JSON, a name that appears twice, an unknown dtype, a
            shape that does not match the size, offsets that overlap, leave a hole or leave the file.
    """
    content, data_start = _parsed_header(file, path)
    metadata = _pop_metadata(content, path)
    return Header(metadata, _parse_entries(content, data_start, os.fstat(file.fileno()).st_size, path))


def _parsed_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), LENGTH_BYTES, 0), "little")
    if not 2 <= length <= size - LENGTH_BYTES:
        raise InputError(
            f"the header's length, {length}, does not fit a file of {size} bytes", where=str(path), mend=MEND
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"the header has {length} bytes; at most {MAX_HEADER_BYTES} are read", where=str(path), mend=_SPLIT
        )
    header = parse_json(os.pread(file.fileno(), length, LENGTH_BYTES), where=f"{path}: header")
    if not isinstance(header, dict):
        raise InputError("the header must be a JSON object", where=str(path), mend=MEND)
    if len(header) > MAX_TENSORS:
        raise InputError(
            f"the file has {len(header)} tensors; at most {MAX_TENSORS} are read", where=str(path), mend=_SPLIT
        )
    return header, LENGTH_BYTES + length


def _pop_metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", where=f"{path}: header", mend=MEND)
    return metadata


def _parse_entries(header: Mapping[str, Any], data_start: int, size: int, path: Path) -> dict[str, Entry]:
    """The tensors in the order of their bytes, which must be contiguous up to the end of the file."""
    parsed = [(name, *_parse_entry(value, f"{path}: {name}")) for name, value in header.items()]
    entries: dict[str, Entry] = {}
    position = 0
    for name, entry, begin, end in sorted(parsed, key=lambda item: item[2:]):
        if begin != position:
            fault = "overlaps another one" if begin < position else "leaves a hole before it"
            raise InputError(f"the tensor at {begin} {fault}", where=f"{path}: {name}", mend=MEND)
        entries[name] = replace(entry, offset=data_start + begin)
        position = end
    if data_start + position != size:
        raise InputError(
            f"the tensors end at byte {data_start + position}, the file at {size}", where=str(path), mend=MEND
        )
    return entries


def _parse_entry(value: Any, where: str) -> tuple[Entry, int, int]:
    """The tensor with its first byte and the byte after its last, counted from the first tensor."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError("an entry consists of dtype, shape and data_offsets", where=where, mend=MEND)
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPE_BITS:
        raise InputError(f"the dtype {value['dtype']!r} is not known", where=where)
    if not _are_counts(value["shape"]) or len(value["shape"]) > _MAX_DIMENSIONS:
        raise InputError(
            f"the shape must be a list of whole numbers from 0, at most {_MAX_DIMENSIONS}", where=where, mend=MEND
        )
    if not _are_counts(value["data_offsets"]) or len(value["data_offsets"]) != 2:
        raise InputError("data_offsets must be two whole numbers from 0", where=where, mend=MEND)
    begin, end = value["data_offsets"]
    entry = Entry(value["dtype"], tuple(value["shape"]), begin)
    if prod(entry.shape) * DTYPE_BITS[entry.dtype] % 8:
        raise InputError(f"shape {list(entry.shape)} of {entry.dtype} ends inside a byte", where=where, mend=MEND)
    if end - begin != entry.nbytes:
        raise InputError(
            f"shape {list(entry.shape)} of {entry.dtype} takes {entry.nbytes} bytes, not {end - begin}",
            where=where,
            mend=MEND,
        )
    return entry, begin, end


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0
