"""Which modules the patterns of a `quantization_config` name. They come from a file: none may be made to hang."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from qexport.errors import InputError

_REPETITION: Final = re.compile(r"(?<!\\)[*+?{]")
_ANYTHING: Final = re.compile(r"\.\*")
_TO_A_BOUNDARY: Final = r"(?:{})(?:(?<=\.)|(?=\.|$))"


def compiled(pattern: str, where: str, *, template: str = "{}") -> re.Pattern[str]:
    """A regular expression that repeats nothing but any character (`.*`), and that at most twice.

    Args:
        pattern: from a file.
        where: its place, for the errors.
        template: an expression around it.

    Raises:
        InputError: it repeats something else, which could be made to take forever, or is no regular expression.
    """
    if _REPETITION.search(_ANYTHING.sub("", pattern)) or len(_ANYTHING.findall(pattern)) > 2:
        raise InputError(
            "a pattern that repeats (* + ? {) is not read", where=where, mend="name the modules themselves"
        )
    try:
        return re.compile(template.replace("{}", pattern))
    except re.error as error:
        raise InputError(f"not a regular expression: {error}", where=where) from error


def strings(value: Any, where: str) -> list[str]:
    """A list of strings.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError("must be a list of strings", where=where)
    return value


class SkipList:
    """Modules that stay unquantized, in transformers' matching (`quantizers_utils.should_convert_module`, 5.23).

    A pattern matches a module from the start of its path up to a dot, as an expression, or as the end of its path.

    Args:
        patterns: the list.
        where: its place, for the errors.

    Raises:
        InputError: a pattern cannot be read.
    """

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        self._suffixes = tuple(patterns)
        self._starts = [compiled(pattern, where, template=_TO_A_BOUNDARY) for pattern in patterns]

    def matches(self, module: str) -> bool:
        """Whether the module stays unquantized."""
        return module.endswith(self._suffixes) or any(start.match(module) for start in self._starts)
