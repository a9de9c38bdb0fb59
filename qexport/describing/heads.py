"""Files of weights of which only the header is fetched: as long as the whole, with a hole for the tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qexport.errors import InputError
from qexport.tensors.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES

_FIRST: Final = 1 << 17
_FIRST_OF_GGUF: Final = 1 << 20
_MOST_OF_GGUF: Final = 1 << 28
"""A header of GGUF has the whole tokenizer, and does not say how long it is."""


def write_head(path: Path, size: int, read: Callable[[int, int], bytes]) -> None:
    """Writes a file with the header of one that lies elsewhere. Whether it is valid, whoever reads it will find.

    Args:
        path: must not exist; its folder does. Of files that are neither safetensors nor GGUF only the size counts.
        size: of the whole file in bytes.
        read: gives its bytes from one offset to another, which is at most the size.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("xb"):
        os.truncate(path, size)
    if path.suffix == ".safetensors":
        first = read(0, min(_FIRST, size))
        length = LENGTH_BYTES + min(int.from_bytes(first[:LENGTH_BYTES], "little"), MAX_HEADER_BYTES)
        _put(path, 0, first[:length])
        if len(first) < min(length, size):
            _put(path, len(first), read(len(first), min(length, size)))
    elif path.suffix == ".gguf":
        _write_head_of_gguf(path, size, read)


def _write_head_of_gguf(path: Path, size: int, read: Callable[[int, int], bytes]) -> None:
    there, wanted = 0, min(_FIRST_OF_GGUF, size)
    while there < wanted:
        _put(path, there, read(there, wanted))
        there, wanted = wanted, min(4 * wanted, size, _MOST_OF_GGUF)
        if _has_header(path, there):
            return


def _has_header(path: Path, there: int) -> bool:
    """Whether the header is within the bytes that are there; behind them are zeros, which may look like values."""
    from qexport.tensors.gguf_file import GgufFile  # imports numpy

    try:
        file = GgufFile(path)
    except InputError:
        return False
    file.close()
    return file.header_bytes <= there


def _put(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
