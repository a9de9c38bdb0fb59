"""The reference of `qexport verify`, from its options; and the command that repeats a measurement."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qexport.errors import RecipeError
from qexport.execution import ExecutionSettings, on_workers
from qexport.gates import read_gates
from qexport.loading import LoadSettings
from qexport.merge import MergeSettings
from qexport.recipe import check_max_memory, load_recipe, paths
from qexport.runtimes import each_once, parse_through, portable_through
from qexport.verifying import VerifySettings

_RECIPES: Final = (".yaml", ".yml")


@dataclass(frozen=True)
class References:
    """The options of `qexport verify`.

    Attributes:
        reference: the path of a recipe, or a model as in a recipe's `load.base`.
        overrides: `key=value` texts for the recipe.
        adapter: the adapter, if the reference is a model.
        text: held-out files; replace the recipe's.
        prompts: replaces the recipe's.
        gates: a file; replaces the recipe's profile and gates.
        max_memory: replaces the recipe's.
        through: runtimes; replace the recipe's.
        baseline: the release that is in production; replaces the recipe's.
        workers: how many there are of a Ray cluster; replaces the recipe's.
    """

    reference: str
    overrides: Sequence[str]
    adapter: str | None
    text: Sequence[str]
    prompts: str | None
    gates: Path | None
    max_memory: str | None
    through: Sequence[str] = ()
    baseline: str | None = None
    workers: int | None = None

    def command(self, artifact: Path) -> str:
        """The command that repeats the measurement of this artifact."""
        further: dict[str, Sequence[str | Path | None]] = {
            "--adapter": [self.adapter],
            "--text": self.text,
            "--prompts": [self.prompts],
            "--gates": [self.gates],
            "--through": [portable_through(each) for each in self.through],
            "--baseline": [self.baseline],
            "--max-memory": [self.max_memory],
        }
        return verify_command(artifact.resolve().name, self.reference, self.overrides, further)


@dataclass(frozen=True)
class Chosen:
    """The settings to load, merge and compare with, the most memory to take, and the workers."""

    load: LoadSettings
    merging: MergeSettings
    settings: VerifySettings
    max_memory: str | None
    execution: ExecutionSettings | None = None


def reference_of(options: References) -> Chosen:
    """Reads the recipe and the file of gates.

    Raises:
        RecipeError: one of them or an option is wrong, there is no held-out text, or options exclude each other.
    """
    check_max_memory(options.max_memory, where="--max-memory")
    chosen = _from_recipe(options) if options.reference.endswith(_RECIPES) else _from_model(options)
    if options.through:
        chosen = replace(chosen, settings=_through(chosen.settings, options.through))
    if options.baseline is not None:
        baseline = _resolved(paths.local, options.baseline, "--baseline", mend=_REPORT)
        chosen = replace(chosen, settings=chosen.settings.model_copy(update={"baseline": baseline}))
    if options.workers is not None:
        chosen = replace(chosen, execution=on_workers(chosen.execution, options.workers))
    if options.gates is None:
        return chosen
    gates = read_gates(options.gates)
    update = {"profile": gates.profile, "gates": gates.gates}
    return replace(chosen, settings=chosen.settings.model_copy(update=update))


def _through(settings: VerifySettings, texts: Sequence[str]) -> VerifySettings:
    """The settings with the runtimes of the command line, whose interpreters start from the current directory."""
    runtimes = [parse_through(text) for text in texts]
    found = [
        each
        if each.python is None
        else each.model_copy(update={"python": _resolved(paths.local, each.python, "--through")})
        for each in runtimes
    ]
    try:
        return settings.model_copy(update={"through": each_once(found)})
    except ValueError as error:
        raise RecipeError(str(error), where="--through", mend="name each runtime once") from error


def _from_recipe(options: References) -> Chosen:
    if options.adapter is not None:
        raise RecipeError(
            "--adapter is for a model as reference; a recipe names its own adapter", mend="give load.adapter=ADAPTER"
        )
    recipe = load_recipe(options.reference, options.overrides)
    max_memory = recipe.max_memory if options.max_memory is None else options.max_memory
    if recipe.verify is None:
        if not options.text:
            raise _no_text(f"{options.reference} has no verify")
        return Chosen(recipe.load, recipe.merge, _settings(options), max_memory, recipe.execution)
    update = {"text": list(options.text)} if options.text else {}
    prompts = {"prompts": options.prompts} if options.prompts else {}
    settings = recipe.verify.model_copy(update={**update, **prompts})
    return Chosen(recipe.load, recipe.merge, settings, max_memory, recipe.execution)


def _from_model(options: References) -> Chosen:
    if options.overrides:
        raise RecipeError(
            "overrides apply to a recipe, and the reference is a model",
            where=" ".join(options.overrides),
            mend="give a recipe as reference",
        )
    if not options.text:
        raise _no_text(f"{options.reference} is a model")
    base = _resolved(paths.base, options.reference, "--reference")
    adapter = None if options.adapter is None else _resolved(paths.adapter, options.adapter, "--adapter")
    return Chosen(LoadSettings(base=base, adapter=adapter), MergeSettings(), _settings(options), options.max_memory)


_MODEL: Final = "give a folder, a hub id, or a recipe whose name ends in .yaml"
_REPORT: Final = "give a report.json, or the folder of an artifact that was verified"


def _resolved(resolve: paths.Resolve, text: str, option: str, *, mend: str = _MODEL) -> str:
    """Resolves a path or a hub id by the same rules as in a recipe."""
    try:
        return resolve(text, Path.cwd())
    except ValueError as error:
        raise RecipeError(str(error), where=option, mend=mend) from error


def _settings(options: References) -> VerifySettings:
    return VerifySettings(text=list(options.text), prompts=options.prompts)


def _no_text(why: str) -> RecipeError:
    return RecipeError(f"there is no held-out text to measure on: {why}", where="--text", mend="give --text FILE")


_WORD: Final = re.compile(r"""(?:hub|pkg):[^\s,\[\]{}'"]+|[^\s,=:\[\]{}'"]+""")
_EXPLICIT: Final = ("./", "../", "/", "~")


def verify_command(
    artifact: str, reference: str, overrides: Sequence[str], options: Mapping[str, Sequence[str | Path | None]]
) -> str:
    """The `qexport verify` command with every argument that affects what is measured.

    Local files and folders are named by their last component alone, hub ids and packages whole. An override of
    `output` is omitted, since it does not affect the measurement.

    Args:
        artifact: the folder's name.
        reference: a recipe or a model.
        overrides: `key=value` texts.
        options: further options with their values, None for one that was not given.
    """
    words = ["qexport", "verify", artifact, "--reference", _portable(reference)]
    words += [_portable(each) for each in overrides if not each.startswith("output=")]
    for name, values in options.items():
        for value in values:
            words += [name, _portable(str(value))] if value is not None else []
    return shlex.join(words)


def _portable(text: str) -> str:
    if "://" in text:
        return text
    return _WORD.sub(lambda word: _last_component(word[0]), text)


def _last_component(word: str) -> str:
    is_local = word.startswith(_EXPLICIT) or Path(word).exists()
    return (Path(word).name or word) if is_local else word
