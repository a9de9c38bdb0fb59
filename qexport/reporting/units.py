"""Numbers as people read them, and texts that must not be longer than their place."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes in powers of ten: `98 MB`, `1.3 GB`."""
    for exponent, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**exponent:
            value = count / 10**exponent
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """`0:42`, `12:05` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, noun: str) -> str:
    """`1 layer`, `210 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def cut(text: str, length: int) -> str:
    """The text, or its first characters and an ellipsis: at most `length` characters together."""
    return text if len(text) <= length else text[: length - 1] + "…"
