"""Regular expressions that come with an adapter, matched so that none can hang the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from qexport.errors import InputError

TIME_LIMIT = 10.0
"""Seconds that one pattern may take over all module names."""

_PLAIN = re.compile(r"[\w.-]*")

# Python's matcher cannot be interrupted from another thread, a process can.
_MATCHER = """
import json, re, sys
pattern, names = json.load(sys.stdin)
json.dump([name for name in names if re.fullmatch(pattern, name)], sys.stdout)
"""


def is_plain(pattern: str) -> bool:
    """Whether a pattern has nothing that repeats or branches, as most have: it is then matched in no time."""
    return _PLAIN.fullmatch(pattern) is not None


def full_matches(pattern: str, names: Sequence[str], *, field: str) -> set[str]:
    """The names that match from start to end, as `re.fullmatch` sees it.

    Raises:
        InputError: the pattern is no regular expression, or takes longer than `TIME_LIMIT`.
    """
    return _matches(pattern, pattern, names, field)


def suffix_matches(pattern: str, names: Sequence[str], *, field: str) -> set[str]:
    """The names whose last components match: PEFT's rule for the keys of rank_pattern and alpha_pattern.

    Raises:
        InputError: as for `full_matches`.
    """
    return _matches(pattern, rf"(.*\.)?({pattern})", names, field)


def _matches(pattern: str, expression: str, names: Sequence[str], field: str) -> set[str]:
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{pattern!r} is not a regular expression: {error}", where=f"adapter_config.json: {field}"
        ) from error
    if is_plain(pattern):
        return {name for name in names if compiled.fullmatch(name)}
    return _match_in_child(expression, names, field)


def _match_in_child(expression: str, names: Sequence[str], field: str) -> set[str]:
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([expression, list(names)]),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"the regular expression {expression!r} takes longer than {TIME_LIMIT:g} s over {len(names)} module names",
            where=f"adapter_config.json: {field}",
            mend='list the module names instead, for example ["q_proj", "v_proj"]',
        ) from error
    return set(json.loads(answer.stdout))
