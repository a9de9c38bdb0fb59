"""Amounts as people read them: bytes, times, counts."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

_UNITS: Final = ((9, "GB"), (6, "MB"), (3, "kB"))
_WRITTEN: Final = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_SIZE: Final = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_WRITTEN)})", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `1.5 GB` or `500MiB` (KB is 1000 bytes, KiB 1024).

    Raises:
        ValueError: it is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _WRITTEN[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return size


def checked_size(text: str) -> str:
    """The text itself, if `parse_size` accepts it."""
    parse_size(text)
    return text


def size(count: float, *, decimals: int | None = None) -> str:
    """Bytes in powers of ten: `98 MB`, `1.3 GB`.

    Args:
        count: the number of bytes.
        decimals: how many, for sizes shown next to each other; if None, one below 10 and none above.
    """
    for exponent, unit in _UNITS:
        if count >= 10**exponent:
            value = count / 10**exponent
            shown = (0 if value >= 10 else 1) if decimals is None else decimals
            return f"{value:.{shown}f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """`0:42`, `12:05` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def moment(when: datetime) -> str:
    """`2026-11-29 06:12 UTC`."""
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def counted(count: int, noun: str) -> str:
    """`1 layer`, `210 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
