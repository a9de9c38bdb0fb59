"""Reads a recipe from a file and the command line, and checks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from qexport.recipe.model import Recipe
from qexport.recipe.paths import resolved
from qexport.yaml.document import Keys, Problem, YamlNode, YamlOrigin, child, dotted, plain, replaced
from qexport.yaml.parsing import FileKind, SyntaxProblem, parse
from qexport.yaml.problems import problems_of


def override(root: YamlNode, overrides: Sequence[str]) -> tuple[YamlNode, list[Problem]]:
    """The tree with the overrides applied in order, and a problem for each that cannot be applied.

    Args:
        root: the recipe's root, a mapping.
        overrides: each `key=value`: a dotted path, numbers for the items of a list (`export.0.layout=safetensors`), and
            a YAML scalar or flow value. Missing parts of a path are created; the recipe's own checks find
            unknown keys.
    """
    origin = YamlOrigin("command line", Path.cwd())
    problems = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            problems.append(Problem(origin, None, text, "write key=value, for example quantize.bits=8"))
            continue
        try:
            keys = _keys(root, path)
            node, found = parse(value, origin, numbered=False)
            root = replaced(root, keys, node or YamlNode(None, origin, None))
            problems += [Problem(origin, None, ".".join(filter(None, (path, p.field))), p.message) for p in found]
        except SyntaxProblem as error:
            problems.append(Problem(origin, None, path, error.problem.message))
        except LookupError as error:
            problems.append(Problem(origin, None, path, str(error.args[0])))
    return root, problems


def _keys(root: YamlNode, path: str) -> Keys:
    """The path as keys and indexes; a LookupError says where the recipe has no such place."""
    keys: list[str | int] = []
    node: YamlNode | None = root
    for part in path.split("."):
        key: str | int = part
        if node is not None and isinstance(node.value, tuple):
            if not part.isdecimal() or int(part) >= len(node.value):
                raise LookupError(f"{dotted(keys)} is a list of {len(node.value)}: give an index below that")
            key = int(part)
        elif node is not None and not isinstance(node.value, Mapping | None):
            raise LookupError(f"{dotted(keys)} is a single value and has no {part}")
        keys.append(key)
        below = child(node, key) if node else None
        node = below.node if below else None
    return tuple(keys)


_RECIPE: Final = FileKind(
    "recipe", needs="it needs at least load, quantize and export", reference="docs/recipe.md describes every field"
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file. Relative paths in it start from its own folder.
        overrides: `key=value` texts as on the command line, for example `quantize.bits=8`. Relative paths in them start
            from the current directory.

    Returns:
        The recipe with defaults filled in and absolute local paths.

    Raises:
        RecipeError: with every problem that was found, each as `file:line: field: message`.
    """
    path = Path(path)
    root, problems = _RECIPE.read(path)
    root, found = override(root, overrides)
    problems += found
    root, found = resolved(root)
    problems += found
    try:
        recipe = Recipe.model_validate(plain(root))
    except ValidationError as error:
        problems += problems_of(error, root, Recipe)
    if problems:
        raise _RECIPE.error(path, problems)
    return recipe
