"""What texts in the recipe name: a local file or folder, a hub id, or a file inside a package.

Relative paths in a recipe start from its folder, those on the command line from the current directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from qexport.references import (
    DATASET_PREFIX,
    PACKAGE_PREFIX,
    PackageReference,
    is_explicit_path,
    is_hub_id,
    names_gguf,
    parse_reference,
)
from qexport.verifying import names_file
from qexport.yaml.problems import Keys, Problem, YamlNode, dotted, entry_at, replaced

Resolve = Callable[[str, Path], str]

_ADDRESSES: Final = ("oci://", DATASET_PREFIX)


def base(text: str, folder: Path) -> str:
    """A base model: `pkg:package/file.gguf`, a path that ends in `.gguf`, or as for `adapter`."""
    if isinstance(parse_reference(text), PackageReference):
        return text
    return local(text, folder) if names_gguf(text) else adapter(text, folder)


def adapter(text: str, folder: Path) -> str:
    """A folder, if the text begins with `./`, `../`, `/` or `~` or such a folder exists; else a hub id."""
    path = local(text, folder)
    if is_explicit_path(text) or Path(path).is_dir():
        return path
    if not is_hub_id(text):
        raise ValueError(f"{text!r} is not a hub id (org/name), and the folder {path} does not exist")
    return text


def calibration(text: str, folder: Path) -> str:
    """A file, or `hub:org/dataset`."""
    if not text.startswith(DATASET_PREFIX):
        return local(text, folder)
    if not is_hub_id(text.removeprefix(DATASET_PREFIX)):
        raise ValueError(f"{text!r} does not name a hub dataset: write hub:org/dataset")
    return text


def destination(text: str, folder: Path) -> str:
    """A folder or a file, or the address of a registry."""
    return text if text.startswith(_ADDRESSES) else local(text, folder)


def task(text: str, folder: Path) -> str:
    """A task file or a folder of them, or the name of a task of lm-evaluation-harness."""
    return local(text, folder) if names_file(text) else text


def local(text: str, folder: Path) -> str:
    """A local path, made absolute."""
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is not a path")
    if text.startswith((DATASET_PREFIX, PACKAGE_PREFIX)):
        raise ValueError(f"{text!r} is not a local file, and only local files are read here")
    return os.path.abspath(folder / os.path.expanduser(text))  # noqa: PTH100, PTH111 - resolve() would follow links


EACH: Final = "*"
"""In the path of a field: every item of a list."""

REFERENCES: dict[Keys, Resolve] = {
    ("load", "base"): base,
    ("load", "adapter"): adapter,
    ("load", "adapters", EACH, "path"): adapter,
    ("quantize", "calibration", "source"): calibration,
    ("verify", "text"): local,
    ("verify", "prompts"): local,
    ("verify", "baseline"): local,
    ("verify", "formats", "prompts"): local,
    ("verify", "refusals", "prompts"): local,
    ("verify", "tasks", "tasks"): task,
    ("verify", "through", EACH, "python"): local,
    ("release", "to"): destination,
    ("release", "sign"): local,
    ("output",): local,
}
"""The fields that name files, with the rule for each."""


def resolved(root: YamlNode) -> tuple[YamlNode, list[Problem]]:
    """The tree with absolute local paths, and the texts that cannot name anything. Wrong types are left as they are."""
    problems = []
    for keys, resolve in REFERENCES.items():
        for place in _texts(root, keys):
            entry = entry_at(root, place)
            assert entry is not None
            node = entry.node
            try:
                new = YamlNode(resolve(str(node.value), node.origin.folder), node.origin, node.line)
            except ValueError as error:
                problems.append(Problem(node.origin, node.line, dotted(place), str(error)))
            else:
                root = replaced(root, place, new)
    return root, problems


def _texts(root: YamlNode, keys: Keys) -> Iterator[Keys]:
    if EACH in keys:
        place = keys.index(EACH)
        items = entry_at(root, keys[:place])
        count = len(items.node.value) if items is not None and isinstance(items.node.value, tuple) else 0
        for index in range(count):
            yield from _texts(root, (*keys[:place], index, *keys[place + 1 :]))
        return
    entry = entry_at(root, keys)
    if entry is None:
        return
    if isinstance(entry.node.value, str):
        yield keys
    elif isinstance(entry.node.value, tuple):
        yield from ((*keys, i) for i, item in enumerate(entry.node.value) if isinstance(item.value, str))


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's JSON values with local paths reduced to their last component, without `output`, `max_memory`,
    `execution` and where a release goes.
    """
    recipe = {key: value for key, value in recipe.items() if key not in ("output", "max_memory", "execution")}
    if release := recipe.pop("release", None):
        recipe["release"] = {"name": release["name"], "version": release["version"]}
    for keys, resolve in REFERENCES.items():
        name = keys[-1]
        for part in _parts(recipe, keys[:-1]):
            if value := part.get(name):
                shortened = [_shortened(text, resolve) for text in ([value] if isinstance(value, str) else value)]
                part[name] = shortened[0] if isinstance(value, str) else shortened
    return recipe


def _parts(value: Any, keys: Keys) -> list[dict[Any, Any]]:
    """The mappings at a path; several where it goes through the items of a list."""
    if not value:
        return []
    if not keys:
        return [value]
    inner = value if keys[0] == EACH else [value.get(keys[0])]
    return [part for each in inner for part in _parts(each, keys[1:])]


def _shortened(text: str, resolve: Resolve) -> str:
    if resolve is task:
        named_elsewhere = not names_file(text)
    else:
        named_elsewhere = (resolve in (base, adapter) and not is_explicit_path(text)) or text.startswith(DATASET_PREFIX)
    return text if named_elsewhere else Path(text).name
