"""Which modules an adapter changes: PEFT's rules (`tuners_utils.check_target_module_exists`), without its hangs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qexport.errors import CompatibilityError, InputError
from qexport.merge.base import BaseModel
from qexport.merge.options import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.patterns import full_matches, is_plain


def targeted(options: AdapterOptions, base: BaseModel) -> list[str]:
    """The paths of the modules that the adapter changes, in the model's order.

    Raises:
        InputError: nothing is targeted, or a pattern cannot be matched.
        CompatibilityError: a field holds a pattern where qexport takes only names.
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
            mend="the adapter was made for another base model",
        )
    return found


def ends_with(name: str, suffixes: Sequence[str]) -> bool:
    """Whether the last components of a module path are one of `suffixes`."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def saved(options: AdapterOptions, base: BaseModel) -> list[str]:
    """The modules that modules_to_save stores as a whole. PEFT compares the ends of names, dots or no dots."""
    return [name for name in base.modules if name.endswith(tuple(options.modules_to_save or ()))]


def _is_inner_linear(name: str, base: BaseModel) -> bool:
    return base.modules[name].kind in ("linear", "conv1d") and name != base.head


def _excluded(options: AdapterOptions, base: BaseModel) -> set[str]:
    names = list(base.modules)
    whole = [_only_a_name(name, "modules_to_save") for name in options.modules_to_save or ()]
    excluded = {name for name in names if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in whole)}
    if isinstance(options.exclude_modules, str):
        return excluded | full_matches(options.exclude_modules, names, field="exclude_modules")
    return excluded | {name for name in names if ends_with(name, options.exclude_modules or ())}


def _named(name: str, targets: list[str], options: AdapterOptions) -> bool:
    # PEFT looks at the layers only where a module is named by its end, not where it is named in full.
    return name in targets or (ends_with(name, targets) and _in_layers(name, options))


def _in_layers(name: str, options: AdapterOptions) -> bool:
    layers = options.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [options.layers_pattern] if isinstance(options.layers_pattern, str) else options.layers_pattern
    if patterns:
        wanted = "|".join(_only_a_name(pattern, "layers_pattern") for pattern in patterns)
        match = re.match(rf"(?:^|.*?\.)(?:{wanted})\.(\d+)\.", name)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _only_a_name(pattern: str, field: str) -> str:
    if not is_plain(pattern):
        raise CompatibilityError(
            f"{pattern!r} is a regular expression, where qexport takes only names",
            where=f"adapter_config.json: {field}",
            mend=MERGE_WITH_PEFT,
        )
    return pattern
