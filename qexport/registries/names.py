"""Names of files that every place can hold, and that stay inside a folder wherever they are written."""

from __future__ import annotations

from typing import Final

DEEPEST: Final = 12
"""Folders on the way to a file, the outermost included."""

_LONGEST_PART: Final = 255


def is_portable(name: str) -> bool:
    """Whether a path with forward slashes leads to something inside a folder, on every system and in every archive."""
    parts = name.split("/")
    return (
        len(parts) <= DEEPEST
        and all(part not in ("", ".", "..") and _length(part) <= _LONGEST_PART for part in parts)
        and "\\" not in name
        and name.isprintable()
    )


def _length(part: str) -> int:
    """Bytes of a name in UTF-8; more than any name may have for one that is no text."""
    try:
        return len(part.encode("utf-8"))
    except UnicodeEncodeError:
        return _LONGEST_PART + 1
