"""The journal of a run: what is finished and durable, as records in a file that only grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.artifact.digests import sha256_bytes
from qexport.artifact.disk import sync
from qexport.errors import RecipeError, listed

FORM: Final = 1
"""Of the records. A journal of another form is refused."""

_CHECKED: Final = 16
"""Hex digits of a record's digest."""


@dataclass(frozen=True)
class Entry:
    """One record.

    Attributes:
        kind: what it says.
        content: JSON values.
    """

    kind: str
    content: Mapping[str, Any]


class Journal:
    """Records in the order in which they were made, each on a line with its digest. The first is the run's identity.

    A kill may tear the last record; it and what follows a damaged one are ignored, and overwritten by the next record.

    Args:
        path: an existing file. An empty one is a journal without records.

    Attributes:
        entries: the records.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries, self._end = _read(path)

    def of_kind(self, kind: str, *, since: str | None = None) -> list[Mapping[str, Any]]:
        """The contents of the records of one kind, in their order.

        Args:
            kind: of the records.
            since: of another kind, after whose last record they are; all, if there is none of it.
        """
        kinds = [entry.kind for entry in self.entries]
        first = len(kinds) - kinds[::-1].index(since) if since in kinds else 0
        return [entry.content for entry in self.entries[first:] if entry.kind == kind]

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Adds a record; it is durable when the call returns.

        Raises:
            OSError: the disk is full or failed; the record is not in the journal.
        """
        line = _line(kind, content)
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(descriptor, line[written:], self._end + written)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._end += len(line)
        self.entries.append(Entry(kind, content))

    def clear(self) -> None:
        """Removes all records."""
        self.entries, self._end = [], 0
        os.truncate(self._path, 0)
        sync(self._path)


def refuse_other_run(found: Mapping[str, Any], own: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with what another run has begun.

    Args:
        found: the identity in the journal.
        own: that of this run.
        where: the folder, for the error.

    Raises:
        RecipeError: they differ; the error names each value that does.
    """
    before, now = _flat(found), _flat(own)
    differing = [
        f"{name}: was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise other_run(differing, where)


def other_run(differing: list[str], where: Path) -> RecipeError:
    """The error that says what differs from the run that was interrupted."""
    return RecipeError(
        "an interrupted run has left its work here, and this run differs from it",
        where=f"{where}: {listed(differing)}",
        mend="undo the change and run again to go on, or begin again with --restart",
    )


def _read(path: Path) -> tuple[list[Entry], int]:
    """The records before the first damaged one, and where they end."""
    entries, end = list[Entry](), 0
    for line in path.read_bytes().splitlines(keepends=True):
        digest, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or digest.decode("latin-1") != sha256_bytes(text)[:_CHECKED]:
            break
        kind, content = json.loads(text)
        entries.append(Entry(kind, content))
        end += len(line)
    return entries, end


def _line(kind: str, content: Mapping[str, Any]) -> bytes:
    text = json.dumps([kind, content], separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    return sha256_bytes(text)[:_CHECKED].encode("ascii") + b" " + text


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested mappings and lists by their dotted names."""
    if isinstance(value, Mapping) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = dict(enumerate(value)).items()
    else:
        return {name: value}
    return {key: each for part, inner in parts for key, each in _flat(inner, f"{name}.{part}".strip(".")).items()}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:12]}..."
