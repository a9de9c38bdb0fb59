"""The small files of two sides: JSON key by key, chat templates line by line, all others by their bytes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from qexport.artifact.digests import sha256_file
from qexport.errors import InputError
from qexport.tensors.strict_files import parse_json

_SHOWN: Final = 20
_LONGEST: Final = 120
_TEMPLATE_LINES: Final = 40
_TEMPLATE_LIMIT: Final = 1 << 18
_ABSENT: Final = object()


@dataclass(frozen=True)
class Change:
    """One value that differs. Its texts are JSON, cut after some characters; None where there is no such value.

    Attributes:
        key: the dotted path.
        a: the value in A.
        b: the value in B.
    """

    key: str
    a: str | None
    b: str | None

    def words(self) -> str:
        """The change for the terminal."""
        return f"{self.key}: {'absent' if self.a is None else self.a} -> {'absent' if self.b is None else self.b}"


@dataclass(frozen=True)
class DocumentDifference:
    """One file, or a part of a manifest.

    Attributes:
        name: of the file or part.
        count: how many values or lines differ.
        changes: the first of them.
        note: in words, where there are no single values.
    """

    name: str
    count: int
    changes: tuple[Change, ...] = ()
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The same for the terminal."""
        yield f"{self.name}: {self.note or f'{self.count} values differ'}"
        yield from (f"  {change.words()}" for change in self.changes)
        if self.changes and self.count > len(self.changes):
            yield f"  and {self.count - len(self.changes)} more"


def compare_values(name: str, a: Any, b: Any) -> DocumentDifference | None:
    """Two JSON values, key by key; None if they are equal."""
    changes = list(_changes("", a, b))
    return DocumentDifference(name, len(changes), tuple(changes[:_SHOWN])) if changes else None


def compare_json(
    name: str, a: bytes, b: bytes, *, without: tuple[str | None, str | None] = (None, None)
) -> DocumentDifference | None:
    """Two JSON files, key by key; None if they say the same.

    Args:
        name: the file's.
        a: the content in A.
        b: the content in B.
        without: a key of A and one of B that are compared elsewhere.
    """
    if a == b:
        return None
    try:
        values = [parse_json(content, where=name) for content in (a, b)]
    except InputError as error:
        return DocumentDifference(name, 1, note=f"cannot be compared: {error.what}")
    for value, key in zip(values, without, strict=True):
        if key is not None and isinstance(value, dict):
            value.pop(key, None)
    return compare_values(name, *values)


def compare_text(name: str, a: str | None, b: str | None) -> DocumentDifference | None:
    """Two texts, line by line; None if they are equal."""
    if a == b:
        return None
    if a is None or b is None:
        return DocumentDifference(name, 1, note="only in B" if a is None else "only in A")
    if max(len(a), len(b)) > _TEMPLATE_LIMIT:
        return DocumentDifference(name, 1, note="the texts differ")
    lines = list(difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=0))[2:]
    shown = [line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..." for line in lines[:_TEMPLATE_LINES]]
    return DocumentDifference(name, len(lines), note="\n  ".join(["the texts differ", *shown]))


def compare_bytes(name: str, a: bytes | None, b: bytes | None) -> DocumentDifference | None:
    """Two files of any kind; None if they are equal."""
    if a == b:
        return None
    if a is None or b is None:
        return DocumentDifference(name, 1, note="only in B" if a is None else "only in A")
    return DocumentDifference(name, 1, note=f"the bytes differ ({len(a)} and {len(b)})")


def compare_files(name: str, a: Path | None, b: Path | None) -> DocumentDifference | None:
    """Two files of any size, by length and digest; None if they are equal.

    Raises:
        InputError: one cannot be read.
    """
    if a is None or b is None:
        return DocumentDifference(name, 1, note="only in B" if a is None else "only in A")
    try:
        sizes = a.stat().st_size, b.stat().st_size
        if sizes[0] == sizes[1] and sha256_file(a) == sha256_file(b):
            return None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=f"{a} or {b}") from error
    return DocumentDifference(name, 1, note=f"the bytes differ ({sizes[0]} and {sizes[1]})")


def _changes(key: str, a: Any, b: Any) -> Iterator[Change]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            below = f"{key}.{name}" if key else str(name)
            yield from _changes(below, a.get(name, _ABSENT), b.get(name, _ABSENT))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (ours, theirs) in enumerate(zip(a, b, strict=True)):
            yield from _changes(f"{key}.{index}" if key else str(index), ours, theirs)
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield Change(key, _shown(a), _shown(b))


def _shown(value: Any) -> str | None:
    if value is _ABSENT:
        return None
    if isinstance(value, list | dict) and len(value) > _LONGEST:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
