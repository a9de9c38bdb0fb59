"""Verification of a folder: in a run, and later of any artifact, also one that another tool made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure, describe
from qexport.artifact.figures import CheckResult
from qexport.artifact.folder import open_artifact
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.report import Report
from qexport.gates.profiles import profile_for
from qexport.loading.settings import LoadSettings
from qexport.loading.small_files import has_tokenizer, open_tokenizer, read_sidecars, tokenizer_from_files
from qexport.merge.settings import MergeSettings
from qexport.pipeline.judging import Gates, make_gates
from qexport.pipeline.opened import Opened, open_folder
from qexport.pipeline.planning import load_merged
from qexport.pipeline.recording import Described, make_report
from qexport.pipeline.reference import Reference
from qexport.pipeline.texts import check_questions, read_evaluation, refuse_long_windows
from qexport.progress import Reporter, silent
from qexport.quantize.methods import profile_of_layer
from qexport.reading.artifact_source import model_folder
from qexport.tensors.strict_files import read_json_object
from qexport.text.preflight import TokenizerFolder, preflight
from qexport.verifying import verification
from qexport.verifying.settings import VerifySettings
from qexport.verifying.verification import Given, Measurement, check_config, has_nearest_rival

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
    check_questions(settings)
    where, folder, merging = find_device(device), model_folder(Path(artifact)), merging or MergeSettings()
    merged = load_merged(load, merging, report=report)
    structure, dtype = describe(merged.checkpoint.config), getattr(torch, merging.dtype)
    refuse_long_windows({"verify.sequence_length": settings.sequence_length}, structure)
    opened = _open(folder, structure, dtype)
    evaluation = read_evaluation(settings, open_tokenizer(merged.checkpoint), structure, report=report)
    reference = Reference.prepare(merged, evaluation, settings, dtype=dtype, device=where, report=report)
    return measure_folder(reference, opened, report=report).report_on(opened, command=command)


@dataclass(frozen=True)
class Verified:
    """What was measured of weights, to be told of each folder that has them.

    Attributes:
        reference: what they were held against.
        given: the same for the stage.
        gates: what decides.
        measured: what was found.
    """

    reference: Reference
    given: Given
    gates: Gates
    measured: Measurement

    def report_on(self, opened: Opened, *, command: str, unread: Sequence[str] = ()) -> Report:
        """Checks a folder's config.json and tokenizer, and makes its report.

        Args:
            opened: the folder.
            command: for the report, what measures the same again.
            unread: readers that the folder is for and that have not looked at it.

        Raises:
            InputError: a file of the folder cannot be read.
        """
        checks = [
            check_config(self.given.reference, opened.folder),
            *_check_tokenizer(self.given, opened.folder),
            *self.measured.checks,
        ]
        left_out = [f"too little text for a window, left out: {name}" for name in self.given.held_out.left_out]
        described = Described(opened.subject(), opened.layers, [*self.gates.notes, *left_out], unread, command)
        decided = self.gates([*self.measured.figures, *self.measured.timings.figures], checks)
        return make_report(described, self.measured, decided, checks, self.given, self.reference.merged)


def measure_folder(reference: Reference, opened: Opened, *, report: Reporter = silent) -> Verified:
    """Measures a folder's weights until its gates are decided.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor.
        InputError: the folder is not a form of the reference.
        NumericalError: logits hold NaN or Inf.
    """
    given, settings = reference.given(), reference.settings
    gates = make_gates(
        settings,
        profile_for(settings, opened.layers, opened.sizes, profile_of_layer),
        reference.prepared,
        adapter=reference.merged.adapter is not None,
        nearest=has_nearest_rival(opened.grids),
        graph=opened.graph,
    )
    measured = verification.verify(
        opened.folder, given, lambda figures: gates(figures, []), grids=opened.grids, report=report
    )
    return Verified(reference, given, gates, measured)


def _open(folder: Path, structure: Structure, dtype: torch.dtype) -> Opened:
    """The folder, with what its manifest says where it has one; every file is held against that."""
    name = folder.resolve().name
    if not (folder / MANIFEST_NAME).is_file():
        return open_folder(folder, structure, dtype, name=name)
    manifest = open_artifact(folder).manifest
    digests = {path: record.sha256 for path, record in manifest.files.items()}
    return open_folder(
        folder, structure, dtype, name=name, layouts=[manifest.layout], layers=manifest.layers, digests=digests
    )


def _check_tokenizer(given: Given, folder: Path) -> list[CheckResult]:
    """The artifact's tokenizer against the reference's."""
    files = read_sidecars(folder)
    config: dict[str, Any] = read_json_object(folder / "config.json", limit=_CONFIG_LIMIT)
    return preflight(
        TokenizerFolder(given.tokenizer, given.reference.files, given.reference.config),
        TokenizerFolder(
            tokenizer_from_files(files, config, name=folder.name) if has_tokenizer(files) else None, files, config
        ),
        prompts=given.prompts.prompt_set.prompts if given.prompts else (),
        embedding_rows=describe(given.reference.config).vocab_size,
    )
