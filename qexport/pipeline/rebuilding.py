"""An artifact built again from its recorded inputs, and compared byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from qexport.architectures.devices import find_device
from qexport.artifact import describe_environment
from qexport.artifact.attestation import Rebuild
from qexport.artifact.digests import sha256_file
from qexport.artifact.integrity import open_artifact
from qexport.artifact.manifest import CARD_NAME, MANIFEST_NAME, Manifest, SourceRecord
from qexport.comparing.documents import compare_values
from qexport.errors import InputError, RecipeError, listed
from qexport.export.launch import FOLDER as LAUNCH_FOLDER
from qexport.hidden_packages import hidden
from qexport.pipeline.first_difference import causes_of, first_difference
from qexport.pipeline.planning import plan
from qexport.pipeline.recording import made_from
from qexport.pipeline.result import Result
from qexport.pipeline.running import run
from qexport.pipeline.texts import read_texts
from qexport.progress import ProgressCallback, silent
from qexport.reading.folders import model_folder
from qexport.recipe import Recipe, load_recipe
from qexport.release.evaluation import EVALUATION_NAME
from qexport.release.record import EVIDENCE_FOLDER, RECORD_NAME

_FETCH: Final = "fetch the artifact again"
_PROGRAMS: Final = "through"
"""The field of `verify` that names programs to start."""


@dataclass(frozen=True)
class Recorded:
    """What is built again.

    Attributes:
        manifest: says what it was made from and what it consists of.
        sha256: of the manifest.
        folder: the artifact, compared with its digests; None if only the manifest is at hand.
        root: the artifact's root digest, or None.
    """

    manifest: Manifest
    sha256: str
    folder: Path | None = None
    root: str | None = None


def recorded(path: Path) -> Recorded:
    """An artifact's folder, every file of which is compared with its digest, or a manifest alone.

    Raises:
        InputError: a file was changed, or the manifest is malformed, names no files or not what they were made from.
    """
    if path.is_file():
        given = Recorded(Manifest.read(path), sha256_file(path))
    else:
        found = open_artifact(model_folder(path))
        given = Recorded(found.manifest, sha256_file(path / MANIFEST_NAME), path, found.root)
    if not given.manifest.files:
        raise InputError("the manifest names no files, so there is nothing to compare", where=str(path))
    if not isinstance(given.manifest.recipe.get("load"), Mapping):
        raise InputError(
            "the manifest's recipe does not say what was loaded", where=f"{path}: recipe.load", mend=_FETCH
        )
    return given


def recipe_of(given: Recorded, *, recipe: Path | None, inputs: Path, overrides: Sequence[str], verify: bool) -> Recipe:
    """The recipe that builds it again.

    Args:
        given: the artifact.
        recipe: the recipe's file; None for the one that the manifest holds.
        inputs: the folder with the local files and folders that the manifest's recipe names.
        overrides: `key=value` texts, for inputs that lie elsewhere.
        verify: keep the verification, and all layouts; else what was not asked about is left out. The programs in
            `verify.through` of the manifest's recipe are left out in any case; those of `recipe` and `overrides` stay.

    Raises:
        RecipeError: a recipe was given, and it is not the manifest's; or it is not valid here.
    """
    if recipe is not None:
        chosen = load_recipe(recipe, overrides)
    else:
        with TemporaryDirectory(prefix="qexport-recipe-") as scratch:
            path = Path(scratch) / MANIFEST_NAME
            path.write_text(json.dumps(_with_revisions(given.manifest, verify=verify)), encoding="utf-8")
            chosen = load_recipe(path, overrides, folder=inputs)
    if not verify:
        exports = [each for each in chosen.export if each.layout in _needed(given.manifest.layout, chosen)]
        chosen = chosen.model_copy(update={"verify": None, "export": exports})
    _refuse_other_recipe(given.manifest, chosen, verify=verify)
    return chosen


def _with_revisions(manifest: Manifest, *, verify: bool) -> dict[str, Any]:
    """The manifest's recipe, with the commits that models of the hub had."""
    found = {key: value for key, value in _without_programs(manifest.recipe).items() if verify or key != "verify"}
    load = dict(found["load"])
    sources: dict[str, SourceRecord | None] = {"revision": manifest.base, "adapter_revision": manifest.adapter}
    load |= {key: each.revision for key, each in sources.items() if each is not None and each.kind == "hub"}
    if manifest.adapter is not None and manifest.adapter.parts and isinstance(load.get("adapters"), list):
        named = zip(load["adapters"], manifest.adapter.parts, strict=False)
        load["adapters"] = [{**each, "revision": part.revision} if part.kind == "hub" else each for each, part in named]
    return found | {"load": load}


