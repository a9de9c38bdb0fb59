"""Which modules an adapter changes: PEFT's rules, with a limit of time for its patterns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from qexport.errors import CompatibilityError, InputError
from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.base import BaseModel

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
    """Whether nothing in a pattern repeats or branches, so that matching it is fast. Most patterns are so."""
    return _PLAIN.fullmatch(pattern) is not None


def full_matches(pattern: str, names: Sequence[str], *, field: str) -> set[str]:
    """The names that match from start to end, as for `re.fullmatch`.

    Raises:
        InputError: the pattern is not a regular expression, or takes longer than `TIME_LIMIT`.
    """
    return _matches(pattern, pattern, names, field)


def suffix_matches(pattern: str, names: Sequence[str], *, field: str) -> set[str]:
    """The names whose last components match: PEFT's rule for the keys of rank_pattern and alpha_pattern."""
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


def targeted(options: AdapterOptions, base: BaseModel) -> list[str]:
    """The paths of the modules that the adapter changes, in the model's order.

    Raises:
        InputError: nothing is targeted, or a pattern cannot be matched.
        CompatibilityError: a field holds a pattern where qexport accepts only names.
    """
    if options.target_modules is None:
        raise InputError(
            "target_modules is missing", where="adapter_config.json", mend="name the modules that it changes"
        )
    excluded = _excluded(options, base)
    names = [name for name in base.modules if name not in excluded]
    if isinstance(options.target_modules, list):
        found = [name for name in names if _named(name, options.target_modules, options)]
    elif options.target_modules.lower() == "all-linear":
        found = [name for name in names if _is_inner_linear(name, base)]
    else:
        matches = full_matches(options.target_modules, names, field="target_modules")
        found = [name for name in names if name in matches]
    if not found:
        raise InputError(
            f"no module of the base matches target_modules {options.target_modules!r}",
            where="adapter_config.json: target_modules",
            mend="give the base that the adapter was trained on",
        )
    return found


def ends_with(name: str, suffixes: Sequence[str]) -> bool:
    """Whether the last components of a module path are one of `suffixes`."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def saved(options: AdapterOptions, base: BaseModel) -> list[str]:
    """The modules that modules_to_save stores as a whole. PEFT compares the ends of names, not whole components."""
    return [name for name in base.modules if name.endswith(tuple(options.modules_to_save or ()))]


def _is_inner_linear(name: str, base: BaseModel) -> bool:
    return base.modules[name].kind in ("linear", "conv1d") and name != base.head


def _excluded(options: AdapterOptions, base: BaseModel) -> set[str]:
    names = list(base.modules)
    whole = [_checked_name(name, "modules_to_save") for name in options.modules_to_save or ()]
    excluded = {name for name in names if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in whole)}
    if isinstance(options.exclude_modules, str):
        return excluded | full_matches(options.exclude_modules, names, field="exclude_modules")
    return excluded | {name for name in names if ends_with(name, options.exclude_modules or ())}


def _named(name: str, targets: list[str], options: AdapterOptions) -> bool:
    # PEFT checks the layers only if a module is named by its end, not if it is named in full.
    return name in targets or (ends_with(name, targets) and _in_layers(name, options))


def _in_layers(name: str, options: AdapterOptions) -> bool:
    layers = options.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [options.layers_pattern] if isinstance(options.layers_pattern, str) else options.layers_pattern
    if patterns:
        wanted = "|".join(_checked_name(pattern, "layers_pattern") for pattern in patterns)
        match = re.match(rf"(?:^|.*?\.)(?:{wanted})\.(\d+)\.", name)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _checked_name(pattern: str, field: str) -> str:
    if not is_plain(pattern):
        raise CompatibilityError(
            f"{pattern!r} is a regular expression, but qexport accepts only names here",
            where=f"adapter_config.json: {field}",
            mend=MERGE_WITH_PEFT,
        )
    return pattern
