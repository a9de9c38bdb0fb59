"""Reading untrusted files: paths that must stay inside their folder, and JSON without duplicate keys."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from qexport.errors import InputError

_MEND = "put the files themselves into the model's folder; name a model of the hub's cache by its hub id"


def contained_path(folder: Path, name: str, *, root: Path | None = None) -> Path:
    """The path of `name` in `folder`. The file need not exist.

    Args:
        folder: the model's folder.
        name: a relative path with forward slashes, as the model writes it.
        root: where symbolic links may lead; the folder itself if None.

    Raises:
        InputError: the name is absolute or contains `..`, or a symbolic link leads out of `root`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise InputError(f"the name {name!r} leaves the model's folder", where=str(folder), mend=_MEND)
    path = folder / name
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
        InputError: not UTF-8, not JSON, nested too deeply, or an object that has a key twice.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
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
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"the file has {size} bytes; at most {limit} are read", where=str(path))
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    value = parse_json(content, where=str(path))
    if not isinstance(value, dict):
        raise InputError(f"must hold a JSON object, not {type(value).__name__}", where=str(path))
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result
