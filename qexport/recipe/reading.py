"""From a file and the command line to a checked recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from qexport.recipe.model import Recipe
from qexport.recipe.overrides import override
from qexport.recipe.paths import resolved
from qexport.yaml.document import plain
from qexport.yaml.problems import problems_of
from qexport.yaml.reading import FileKind

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
