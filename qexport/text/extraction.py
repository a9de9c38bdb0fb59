"""JSON and code in a model's answer, found as its users would: in a fenced block, or where the first value begins."""

from __future__ import annotations

import ast
import json
import re
import warnings
from itertools import islice
from typing import Any, Final

_LONGEST: Final = 1 << 16
"""Characters of an answer that are looked at: parsers take time and memory in proportion."""

_MOST_TRIES: Final = 1000
"""Places at which a JSON value may begin: each try may read to the end of the text."""

_FENCE: Final = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_BEGINNING: Final = re.compile(r"[{\[]")


def first_json(text: str) -> Any:
    """The whole text if it is JSON; else the first fenced block, if there is one; else the first complete object or
    list in the text.

    Raises:
        ValueError: there is none; the message says so.
    """
    text = text[:_LONGEST].strip()
    try:
        return _loads(text)
    except ValueError:
        pass
    if block := _FENCE.search(text):
        try:
            return _loads(block[1])
        except ValueError as error:
            raise ValueError(f"the fenced block is no JSON: {error}") from error
    for beginning in islice(_BEGINNING.finditer(text), _MOST_TRIES):
        try:
            value, _ = _DECODER.raw_decode(text, beginning.start())
        except (ValueError, RecursionError):
            continue
        return value
    raise ValueError("there is no complete JSON value")


def python_problem(text: str) -> str | None:
    """Why an answer holds no Python code that parses; None if it does. Nothing is run.

    The code is the first fenced block, or the whole text if there is none. A text that is only names and constants
    parses too, as every word does; it is no code.
    """
    text = text[:_LONGEST]
    block = _FENCE.search(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that will be errors one day
            module = ast.parse(block[1] if block else text.strip())
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}" if error.lineno else str(error)
    except (ValueError, MemoryError, RecursionError) as error:
        return f"it cannot be parsed: {str(error) or 'nested too deeply'}"
    return None if any(map(_does_something, module.body)) else "there is no code"


def _does_something(statement: ast.stmt) -> bool:
    return not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call | ast.Await | ast.Yield)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_constant)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
