"""JSON from files that others wrote: no duplicate keys, no surprises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qexport.errors import InputError


def parse_json(content: bytes, *, where: str) -> Any:
    """The value of a JSON document.

    Raises:
        InputError: not UTF-8, not JSON, nested too deeply, or an object that has a key twice.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=where, mend="fetch or write the file anew") from error


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
            raise InputError(f"{size} bytes are too many for this file; at most {limit} are read", where=str(path))
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
            raise ValueError(f"the key {key!r} stands there twice")
        result[key] = value
    return result
