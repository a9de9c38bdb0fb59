"""A YAML file as a tree of values with line numbers, and what is wrong with its values, each at its place."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

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


_COMBINATION: Final = "combination"

_KINDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "finite_number": "must be a finite number",
}


def problems_of(error: ValidationError, root: YamlNode, model: type[BaseModel]) -> list[Problem]:
    """One problem for each field that is wrong.

    If a field may be of several types, pydantic reports each of them: these become one message, and an error inside a
    list or mapping replaces the errors about the type of the whole.
    """
    messages: dict[Keys, list[str]] = {}
    new_keys = set()
    for details in error.errors(include_url=False):
        for keys, message in _messages(details, root, model):
            if message not in messages.setdefault(keys, []):
                messages[keys].append(message)
            if details["type"] == "extra_forbidden":
                new_keys.add(keys)
    outer = {keys[:depth] for keys in messages for depth in range(len(keys))}
    deepest = [keys for keys in messages if keys not in outer]
    return [_placed(root, keys, _joined(messages[keys]), at_key=keys in new_keys) for keys in deepest]


def combination(problems: Mapping[str, str]) -> PydanticCustomError:
    """What a validator raises if values that are valid separately do not fit together.

    Args:
        problems: messages by the dotted path of the value to change, from the validated value on.
    """
    message = "; ".join(problems.values())
    return PydanticCustomError(_COMBINATION, "{message}", {"message": message, "problems": dict(problems)})


def _messages(details: ErrorDetails, root: YamlNode, model: type[BaseModel]) -> list[tuple[Keys, str]]:
    keys = _keys(details, root)
    if details["type"] == _COMBINATION:
        return [((*keys, *field.split(".")), message) for field, message in details["ctx"]["problems"].items()]
    return [_message(details, keys, root, model)]


def _message(details: ErrorDetails, keys: Keys, root: YamlNode, model: type[BaseModel]) -> tuple[Keys, str]:
    kind, context = details["type"], details.get("ctx", {})
    match kind:
        case "extra_forbidden":
            known = _known_keys(model, keys[:-1], root)
            return keys, f"unknown key{suggestion(str(keys[-1]), known) or '; known keys are ' + ', '.join(known)}"
        case "missing":
            return keys, "missing"
        case "union_tag_not_found":
            return (*keys, _unquoted(context["discriminator"])), "missing"
        case "union_tag_invalid":
            return (*keys, _unquoted(context["discriminator"])), _choice(_or(context["expected_tags"]), context["tag"])
        case "literal_error":
            return keys, _choice(context["expected"], details["input"])
        case "value_error":
            return keys, str(context["error"])
        case _:
            return keys, _wrong_value(kind, details)


def _keys(details: ErrorDetails, root: YamlNode) -> Keys:
    """The error's path without the names of union members, which pydantic puts between the keys."""
    keys: Keys = ()
    names = details["loc"]
    for position, name in enumerate(names):
        is_missing = details["type"] == "missing" and position == len(names) - 1
        if is_missing or entry_at(root, (*keys, name)):
            keys = (*keys, name)
    return keys


def _wrong_value(kind: str, details: ErrorDetails) -> str:
    value = details["input"]
    message = _KINDS.get(kind) or re.sub(r"^(Input|List) should", "must", details["msg"])
    if isinstance(value, dict | list):
        return message if "not" in message else f"{message}, not a {'list' if isinstance(value, list) else 'mapping'}"
    hint = " (put it in quotes)" if kind == "string_type" and value is not None else ""
    return f"{message}, not {_shown(value)}{hint}"


def _choice(expected: str, value: Any) -> str:
    options = re.findall(r"'([^']*)'", expected)
    what = expected if isinstance(value, dict | list) else f"{expected}, not {_shown(value)}"
    return f"must be {what}{suggestion(str(value), options) if isinstance(value, str) else ''}"


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def suggestion(word: str, known: list[str]) -> str:
    """`; did you mean ...?` if a known word is similar, else empty."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _joined(messages: list[str]) -> str:
    """`must be text, not 5` and `must be a list, not 5` as one message."""
    heads = [message.split(", not ")[0] for message in messages]
    return " or ".join([heads[0], *(h.removeprefix("must be ") for h in heads[1:])]) + messages[-1][len(heads[-1]) :]


def _known_keys(model: type[BaseModel], keys: Keys, root: YamlNode) -> list[str]:
    """The fields of the settings at a path; of a union, those of the member that the file chose."""
    models = [model]
    for depth, key in enumerate(keys, start=1):
        if not any(key in m.model_fields for m in models):  # the index of a list, or the key of a mapping of any keys
            models = [m for m in models if _is_chosen(m, keys[:depth], root)] or models
            continue
        annotations = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        found = [m for annotation in annotations for m in _models(annotation)]
        models = [m for m in found if _is_chosen(m, keys[:depth], root)] or found
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _is_chosen(model: type[BaseModel], keys: Keys, root: YamlNode) -> bool:
    """Whether the discriminators at this path (method, layout) are this model's."""
    tags = {name: get_args(field.annotation) for name, field in model.model_fields.items()}
    tags = {name: options for name, options in tags.items() if len(options) == 1 and isinstance(options[0], str)}
    entries = {name: entry_at(root, (*keys, name)) for name in tags}
    return all(entry is None or entry.node.value in tags[name] for name, entry in entries.items())


def _placed(root: YamlNode, keys: Keys, message: str, *, at_key: bool) -> Problem:
    """The problem at the line of the value, or of the key for mappings, lists, null and missing values."""
    depth = len(keys)
    while (entry := entry_at(root, keys[:depth])) is None:
        depth -= 1
    node = entry.node
    is_plain = not isinstance(node.value, Mapping | tuple | None)
    line = node.line if is_plain and not at_key else entry.line
    return Problem(node.origin, line, dotted(keys), message)


def _or(listed: str) -> str:
    return " or ".join(listed.rsplit(", ", 1))


def _unquoted(text: str) -> str:
    return text.strip("'")
