"""Verification of a folder: in a run, and later of any artifact, also one that another tool made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure, describe
from qexport.artifact.folder import open_artifact
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.report import Check, Report
from qexport.errors import CompatibilityError
from qexport.gates.profiles import profile_of_layers
from qexport.gates.settings import HasGates
from qexport.loading.adapter import locate_adapter
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.settings import LoadSettings
from qexport.loading.sidecars import read_sidecars
from qexport.loading.tokenizer import open_tokenizer
from qexport.merge.merging import merge
from qexport.merge.settings import MergeSettings
from qexport.pipeline.judging import make_gates
from qexport.pipeline.opened import Opened, open_folder
from qexport.pipeline.reference import Reference
from qexport.pipeline.reporting import Described, make_report
from qexport.pipeline.texts import read_evaluation
from qexport.progress import Reporter, silent
from qexport.reading.artifact_source import model_folder
from qexport.tensors import Checkpoint, Origin
from qexport.tensors.strict_json import read_json_object
from qexport.text.preflight import TokenizerFolder, preflight
from qexport.verifying import verification
from qexport.verifying.settings import VerifySettings
from qexport.verifying.verification import Given, has_nearest_rival

_CONFIG_LIMIT: Final = 1 << 24


def verify(
    artifact: str | Path,
    load: LoadSettings,
    settings: VerifySettings,
    *,
    merging: MergeSettings | None = None,
    command: str = "qexport.verify(...)",
    device: str = "auto",
    report: Reporter = silent,
) -> Report:
    """Holds a finished folder, of qexport or of another maker, against base and adapter.

    Args:
        artifact: the folder; of several layouts that of one.
        load: base and adapter.
        settings: text, prompts and gates.
        merging: the arithmetic of the merge.
        command: for the report, what measures the same again.
        device: `auto`, `cpu` or `cuda`.
        report: is told of progress, and of what a user should know.

    Raises:
        QexportError: one of its kinds, see `qexport.errors`. A gate that fails is in the report, not raised.
    """
    where, folder, merging = find_device(device), model_folder(Path(artifact)), merging or MergeSettings()
    checkpoint, adapter = load_checkpoint(load, report=report), locate_adapter(load, report=report)
    merged = merge(
        checkpoint,
        adapter.path if adapter else None,
        merging,
        adapter_origin=adapter.origin if adapter else None,
        report=report,
    )
    structure, dtype = describe(merged.checkpoint.config), getattr(torch, merging.dtype)
    refuse_long_windows(settings, structure)
    opened = _open(folder, structure, dtype)
    evaluation = read_evaluation(settings, open_tokenizer(merged.checkpoint), structure)
    reference = Reference.prepare(merged, evaluation, settings, dtype=dtype, device=where, report=report)
    return verify_folder(reference, opened, settings, command=command, report=report)


def verify_folder(
    reference: Reference,
    opened: Opened,
    settings: HasGates,
    *,
    command: str,
    unread: Sequence[str] = (),
    report: Reporter = silent,
) -> Report:
    """Measures a folder, decides its gates and makes the report.

    Args:
        reference: what to hold it against.
        opened: the folder.
        settings: the gates.
        command: for the report, what measures the same again.
        unread: readers that the folder is for and that have not looked at it.
        report: is told of progress.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor.
        InputError: the folder is not a form of the reference.
        NumericalError: logits hold NaN or Inf.
    """
    given = reference.given()
    auto = profile_of_layers(opened.layers, opened.sizes) if settings.profile == "auto" else settings.profile
    gates = make_gates(
        settings,
        auto,
        reference.prepared,
        without_adapter=given.base is not None,
        nearest=has_nearest_rival(opened.grids),
    )
    measured = verification.verify(opened.folder, given, gates, _check_tokenizer(given, opened.folder), report=report)
    left_out = [f"too little text for a window, left out: {domain}" for domain in given.held_out.left_out]
    described = Described(opened.subject(), opened.layers, [*gates.notes, *left_out], unread, command)
    return make_report(described, measured, given, reference.merged)


def refuse_long_windows(settings: VerifySettings, structure: Structure) -> None:
    """Refuses windows that are longer than the positions that the model has learned.

    Raises:
        CompatibilityError: they are.
    """
    longest = structure.positions
    if longest is not None and settings.sequence_length > longest:
        raise CompatibilityError(
            f"the model has learned {longest} positions, and windows are longer",
            where=f"verify.sequence_length: {settings.sequence_length}",
            mend=f"set sequence_length to {longest} or less",
        )


def _open(folder: Path, structure: Structure, dtype: torch.dtype) -> Opened:
    """The folder, with what its manifest says where it has one; every file is held against that."""
    name = folder.resolve().name
    if not (folder / MANIFEST_NAME).is_file():
        return open_folder(folder, structure, dtype, name=name)
    manifest = open_artifact(folder).manifest
    digests = {path: record.sha256 for path, record in manifest.files.items() if path.endswith(".safetensors")}
    return open_folder(
        folder, structure, dtype, name=name, layouts=[manifest.layout], layers=manifest.layers, digests=digests
    )


def _check_tokenizer(given: Given, folder: Path) -> list[Check]:
    """The artifact's tokenizer against the reference's."""
    files = read_sidecars(folder)
    config: dict[str, Any] = read_json_object(folder / "config.json", limit=_CONFIG_LIMIT)
    stored = Checkpoint(config, given.reference.weights, files, Origin("folder", folder.name))
    found = preflight(
        TokenizerFolder(given.tokenizer, given.reference.files, given.reference.config),
        TokenizerFolder(open_tokenizer(stored), files, config),
        prompts=given.prompts.prompt_set.prompts if given.prompts else (),
        embedding_rows=describe(given.reference.config).vocab_size,
    )
    return [Check(gate="tokenizer", name=each.name, passed=each.passed, detail=each.detail) for each in found]
