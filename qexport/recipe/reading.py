"""From a file and the command line to a checked recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from qexport.errors import RecipeError
from qexport.recipe.document import Node, Origin, Problem, plain
from qexport.recipe.model import Recipe
from qexport.recipe.overrides import override
from qexport.recipe.paths import resolved
from qexport.recipe.problems import problems_of
from qexport.recipe.yaml import SyntaxProblem, parse


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
    root, problems = _root(path)
    root, found = override(root, overrides)
    problems += found
    root, found = resolved(root)
    problems += found
    try:
        recipe = Recipe.model_validate(plain(root))
    except ValidationError as error:
        problems += problems_of(error, root, Recipe)
    if problems:
        raise _error(path, problems)
    return recipe


def _root(path: Path) -> tuple[Node, list[Problem]]:
    text = _text(path)
    origin = Origin(str(path), path.absolute().parent)
    try:
        root, problems = parse(text, origin)
    except SyntaxProblem as error:
        raise _error(path, [error.problem]) from error
    if root is None or not isinstance(root.value, Mapping):
        what = "is empty" if root is None or root.value is None else "is no mapping of keys to values"
        raise RecipeError(f"the recipe {what}", where=str(path), mend="it needs at least load, quantize and export")
    return root, problems


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the recipe is not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}",
            where=str(path),
            mend="save it as UTF-8",
        ) from error
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}",
            where=str(path),
            mend="give the path of a recipe's YAML file",
        ) from error


def _error(path: Path, problems: list[Problem]) -> RecipeError:
    problems = sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"  {problem}" for problem in problems)
    return RecipeError(
        f"the recipe has {count}:\n{listed}", where=str(path), mend="docs/recipe.md describes every field"
    )
