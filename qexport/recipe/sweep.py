"""Sweeps: variants of one recipe, read from a file and checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from qexport.errors import listed
from qexport.recipe import RECIPE_FILE, Recipe, checked, override, override_at
from qexport.recipe.paths import local
from qexport.settings import Settings
from qexport.yaml.parsing import FileKind
from qexport.yaml.problems import Keys, Problem, YamlNode, YamlOrigin, entry_at, plain, problems_of

Overrides = dict[str, JsonValue]

MOST_VARIANTS: Final = 200

_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,79}$"
_OWN_SUFFIXES: Final = (".partial", ".rejected", ".replaced", ".sha256")
_VARIED: Final = ("quantize", "export")


class NamedVariant(Settings):
    """One variant with a name of its own."""

    name: Annotated[str, StringConstraints(pattern=_NAME)]
    """The name of its folder: letters, digits and `_.+-`."""

    overrides: Annotated[Overrides, Field(min_length=1)]
    """Values of `quantize` and `export` that replace the recipe's, by their dotted paths."""


class Sweep(Settings):
    """Variants of one recipe, which are made one after the other and compared.

    Variants differ in `quantize` and `export`. They have the base, the adapter, the merge and the verification in
    common, so that their figures can be compared, and what is measured of the reference is measured once.
    """

    recipe: str
    """The recipe's path. It must have `verify`."""

    overrides: Overrides = {}
    """Values that replace the recipe's in all variants, by their dotted paths, for example `verify.max_windows: 32`."""

    matrix: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = {}
    """Several values for each of some paths of `quantize` and `export`: each combination is a variant."""

    exclude: list[Annotated[Overrides, Field(min_length=1)]] = []
    """Combinations of the matrix that are left out: those that have all values of one of these."""

    variants: list[NamedVariant] = []
    """Further variants, each with its name."""

    keep: Literal["all", "best"] = "all"
    """`best` keeps the artifact that is recommended, and only the reports of the others. Variants that would be larger
    than one that has passed are not made."""

    output: str | None = None
    """The folder of the sweep: each variant has its own folder in it. `--output` replaces it."""


