"""Sizes of files, written as in a recipe."""

from __future__ import annotations

import re

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `1.5 GB` or `500MiB` (KB is 1000 bytes, KiB 1024).

    Raises:
        ValueError: it is no such size, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; write for example 5GB or 500MB")
    return size
