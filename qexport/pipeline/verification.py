"""Verifies a folder: one of a run, or any finished artifact, also one that another tool made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.devices import find_device
from qexport.architectures.memory import keeping_to
from qexport.artifact.figures import CheckResult
from qexport.artifact.integrity import find_artifact
from qexport.artifact.report import Report
from qexport.errors import CompatibilityError, listed
from qexport.execution import ExecutionSettings, execution_of
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution
from qexport.export.gguf.layout import compared_header, compared_header_of_others
from qexport.gates.limits import decided_here
from qexport.gates.profiles import profile_for
from qexport.hidden_packages import hidden
from qexport.loading import LoadSettings
from qexport.loading.small_files import has_tokenizer, open_tokenizer, read_sidecars, tokenizer_from_files
from qexport.merge import MergeSettings
from qexport.pipeline.expectations import budget_to_verify
from qexport.pipeline.folders import ArtifactFolder, open_folder
from qexport.pipeline.gguf_files import as_folder
from qexport.pipeline.planning import load_merged
from qexport.pipeline.recording import make_report
from qexport.pipeline.reference import Gates, make_gates, prepare_reference
from qexport.pipeline.runtimes import check_runtimes, refuse_full_context, refuse_misfits
from qexport.pipeline.serving import NOT_SERVED, ServedArtifact, measure_through
from qexport.pipeline.texts import check_small_files, read_evaluation, refuse_long_windows
from qexport.progress import ProgressCallback, silent
from qexport.quantizing import profile_of_layer
from qexport.reading.folders import artifact_place
from qexport.reading.gguf_weights import GgufWeights
from qexport.reading.one_model import refuse_second_model
from qexport.recipe import check_max_memory
from qexport.text.preflight import TokenizerFolder, preflight
from qexport.verifying import VerifySettings, verification
from qexport.verifying.file_comparison import check_files
from qexport.verifying.reference import Reference
from qexport.verifying.rounds import NO_LOOKS, Looks
from qexport.verifying.verification import Measurement, check_config, check_parameters, has_nearest_rival


@hidden("kernels")
def verify(
    artifact: str | Path,
    load: LoadSettings,
    settings: VerifySettings,
    *,
    merging: MergeSettings | None = None,
    max_memory: str | None = None,
    execution: ExecutionSettings | None = None,
    command: str = "qexport.verify(...)",
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> Report:
    """Compares a finished artifact, made by qexport or by another tool, with its base and adapter.

    Args:
        artifact: the folder of one layout, or a GGUF file.
        load: names base and adapter.
        settings: text, prompts and gates.
        merging: the arithmetic of the merge.
        max_memory: the most main memory that the process may take, for example `8GB`; None for what the machine has.
        execution: workers that share the work; the report does not depend on them. None for this process.
        command: for the report, the command that repeats the measurement.
        device: `auto`, `cpu` or `cuda`.
        progress: is called with each step, and with what a user should know.

    Raises:
        QexportError: one of its subclasses, see `qexport.errors`. A gate that fails is in the report, not raised.
    """
    check_max_memory(max_memory, where="max_memory")
    check_small_files(settings)
    check_runtimes(settings)
    where, path, merging = find_device(device), artifact_place(Path(artifact)), merging or MergeSettings()
    merged = load_merged(load, merging, progress=progress)
    structure, dtype = merged.checkpoint.architecture.structure, getattr(torch, merging.dtype)
    refuse_long_windows({"verify.sequence_length": settings.sequence_length}, structure)
    refuse_full_context(settings, merged.checkpoint.config)
    with as_folder(path) as folder, _open(path, folder, merged.checkpoint, dtype) as opened:
        refuse_second_model(opened.artifact)
        check_parameters(merged.checkpoint, opened.artifact)
        refuse_misfits(settings, opened.artifact)
        budget = budget_to_verify(merged, opened.artifact, settings, max_memory, dtype=dtype, device=where)
        evaluation = read_evaluation(settings, open_tokenizer(merged.checkpoint), merged.checkpoint, progress=progress)
        with keeping_to(budget), execution_of(execution, where) as workers:
            reference = prepare_reference(merged, evaluation, settings, dtype=dtype, device=where, progress=progress)
            verified = measure_folder(reference, opened, execution=workers, progress=progress)
            served = measure_through(reference, opened, verified.gates, settings.through, progress=progress)
            return verified.report_on(opened, served=served, command=command)


@dataclass(frozen=True)
class Verified:
    """A measurement of weights, from which each folder with these weights gets its report.

    Attributes:
        reference: what they were compared with.
        gates: decide on the figures.
        measured: the figures.
    """

    reference: Reference
    gates: Gates
    measured: Measurement

    def report_on(
        self,
        opened: ArtifactFolder,
        *,
        served: ServedArtifact = NOT_SERVED,
        made: Sequence[str] = (),
        command: str,
    ) -> Report:
        """Checks a folder's config.json and tokenizer, and makes its report.

        Args:
            opened: the folder.
            served: what runtimes made of it.
            made: what a user should know of how it was made.
            command: for the report, the command that repeats the measurement.
        """
        reference, measured = self.reference, self.measured
        checks = [
            check_config(reference.merged, opened.artifact),
            *_check_small_files(reference, opened),
            *measured.checks,
        ]
        left_out = [f"too little text for a window, left out: {name}" for name in reference.held_out.left_out]
        figures = [*measured.figures, *measured.timings.figures]
        through = [figure for each in served.records for figure in each.figures]
        own = replace(self.gates, limits=decided_here(self.gates.limits, figures, through))
        decided = own(figures, checks)
        notes = [*made, *self.gates.notes, *left_out]
        profile = self.gates.profile
        return make_report(
            opened, measured, decided, checks, reference, profile=profile, served=served, notes=notes, command=command
        )


def measure_folder(
    reference: Reference,
    opened: ArtifactFolder,
    *,
    looks: Looks = NO_LOOKS,
    execution: Execution = INLINE,
    progress: ProgressCallback = silent,
) -> Verified:
    """Measures a folder's weights until its gates are decided.

    Args:
        reference: what to compare it with.
        opened: the folder.
        looks: what an interrupted run has measured.
        execution: the workers, to which windows are dealt out.
        progress: is called with each step.
    """
    settings = reference.settings
    gates = make_gates(
        settings,
        profile_for(settings, opened.stored, opened.sizes, profile_of_layer),
        reference.prepared,
        adapter=reference.adapter is not None,
        nearest=has_nearest_rival(opened.artifact.grids),
        graph=opened.artifact.kind == "graph",
        baseline=reference.baseline.record if reference.baseline else None,
    )
    measured = verification.verify(
        opened.artifact,
        reference,
        lambda figures: gates(figures, []),
        looks=looks,
        execution=execution,
        progress=progress,
    )
    return Verified(reference, gates, measured)


def _open(path: Path, folder: Path, merged: Checkpoint, dtype: torch.dtype) -> AbstractContextManager[ArtifactFolder]:
    """Opens the folder of an artifact, which is its path but for a GGUF file.

    If it is qexport's, every file is checked first. Its manifest gives the report the layers' losses and the layout's
    name; what gates and rivals depend on comes from the weights' files.
    """
    name, found = path.resolve().name, find_artifact(folder)
    if found is None:
        return open_folder(folder, merged.architecture, dtype, name=name, from_header=path != folder)
    manifest = found.manifest
    return open_folder(
        folder,
        merged.architecture,
        dtype,
        name=name,
        layouts=[manifest.layout],
        layers=manifest.layers,
        digests={path: record.sha256 for path, record in manifest.files.items()},
    )


def _check_small_files(reference: Reference, opened: ArtifactFolder) -> list[CheckResult]:
    """Compares a GGUF file's header and the files beside config.json and the weights with the reference's.

    Files that were made from a header are no part of the artifact. They count where the layout gguf does not write the
    reference's model or tokenizer, so that there is no header to compare with.
    """
    merged, artifact = reference.merged, opened.artifact
    if not isinstance(artifact, GgufWeights):
        return _check_beside(reference, opened)
    if not opened.from_header:
        problems = compared_header(artifact.file, merged.architecture, merged.files)
        return [*_check_header(artifact, problems), *_check_beside(reference, opened)]
    try:
        problems = compared_header_of_others(artifact.file, merged.architecture, merged.files)
    except CompatibilityError:
        return _check_beside(reference, opened)
    return _check_header(artifact, problems)


def _check_header(artifact: GgufWeights, problems: Sequence[str]) -> list[CheckResult]:
    """What a GGUF file's own header says of model and tokenizer, where the reference would give something else."""
    own = [each for each in problems if not each.startswith("tokenizer.")]
    of_tokenizer = [each for each in problems if each.startswith("tokenizer.")]
    name = artifact.file.path.name
    return [
        CheckResult(gate="config", name=name, passed=not own, detail=listed(own) or "the header is the model's"),
        CheckResult(
            gate="tokenizer",
            name=name,
            passed=not of_tokenizer,
            detail=listed(of_tokenizer) or "the header has the reference's tokens, merges and templates",
        ),
    ]


def _check_beside(reference: Reference, opened: ArtifactFolder) -> list[CheckResult]:
    """Compares the files beside config.json and the weights with the reference's, and the tokenizers as loaded.

    Of files made from a header only the tokens count.
    """
    artifact = opened.artifact
    files, merged = read_sidecars(artifact.folder), reference.merged
    tokenizer = tokenizer_from_files(files, artifact.config, name=opened.name) if has_tokenizer(files) else None
    base = TokenizerFolder(reference.tokenizer, merged.files, merged.config)
    own = TokenizerFolder(tokenizer, files, artifact.config)
    tokens = preflight(
        base,
        own,
        prompts=reference.prompts.prompt_set.prompts if reference.prompts else (),
        embedding_rows=merged.architecture.structure.vocab_size,
        texts=reference.held_out.texts,
    )
    return tokens if opened.from_header else [*check_files(merged, artifact, base, own), *tokens]
