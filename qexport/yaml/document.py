"""A YAML file as a tree of values, each with its line and the folder of its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool | None
Keys = tuple[str | int, ...]
"""The path from the root to a value: keys of mappings and indexes of lists."""


@dataclass(frozen=True)
class YamlOrigin:
    """Where a value was written.

    Attributes:
        label: the file's name as the user gave it, or `command line`.
        folder: the absolute folder that relative paths start from.
    """

    label: str
    folder: Path


@dataclass(frozen=True)
class YamlNode:
    """A value with its place.

    Attributes:
        value: a scalar, a mapping of entries or a list of nodes. Aliases share their node.
        origin: where it was written.
        line: counted from 1; None on the command line.
    """

    value: Scalar | Mapping[str, YamlEntry] | tuple[YamlNode, ...]
    origin: YamlOrigin
    line: int | None


@dataclass(frozen=True)
class YamlEntry:
    """A value under a key of a mapping; `line` is the key's."""

    node: YamlNode
    line: int | None


@dataclass(frozen=True)
class Problem:
    """Something wrong in a file or on the command line, at its place."""

    origin: YamlOrigin
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        place = self.origin.label if self.line is None else f"{self.origin.label}:{self.line}"
        return ": ".join(part for part in (place, self.field, self.message) if part)


def dotted(keys: Iterable[str | int]) -> str:
    """The path as it is written in messages and overrides, for example `export.0.layout`."""
    return ".".join(map(str, keys))


def child(node: YamlNode, key: str | int) -> YamlEntry | None:
    """The entry below a mapping's key or a list's index, or None if it does not exist."""
    if isinstance(node.value, Mapping):
        return node.value.get(str(key))
    if isinstance(node.value, tuple) and isinstance(key, int) and 0 <= key < len(node.value):
        item = node.value[key]
        return YamlEntry(item, item.line)
    return None


def entry_at(root: YamlNode, keys: Keys) -> YamlEntry | None:
    """The entry at the end of a path, or None if the path ends earlier."""
    entry: YamlEntry | None = YamlEntry(root, root.line)
    for key in keys:
        entry = child(entry.node, key) if entry else None
    return entry


def replaced(root: YamlNode, keys: Keys, new: YamlNode) -> YamlNode:
    """The tree with one value replaced, or added to a mapping. Nodes on the way are copied, all others shared."""
    if not keys:
        return new
    key, rest = keys[0], keys[1:]
    below = child(root, key)
    value = replaced(below.node if below else YamlNode({}, new.origin, new.line), rest, new)
    if isinstance(root.value, Mapping):
        line = new.line if not below or not rest else below.line
        return YamlNode({**root.value, str(key): YamlEntry(value, line)}, root.origin, root.line)
    if isinstance(root.value, tuple) and below is not None and isinstance(key, int):
        return YamlNode((*root.value[:key], value, *root.value[key + 1 :]), root.origin, root.line)
    raise KeyError(key)


def plain(node: YamlNode, known: dict[int, Any] | None = None) -> Any:
    """The tree as dicts, lists and scalars. Values that aliases share stay shared, so that the tree cannot grow."""
    known = {} if known is None else known
    if id(node) not in known:
        if isinstance(node.value, Mapping):
            known[id(node)] = {key: plain(entry.node, known) for key, entry in node.value.items()}
        elif isinstance(node.value, tuple):
            known[id(node)] = [plain(item, known) for item in node.value]
        else:
            known[id(node)] = node.value
    return known[id(node)]
