"""JSON lines: one object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qexport.errors import InputError
from qexport.tensors.strict_json import parse_json


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each object with its place, `file:line`, for errors. Blank lines are passed over.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8, not JSON, or no object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse_object(line, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    value = parse_json(line.removeprefix(b"\xef\xbb\xbf"), where=where)
    if not isinstance(value, dict):
        raise InputError(f"each line must hold a JSON object, not {type(value).__name__}", where=where)
    return value
