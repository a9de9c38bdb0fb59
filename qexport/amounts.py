"""Amounts as people read them: bytes, time, counts."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ((9, "GB"), (6, "MB"), (3, "kB"))


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


def counted(count: int, noun: str) -> str:
    """`1 layer`, `210 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