def _without_programs(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without `verify.through`: a stranger's manifest does not choose the programs that are started here."""
    verify = recipe.get("verify")
    kept = {key: value for key, value in verify.items() if key != _PROGRAMS} if isinstance(verify, Mapping) else verify
    return {key: kept if key == "verify" else value for key, value in recipe.items()}


def _programs(recipe: Mapping[str, Any]) -> Any:
    verify = recipe.get("verify")
    return verify.get(_PROGRAMS) if isinstance(verify, Mapping) else None


def _needed(layout: str, recipe: Recipe) -> set[str]:
    shares = any(getattr(each, "share_weights", False) for each in recipe.export if each.layout == layout)
    return {layout, "safetensors"} if shares else {layout}


def _refuse_other_recipe(manifest: Manifest, chosen: Recipe, *, verify: bool) -> None:
    if manifest.layout not in {each.layout for each in chosen.export}:
        raise RecipeError(
            f"the recipe does not export {manifest.layout}", where="export", mend="give the recipe as it was"
        )
    free = ("load",) if verify else ("load", "verify")
    built = {each.layout for each in chosen.export}
    ours, theirs = (
        {key: value for key, value in _of_layouts(_without_programs(each), built).items() if key not in free}
        for each in (manifest.recipe, chosen.portable())
    )
    if (found := compare_values("recipe", ours, theirs)) is not None:
        raise RecipeError(
            "this is not the recipe that the artifact was made with",
            where=listed([change.words() for change in found.changes]),
            mend="give the recipe as it was, or none for the manifest's own",
        )


def _of_layouts(recipe: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """A recipe with the settings of the layouts that are built."""
    told = recipe.get("export")
    exports = [each for each in told if isinstance(each, Mapping)] if isinstance(told, Sequence) else []
    return {**recipe, "export": [each for each in exports if each.get("layout") in names]}


@hidden("kernels")
def rebuild(
    given: Recorded,
    recipe: Recipe,
    *,
    to: Path | None = None,
    device: str | None = None,
    progress: ProgressCallback = silent,
) -> Rebuild:
    """Builds an artifact again and compares it with what is recorded.

    Args:
        given: the artifact or its manifest.
        recipe: from `recipe_of`.
        to: where to build; None for a temporary folder.
        device: where to compute; None for the kind of device that is recorded.
        progress: is called with each step.

    Raises:
        InputError: an input does not have its recorded digest. Nothing was built then.
        QexportError: as for `run`; or `verify` was kept, and the merge is not what PEFT makes of the adapter.
    """
    manifest = given.manifest
    where = device or ("cpu" if manifest.environment.device == "cpu" else "cuda")
    inputs, names = _checked_inputs(manifest, recipe, where, progress)
    with ExitStack() as stack:
        output = to or Path(stack.enter_context(TemporaryDirectory(prefix="qexport-rebuild-"))) / "rebuilt"
        chosen = recipe.model_copy(update={"output": str(output.absolute())})
        choice = None if _is_whole(manifest, recipe) else manifest
        result = run(chosen, device=where, recorded=choice, progress=progress)
        if result.unproven_merge is not None:
            raise result.unproven_merge.error
        return _compared(given, recipe, result, inputs, names)


def _is_whole(manifest: Manifest, recipe: Recipe) -> bool:
    """Whether nothing is left out on which a choice of the method `mixed` depends: it is made for all layouts, and made
    again after a verification.
    """
    own = recipe.portable()
    return len(own["export"]) == len(manifest.recipe["export"]) and bool(own["verify"]) == bool(manifest.verification)


def _checked_inputs(
    manifest: Manifest, recipe: Recipe, device: str, progress: ProgressCallback
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The digests of the inputs, which are the recorded ones; and what the inputs are called otherwise than recorded.

    Raises:
        InputError: some are not.
    """
    planned = plan(recipe, progress=progress)
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure, progress=progress)
    own = made_from(planned, texts.calibration, find_device(device))
    pairs = {
        "load.base": (manifest.base.sha256, own["base"].sha256),
        "load.adapter": (_digests(manifest.adapter), _digests(own["adapter"])),
        "tokenizer": (manifest.tokenizer, own["tokenizer"]),
        "quantize.calibration": (_text(manifest.calibration), _text(own["calibration"])),
    }
    problems = [f"{name}: {words}" for name, (ours, theirs) in pairs.items() for words in _unequal(ours, theirs)]
    if problems:
        raise InputError(
            "these are not the inputs that the artifact was made from",
            where=listed(problems),
            mend="name the recorded ones, for example load.base=PATH, or --inputs FOLDER",
        )
    sources = {"base": manifest.base, "adapter": manifest.adapter}
    renamed = [
        f"the {kind} is called {own[kind].name} here, and {was.name} in the manifest"
        for kind, was in sources.items()
        if was is not None and own[kind] is not None and was.name != own[kind].name
    ]
    return {name: dict(ours) for name, (ours, _) in pairs.items() if ours}, renamed


def _digests(source: SourceRecord | None) -> Mapping[str, str]:
    return {} if source is None else source.sha256


def _text(calibration: Any) -> dict[str, str]:
    return {} if calibration is None else {"text": calibration.sha256}


def _unequal(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    problems = [f"{name} is missing" for name in recorded if name not in found]
    problems += [f"{name} is not recorded" for name in found if name not in recorded]
    problems += [
        f"{name} has the digest {found[name]}, not {recorded[name]}"
        for name in recorded
        if name in found and found[name] != recorded[name]
    ]
    return problems


def _compared(
    given: Recorded, recipe: Recipe, result: Result, inputs: Mapping[str, Mapping[str, str]], renamed: Sequence[str]
) -> Rebuild:
    manifest, new = given.manifest, result.manifests[given.manifest.layout]
    folder = result.artifact_path / manifest.layout if len(result.manifests) > 1 else result.artifact_path
    skipped = _not_compared(manifest, recipe, {*manifest.files, *new.files})
    files = {name: record.sha256 for name, record in manifest.files.items()} | {MANIFEST_NAME: given.sha256}
    rebuilt = {name: record.sha256 for name, record in new.files.items()}
    rebuilt[MANIFEST_NAME] = sha256_file(folder / MANIFEST_NAME)
    found = Rebuild(
        layout=manifest.layout,
        manifest_sha256=given.sha256,
        root=given.root,
        inputs=inputs,
        recorded=(manifest.qexport_version, manifest.environment),
        here=(version("qexport"), describe_environment(find_device(_device_of(new)))),
        files={name: digest for name, digest in files.items() if name not in skipped},
        rebuilt={name: digest for name, digest in rebuilt.items() if name not in skipped},
        not_compared=skipped,
    )
    if found.equal:
        return found
    first = first_difference(found.different, given.folder, folder)
    return replace(found, first=first, causes=causes_of(found, first, renamed))


def _device_of(manifest: Manifest) -> str:
    return "cpu" if manifest.environment.device == "cpu" else "cuda"


def _not_compared(manifest: Manifest, recipe: Recipe, names: Set[str]) -> dict[str, str]:
    """What this run cannot make the same, and why."""
    skipped = {"report": "it holds timings, which no two runs share"} if manifest.verification else {}
    left_out = recipe.verify is not None and _programs(manifest.recipe) != _programs(recipe.portable())
    if left_out:
        skipped["verify.through"] = "the programs that a manifest names are not started: name them in --recipe"
    if RECORD_NAME in manifest.files:
        own = (f"{EVIDENCE_FOLDER}/", f"{LAUNCH_FOLDER}/", RECORD_NAME, EVALUATION_NAME, CARD_NAME, MANIFEST_NAME)
        released = [name for name in sorted({MANIFEST_NAME, *names}) if name.startswith(own)]
        return skipped | dict.fromkeys(released, "it is the release's, under its name")
    if recipe.verify is None and manifest.verification is not None:
        figures = "it holds figures, and nothing was verified here (--verify)"
        return skipped | dict.fromkeys((MANIFEST_NAME, CARD_NAME), figures)
    if left_out:
        return skipped | dict.fromkeys((MANIFEST_NAME, CARD_NAME), "it holds what the programs in verify.through gave")
    if recipe.portable() != manifest.recipe:
        skipped[MANIFEST_NAME] = "only this layout was built again"
    return skipped