@dataclass(frozen=True)
class Variant:
    """One variant of a sweep.

    Attributes:
        name: of its folder.
        overrides: `key=value` texts that make it of the recipe, with those of the command line.
        recipe: what it is made by; its `output` is the variant's folder.
    """

    name: str
    overrides: Sequence[str]
    recipe: Recipe


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep that was read from a file.

    Attributes:
        recipe: the path of the recipe.
        output: the folder of the sweep.
        keep: see `Sweep.keep`.
        variants: in the order of the matrix, then those with names.
    """

    recipe: Path
    output: Path
    keep: Literal["all", "best"]
    variants: Sequence[Variant]

    def on_workers(self, count: int) -> LoadedSweep:
        """The same sweep with so many workers."""
        variants = [replace(each, recipe=each.recipe.on_workers(count)) for each in self.variants]
        return replace(self, variants=variants)


SWEEP_FILE: Final = FileKind(
    "sweep", needs="it needs at least recipe and matrix or variants", reference="docs/sweep.md describes every field"
)


def load_sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    keep: Literal["all", "best"] | None = None,
) -> LoadedSweep:
    """Reads and checks a sweep and the recipe of each of its variants.

    Args:
        path: a YAML file. Relative paths in it start from its own folder.
        overrides: `key=value` texts as on the command line, which replace values of the recipe before the variants' do.
        output: the folder of the sweep, instead of the file's.
        keep: instead of the file's.

    Raises:
        RecipeError: with every problem that was found, each as `file:line: field: message`.
    """
    path = Path(path)
    root, problems = SWEEP_FILE.read(path)
    try:
        settings = Sweep.model_validate(plain(root))
    except ValidationError as error:
        raise SWEEP_FILE.error(path, [*problems, *problems_of(error, root, Sweep)]) from error
    folder = output.absolute() if output is not None else _output(settings, root)
    if (count := _combinations(settings)) > MOST_VARIANTS:
        message = f"{count} combinations; at most {MOST_VARIANTS} are made"
        raise SWEEP_FILE.error(path, [*problems, _problem(root, ("matrix",), "matrix", message)])
    named = _Values(settings, root).variants()
    problems += _problems(settings, root, variants=len(named), has_output=folder is not None)
    if problems or folder is None:
        raise SWEEP_FILE.error(path, problems)
    recipe = Path(local(settings.recipe, root.origin.folder))
    base, problems = RECIPE_FILE.read(recipe)
    base, found = override(base, overrides)
    problems += found
    common = _Values.at(root, ("overrides",), settings.overrides)
    base, found = _applied(base, common)
    problems += found
    variants, found = _variants(base, named, folder, [*overrides, *map(_text, common)])
    problems += found
    if problems:
        raise SWEEP_FILE.error(path, problems)
    return LoadedSweep(recipe, folder, keep or settings.keep, variants)


def _output(settings: Sweep, root: YamlNode) -> Path | None:
    return None if settings.output is None else Path(local(settings.output, root.origin.folder))


def _problems(settings: Sweep, root: YamlNode, *, variants: int, has_output: bool) -> list[Problem]:
    """What is wrong with the sweep, apart from the recipes of its variants."""
    problems = list(_misplaced(settings, root))
    if not variants:
        problems.append(_problem(root, (), "", "it names no variants: add matrix or variants"))
    if not has_output:
        problems.append(_problem(root, (), "output", "missing: add it, or give --output DIR"))
    for index, excluded in enumerate(settings.exclude):
        for key, value in excluded.items():
            if not any(_equal(value, each) for each in settings.matrix.get(key, ())):
                message = "the matrix has no such value, so nothing is left out"
                problems.append(_problem(root, ("exclude", index, key), f"exclude.{index}.{key}", message))
    return problems


def _combinations(settings: Sweep) -> int:
    """Before any are left out."""
    return math.prod(map(len, settings.matrix.values())) + len(settings.variants)


def _misplaced(settings: Sweep, root: YamlNode) -> Iterator[Problem]:
    """Values that variants must not differ in."""
    places: list[tuple[Keys, str]] = [(("matrix", key), key) for key in settings.matrix]
    for index, named in enumerate(settings.variants):
        places += [(("variants", index, "overrides", key), key) for key in named.overrides]
    for keys, path in places:
        if path.partition(".")[0] not in _VARIED:
            message = "variants differ in quantize and export; what holds for all of them goes under overrides"
            yield _problem(root, keys, ".".join(map(str, keys)), message)
    for key in settings.overrides:
        if key.partition(".")[0] == "output":
            message = "variants lie in the folder of the sweep: set its own output"
            yield _problem(root, ("overrides", key), f"overrides.{key}", message)


def _problem(root: YamlNode, keys: Keys, field: str, message: str) -> Problem:
    entry = entry_at(root, keys)
    return Problem(root.origin, entry.line if entry else root.line, field, message)


@dataclass(frozen=True)
class _Override:
    """A value for a path of the recipe, with its place in the sweep's file."""

    path: str
    node: YamlNode

    @property
    def value(self) -> Any:
        return plain(self.node)


def _text(each: _Override) -> str:
    """As on the command line: JSON is a flow value of YAML, and a text stands as it is where YAML reads it so."""
    value = each.value
    plain_text = isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./-]*", value) and not _is_keyword(value)
    return f"{each.path}={value if plain_text else json.dumps(value, ensure_ascii=False)}"


def _is_keyword(text: str) -> bool:
    return text.lower() in {"true", "false", "null"}


class _Values:
    """The values of each variant.

    Args:
        settings: the sweep.
        root: its tree.
    """

    def __init__(self, settings: Sweep, root: YamlNode) -> None:
        self._settings, self._root = settings, root

    @staticmethod
    def at(root: YamlNode, keys: Keys, named: Mapping[str, Any]) -> list[_Override]:
        """The values of a mapping of paths at a place of the sweep's file."""
        found = {path: entry_at(root, (*keys, path)) for path in named}
        return [_Override(path, entry.node) for path, entry in found.items() if entry is not None]

    def variants(self) -> list[tuple[str, YamlNode, list[_Override]]]:
        """The name of each variant, the place where it is named, and its values."""
        found = []
        for combination in self._combinations():
            name = "_".join(filter(None, (_label(each) for each in combination)))[:80].rstrip("._+-")
            found.append((name, self._place("matrix"), combination))
        for index, named in enumerate(self._settings.variants):
            keys: Keys = ("variants", index)
            entry = entry_at(self._root, (*keys, "name"))
            assert entry is not None
            found.append((named.name, entry.node, self.at(self._root, (*keys, "overrides"), named.overrides)))
        return found

    def _place(self, key: str) -> YamlNode:
        entry = entry_at(self._root, (key,))
        assert entry is not None
        return YamlNode(None, entry.node.origin, entry.line)

    def _combinations(self) -> Iterator[list[_Override]]:
        dimensions = []
        for path, values in self._settings.matrix.items():
            entry = entry_at(self._root, ("matrix", path))
            assert entry is not None
            assert isinstance(entry.node.value, tuple)
            dimensions.append([_Override(path, node) for node, _ in zip(entry.node.value, values, strict=True)])
        for combination in product(*dimensions) if dimensions else ():
            if not any(self._has(combination, excluded) for excluded in self._settings.exclude):
                yield list(combination)

    @staticmethod
    def _has(combination: Sequence[_Override], excluded: Mapping[str, Any]) -> bool:
        values = {each.path: each.value for each in combination}
        return all(path in values and _equal(value, values[path]) for path, value in excluded.items())


