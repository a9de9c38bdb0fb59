"""Recipes: one part per stage; read from a file and the command line, and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, ValidationError, model_validator

from qexport.amounts import checked_size
from qexport.artifact.publish import check_output
from qexport.errors import RecipeError
from qexport.execution import ExecutionSettings, on_workers
from qexport.export import ExportSettings, OnnxSettings
from qexport.loading import LoadSettings
from qexport.merge import MergeSettings
from qexport.quantizing import AnyMethod
from qexport.quantizing.method import Method
from qexport.recipe.paths import portable, resolved
from qexport.records import added
from qexport.release import ReleaseSettings
from qexport.settings import Settings
from qexport.verifying import VerifySettings
from qexport.yaml.parsing import FileKind, SyntaxProblem, parse
from qexport.yaml.problems import (
    Keys,
    Problem,
    YamlNode,
    YamlOrigin,
    child,
    combination,
    dotted,
    plain,
    problems_of,
    replaced,
)


def _each_layout_once(exports: list[ExportSettings]) -> list[ExportSettings]:
    counts = Counter(export.layout for export in exports)
    if twice := [layout for layout, count in counts.items() if count > 1]:
        raise ValueError(f"the layout {twice[0]} is listed {counts[twice[0]]} times: list it once")
    return exports


def _calibration_text_is_named(method: Method) -> Method:
    if method.needs_calibration and method.calibration_settings is None:
        raise combination({"calibration": f"missing: {method.method} needs calibration text"})
    return method


class Recipe(Settings):
    """What to make of which model. One run follows one recipe.

    Local files are named by absolute paths in a recipe that was read from a file; in one that was made in Python,
    relative paths start from the current directory.
    """

    load: LoadSettings
    """The base model and the adapter."""

    merge: MergeSettings = MergeSettings()
    """The arithmetic of the merge."""

    quantize: Annotated[AnyMethod, AfterValidator(_calibration_text_is_named)]
    """The method and its settings."""

    export: Annotated[list[ExportSettings], Field(min_length=1), AfterValidator(_each_layout_once)]
    """The layouts to write, each at most once. One pass writes all of them."""

    verify: VerifySettings | None = None
    """How the finished artifact is compared with the merged reference. Without it, nothing is measured."""

    max_memory: Annotated[str, AfterValidator(checked_size)] | None = None
    """The most main memory that the run may take, for example `8GB` (powers of ten). By default what the machine or its
    control group has. The weights do not depend on it."""

    execution: ExecutionSettings | None = added()
    """Several workers that share the work. Without it, this process does all of it. The artifact does not depend on it.
    """

    release: ReleaseSettings | None = added()
    """What the artifacts are released as. Name and version enter the manifest, the rest does not."""

    output: str | None = None
    """The artifact's folder. `--output` on the command line replaces it."""

    @model_validator(mode="after")
    def _shared_weights_are_there(self) -> Recipe:
        if "safetensors" not in {each.layout for each in self.export}:
            for index, each in enumerate(self.export):
                if isinstance(each, OnnxSettings) and each.share_weights:
                    message = "there is nothing to share: add the layout safetensors, or remove share_weights"
                    raise combination({f"export.{index}.share_weights": message})
        return self

    @model_validator(mode="after")
    def _held_out_text_is_not_the_calibration_text(self) -> Recipe:
        calibration = self.quantize.calibration_settings
        if not self.verify or calibration is None:
            return self
        if shared := set(_listed(self.verify.text)) & set(_listed(calibration.source)):
            message = f"{min(shared)} is the calibration text too: verify on text that the method has not seen"
            raise combination({"verify.text": message})
        return self

    def on_workers(self, count: int) -> Recipe:
        """The same recipe with so many workers."""
        return self.model_copy(update={"execution": on_workers(self.execution, count)})

    def portable(self) -> dict[str, Any]:
        """The recipe as JSON values without a host's path, for the manifest.

        Defaults are filled in, local files and folders are reduced to their last component; `output`, `max_memory` and
        `execution`, which change nothing in the artifact, are omitted, and of `release` all but name and version.
        """
        return portable(self.model_dump(mode="json"))


def check_max_memory(text: str | None, *, where: str) -> None:
    """Refuses a limit of memory that is no size, as the recipe's field does.

    Raises:
        RecipeError: it is not a size; `where` names the argument.
    """
    if text is None:
        return
    try:
        checked_size(text)
    except ValueError as error:
        raise RecipeError(str(error), where=where, mend="give bytes with their unit") from error


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


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
            node, found = parse(value, origin, numbered=False)
            root, wrong = override_at(root, path, node or YamlNode(None, origin, None))
            problems += wrong
            problems += [Problem(origin, None, ".".join(filter(None, (path, p.field))), p.message) for p in found]
        except SyntaxProblem as error:
            problems.append(Problem(origin, None, path, error.problem.message))
    return root, problems


def override_at(root: YamlNode, path: str, value: YamlNode) -> tuple[YamlNode, list[Problem]]:
    """The tree with the value at a dotted path replaced, or a problem at the new value's place.

    Args:
        root: the recipe's root, a mapping.
        path: for example `quantize.bits`.
        value: the new value.
    """
    if not all(path.split(".")):
        return root, [Problem(value.origin, value.line, path, "write a dotted path, for example quantize.bits")]
    try:
        return replaced(root, _keys(root, path), value), []
    except LookupError as error:
        return root, [Problem(value.origin, value.line, path, str(error.args[0]))]


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


RECIPE_FILE: Final = FileKind(
    "recipe", needs="it needs at least load, quantize and export", reference="docs/recipe.md describes every field"
)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, folder: Path | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file. Relative paths in it start from its own folder.
        overrides: `key=value` texts as on the command line, for example `quantize.bits=8`. Relative paths in them start
            from the current directory.
        folder: where relative paths in the file start, instead of its own folder.

    Returns:
        The recipe with defaults filled in and absolute local paths.

    Raises:
        RecipeError: with every problem that was found, each as `file:line: field: message`.
    """
    path = Path(path)
    root, problems = RECIPE_FILE.read(path, folder=folder)
    root, found = override(root, overrides)
    problems += found
    recipe, found = checked(root)
    problems += found
    if problems or recipe is None:
        raise RECIPE_FILE.error(path, problems)
    return recipe


def checked(root: YamlNode) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that a tree holds, with absolute local paths; None, and every problem, if its values are wrong."""
    root, problems = resolved(root)
    try:
        return Recipe.model_validate(plain(root)), problems
    except ValidationError as error:
        return None, [*problems, *problems_of(error, root, Recipe)]


def checked_output(recipe: Recipe, *, force: bool) -> Path:
    """Where the artifact goes; checked before any work, see `check_output`.

    Raises:
        RecipeError: the recipe names no output, or nothing may be written there.
    """
    if recipe.output is None:
        raise RecipeError("the recipe names no output", where="output", mend="add `output:`, or give --output DIR")
    return check_output(Path(recipe.output), force=force)
