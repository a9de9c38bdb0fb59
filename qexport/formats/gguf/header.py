"""The beginning of a GGUF file, written: its values, and the table of its tensors.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's writer wants
all tensors before it writes the first one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qexport.formats.gguf import Entry

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""Integers are stored as uint32, inside arrays as int32; floats as float32."""


@dataclass(frozen=True)
class Short:
    """An integer of another type than uint32.

    Attributes:
        value: the integer.
        signed: whether it is an int32; else a uint16.
    """

    value: int
    signed: bool = False


ALIGNMENT: Final = 32
"""Of every tensor, in bytes."""

_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
_UINT16, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9


def padded(count: int) -> int:
    """The next multiple of the alignment."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def header_bytes(values: Mapping[str, Value | Short], table: Mapping[str, Entry]) -> tuple[bytes, dict[str, int]]:
    """A file's bytes up to its first tensor, and each tensor's offset in the file.

    Args:
        values: by key, in the order of the file.
        table: the tensors by name, in the order of the file.
    """
    content = [_MAGIC, struct.pack("<IQQ", _VERSION, len(table), len(values))]
    for key, value in values.items():
        content += [_string(key), _value(value)]
    offsets, end = dict[str, int](), 0
    for name, entry in table.items():
        offsets[name], end = end, end + padded(entry.nbytes)
        sizes = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        content += [_string(name), sizes, struct.pack("<IQ", entry.kind, offsets[name])]
    header = b"".join(content)
    start = padded(len(header))
    return header.ljust(start, b"\0"), {name: start + offset for name, offset in offsets.items()}


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value | Short) -> bytes:
    """The kind, then the value."""
    match value:
        case Short():
            code, kind = ("i", _INT32) if value.signed else ("H", _UINT16)
            return struct.pack(f"<I{code}", kind, value.value)
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
    texts = [each for each in value if isinstance(each, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))
    if any(isinstance(each, float) for each in value):
        return struct.pack(f"<IIQ{len(value)}f", _ARRAY, _FLOAT32, len(value), *value)
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
