"""Reading untrusted files: paths that must stay inside their folder, and JSON without duplicate keys."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Final

from qexport.errors import InputError

CONFIG_BYTES: Final = 1 << 22
"""The largest JSON file of a model that is neither a tokenizer's nor an index."""

_MEND: Final = "put the files themselves into the model's folder; name a model of the hub's cache by its hub id"


def contained_path(folder: Path, name: str, *, root: Path | None = None) -> Path:
    """The path of `name` in `folder`. The file need not exist.

    Args:
        folder: the model's folder.
        name: a relative path with forward slashes, as the model writes it.
        root: where symbolic links may lead; the folder itself if None.

    Raises:
        InputError: the name is absolute or contains `..`, the system accepts no such name, or a symbolic link leads out
            of `root`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise InputError(f"the name {name!r} leaves the model's folder", where=str(folder), mend=_MEND)
    path = folder / name
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"there can be no file of this name: {error}", where=str(folder), mend=_MEND) from error
    try:
        inside = path.resolve().is_relative_to((root or folder).resolve())
    except (OSError, RuntimeError) as error:
        raise InputError(f"a symbolic link cannot be followed: {error}", where=str(path), mend=_MEND) from error
    if not inside:
        raise InputError("a symbolic link leads out of the model's folder", where=str(path), mend=_MEND)
    return path


def parse_json(content: bytes, *, where: str) -> Any:
    """The value of a JSON document.

    Raises:
        InputError: not UTF-8, not JSON, nested too deeply, an object that has a key twice, or a text with a lone
            surrogate, half a character that cannot be written as UTF-8.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if _SURROGATE.search(content):
            _refuse_surrogates(value)
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=where, mend="fetch or write the file again") from error


def read_json_object(path: Path, *, limit: int) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: a regular file.
        limit: the largest size accepted, in bytes.

    Raises:
        InputError: the file cannot be read, is larger than `limit`, is not valid JSON, or holds no object.
    """
    try:
        content = read_bounded(path, limit)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    value = parse_json(content, where=str(path))
    if not isinstance(value, dict):
        raise InputError(f"must hold a JSON object, not {type(value).__name__}", where=str(path))
    return value


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a character (a lone surrogate) in a text") from error


_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file.

    Raises:
        InputError: it is larger than `limit` bytes.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"the file has more than {limit} bytes", where=str(path), mend="fetch the file again")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} appears twice")
    return result