def _equal(one: Any, other: Any) -> bool:
    """As YAML values: true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _label(each: _Override) -> str:
    """A part of a variant's name: `gptq`, `bits-4`, `vllm`, `gptq-bits-4`."""
    return _words(each.path.rpartition(".")[2], each.value)


def _words(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(filter(None, (_words(name, inner) for name, inner in value.items())))
    if isinstance(value, list):
        return "+".join(filter(None, (_words(key, inner) for inner in value)))
    if isinstance(value, str):
        return _safe(value.rstrip("/").rpartition("/")[2])
    return f"{_safe(key)}-{_safe(json.dumps(value))}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("._+-")


def _applied(root: YamlNode, overrides: Sequence[_Override]) -> tuple[YamlNode, list[Problem]]:
    problems = []
    for each in overrides:
        root, found = override_at(root, each.path, each.node)
        problems += found
    return root, problems


def _variants(
    base: YamlNode, named: Sequence[tuple[str, YamlNode, list[_Override]]], folder: Path, common: Sequence[str]
) -> tuple[list[Variant], list[Problem]]:
    """The variants with their recipes, and what is wrong with them; what several have in common is said once."""
    variants, wrong = list[Variant](), dict[Problem, list[str]]()
    for name, place, values in named:
        root, problems = _applied(base, values)
        output = YamlNode(str(folder / name), YamlOrigin("command line", Path.cwd()), None)
        root, _ = override_at(root, "output", output)
        recipe, found = checked(root)
        problems += found or _names_taken(name, place, variants)
        if recipe is not None:
            problems += _unfit(recipe, place, variants)
            variants.append(Variant(name, [*common, *map(_text, values)], recipe))
        for problem in problems:
            wrong.setdefault(problem, []).append(name)
    count = len(named)
    return variants, [_of_variants(problem, names, count) for problem, names in wrong.items()]


def _of_variants(problem: Problem, names: Sequence[str], count: int) -> Problem:
    if len(names) == count:
        return problem
    kind = "variant" if len(names) == 1 else "variants"
    return Problem(problem.origin, problem.line, problem.field, f"{problem.message} ({kind} {listed(list(names))})")


def _names_taken(name: str, place: YamlNode, others: Sequence[Variant]) -> list[Problem]:
    mend = "name these variants under `variants`"
    if not re.fullmatch(_NAME, name):
        return [Problem(place.origin, place.line, "matrix", f"no name can be made of a variant's values; {mend}")]
    if name.endswith(_OWN_SUFFIXES):
        what = f"a variant must not be called {name}: qexport makes files and folders of such names"
        return [Problem(place.origin, place.line, "name", what)]
    if any(name.lower() == other.name.lower() for other in others):
        return [Problem(place.origin, place.line, "name", f"several variants are called {name}; {mend}")]
    return []


def _unfit(recipe: Recipe, place: YamlNode, others: Sequence[Variant]) -> list[Problem]:
    """Why a variant cannot be compared with the others, or need not be made."""
    if recipe.verify is None:
        message = "the recipe has no verify, so variants cannot be compared: add it"
        return [Problem(place.origin, None, "", message)]
    same = [other.name for other in others if _made_of(other.recipe) == _made_of(recipe)]
    return [Problem(place.origin, place.line, "", f"makes the same as {same[0]}")] if same else []


def _made_of(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"output"})


def sweep_schema() -> str:
    """The schema (draft 2020-12) as JSON text; `recipes/sweep.schema.json` is a copy of it."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **Sweep.model_json_schema(mode="validation")}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
