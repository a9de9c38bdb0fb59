"""One run, from the recipe to the published artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from qexport.architectures.devices import find_device
from qexport.architectures.memory import keeping_to
from qexport.artifact.digests import hashed_in_background
from qexport.artifact.disk import ensure_space
from qexport.artifact.figures import overall
from qexport.artifact.integrity import write_listing
from qexport.artifact.manifest import REPORT_FOLDER, Manifest
from qexport.artifact.publish import Publication, temporary_path
from qexport.artifact.report import Report
from qexport.artifact.roots import recording_roots
from qexport.execution import execution_of
from qexport.execution.workers import Execution
from qexport.export.layouts import Layout
from qexport.export.tensor_writer import WrittenWeights
from qexport.export.weight_files import WeightWriter
from qexport.hidden_packages import hidden
from qexport.pipeline.attempts import Attempts
from qexport.pipeline.finished import FinishedRun
from qexport.pipeline.folders import LayoutFolder, open_layout
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.recording import make_manifest, write_card
from qexport.pipeline.reference import prepare_reference, refuse_unmeasurable, unproven_merge
from qexport.pipeline.result import Result, UnprovenMerge
from qexport.pipeline.resuming import RunJournal, open_journal
from qexport.pipeline.runtimes import runtimes_of
from qexport.pipeline.serving import NOT_SERVED, ServedArtifact, measure_through
from qexport.pipeline.sharing import NOTHING_SHARED, SharedWork
from qexport.pipeline.texts import Evaluation, Texts, read_texts
from qexport.pipeline.verification import Verified, measure_folder
from qexport.progress import Notice, Progress, ProgressCallback, silent
from qexport.quantizing.method import PassInputs
from qexport.reading.stored_model import Kind
from qexport.recipe import Recipe, checked_output
from qexport.records import LayerRecord
from qexport.reporting.writing import write_report
from qexport.verifying.reference import Reference
from qexport.verifying.verification import check_headers


@dataclass(frozen=True)
class _Work:
    """What a run works with, whatever its plan becomes.

    Attributes:
        texts: for calibration and verification.
        folder: the temporary one.
        device: where to compute.
        journal: keeps what is finished.
        execution: the workers.
        command: repeats the measurement.
        progress: is called with each step.
    """

    texts: Texts
    folder: Path
    device: torch.device
    journal: RunJournal
    execution: Execution
    command: str
    progress: ProgressCallback


@hidden("kernels")
def run(
    recipe: Recipe,
    *,
    force: bool = False,
    restart: bool = False,
    device: str = "auto",
    command: str = "qexport verify . --reference RECIPE.yaml",
    accept: Callable[[Plan], None] = lambda planned: None,
    recorded: Manifest | None = None,
    shared: SharedWork = NOTHING_SHARED,
    execution: Execution | None = None,
    progress: ProgressCallback = silent,
) -> Result:
    """Merges, quantizes, exports and verifies; publishes the artifact with one rename.

    If a gate fails or is undecided, the artifact is set aside as `<output>.rejected/`; if the merge differs from
    PEFT's, nothing is quantized. The result says so; see `Result.raise_for_verdict`. Where an artifact misses the
    target of the method `mixed`, the model is quantized and verified again, at most twice, with a larger choice.

    A run that was stopped (by Ctrl-C, a kill, a full or failing disk) is continued by the next run of the same recipe,
    and ends with the same bytes.

    Args:
        recipe: the model, the method, the layouts and the gates.
        force: replace an output folder that is not empty.
        restart: begin again, without what an interrupted run has finished.
        device: `auto`, `cpu` or `cuda`.
        command: for the report, the command that repeats the measurement.
        accept: is called with the plan before any work; what it raises ends the run.
        recorded: the manifest of an artifact, whose choice the method `mixed` takes over; None to choose.
        shared: what the other variants of a sweep have measured of the reference, and this run measures.
        execution: workers that there are already; None for those that the recipe asks for.
        progress: is called with each step, and with what a user should know.

    Raises:
        QexportError: one of its subclasses, see `qexport.errors`. The final path is unchanged then.
    """
    output, where = checked_output(recipe, force=force), find_device(device)
    planned = plan(recipe, progress=progress)
    for line in planned.short_lines():
        progress(Notice(line))
    accept(planned)
    if where.type == "cpu":
        planned.expected.refuse_beyond(recipe.max_memory)
    ensure_space(output, planned.expected.disk, replaced=temporary_path(output))
    for layout in planned.layouts:
        layout.prepare()
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure, progress=progress)
    finished = FinishedRun(planned, texts, where)
    publication = Publication(output, force=force, made_here=lambda folder: not restart and finished.is_in(folder))
    with keeping_to(planned.expected.budget), publication:
        if publication.finished:
            progress(Notice("publishing what an interrupted run has finished"))
            return _publish(planned, publication, finished.manifests, finished.reports, finished.roots)
        journal = open_journal(publication, planned, texts, where, restart=restart, progress=progress)
        workers = execution_of(recipe.execution, where) if execution is None else nullcontext(execution)
        with workers as execution, hashed_in_background(planned.merged.checkpoint.origin.sha256):
            reference = _reference(planned, texts.evaluation, where, journal, shared, progress)
            if unproven := _unproven_merge(planned, reference):
                return Result(None, {}, {}, unproven.gate.verdict, unproven)
            if reference and journal.prepared is None:
                journal.note_prepared(reference.prepared)
            work = _Work(texts, publication.folder, where, journal, execution, command, progress)
            attempts = Attempts(planned, texts, output, where, execution, journal, recorded, progress)
            attempt: Plan | None = attempts.first()
            while attempt is not None:
                planned = attempt
                folders, reports = _attempt(planned, reference, work)
                attempt = attempts.after(reports)
        journal.refuse_changed_base()
        manifests, roots = _record(planned, texts, folders, reports, where)
        return _publish(planned, publication, manifests, reports, roots)


def _reference(
    planned: Plan,
    evaluation: Evaluation | None,
    device: torch.device,
    journal: RunJournal,
    shared: SharedWork,
    progress: ProgressCallback,
) -> Reference | None:
    """Measures what needs only the reference, so that wrong limits and a wrong merge are found before quantizing."""
    settings = planned.recipe.verify
    if evaluation is None or settings is None:
        return None
    dtype: torch.dtype = getattr(torch, planned.recipe.merge.dtype)
    reference = prepare_reference(
        planned.merged,
        evaluation,
        settings,
        dtype=dtype,
        device=device,
        earlier=journal.prepared,
        kept=shared.of_reference(planned, evaluation, device),
        ends_early=shared.ends_early,
        progress=progress,
    )
    refuse_unmeasurable(settings, reference.prepared)
    return reference


def _unproven_merge(planned: Plan, reference: Reference | None) -> UnprovenMerge | None:
    settings = planned.recipe.verify
    if reference is None or settings is None or planned.merged.adapter is None:
        return None
    return unproven_merge(settings, reference.prepared)


def _attempt(
    planned: Plan, reference: Reference | None, work: _Work
) -> tuple[dict[str, LayoutFolder], dict[str, Report]]:
    """Quantizes, exports and verifies. Returns folders and reports by layout name; the folders are closed again."""
    layers, written = _write(planned, work)
    with ExitStack() as stack:
        for weights in written.values():
            stack.enter_context(hashed_in_background(weights.files))
        folders = _read_back(planned, work.folder, layers, written, stack)
        return folders, _measure(planned, reference, folders, work)


def _write(planned: Plan, work: _Work) -> tuple[list[LayerRecord], dict[str, WrittenWeights]]:
    """Writes the weights in one pass, then the other files of each layout.

    Weights that layouts share are written once; the other layouts get links to the files.
    """
    layers, weights_of = _write_weights(planned, work)
    progress, output = work.progress, work.folder
    progress(Progress("export", 0, len(planned.layouts), "layout", "finishing"))
    written: dict[str, WrittenWeights] = {}
    for group, weights in zip(planned.distinct, weights_of, strict=True):
        for layout in group:
            folder = planned.folder(output, layout)
            folder.mkdir(exist_ok=True)
            if layout is not group[0]:
                weights.link_into(planned.folder(output, group[0]), folder)
            layout.write_files(folder, planned.merged.checkpoint)
            written[layout.name] = weights
            progress(Progress("export", len(written), len(planned.layouts), "layout", layout.name))
    return layers, written


def _write_weights(planned: Plan, work: _Work) -> tuple[list[LayerRecord], list[WrittenWeights]]:
    """Every tensor is read, merged, quantized and handed to the writers before the next block is read."""
    layers: list[LayerRecord] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(_writer(planned, work.folder, group[0])) for group in planned.distinct]
        with work.journal.units(writers, layers) as resume:
            inputs = PassInputs(
                planned.merged.checkpoint,
                planned.outputs,
                work.texts.calibration,
                dtype=getattr(torch, planned.recipe.merge.dtype),
                device=work.device,
                scratch=work.folder,
                execution=work.execution,
                resume=resume,
                progress=work.progress,
            )
            for record in planned.method.quantize(inputs):
                if record.layer:
                    layers.append(record.layer)
                for writer in writers:
                    writer.write(record)
        return layers, [writer.finish() for writer in writers]


def _writer(planned: Plan, output: Path, layout: Layout) -> WeightWriter:
    folder = planned.folder(output, layout)
    folder.mkdir(exist_ok=True)
    return layout.weights.writer(folder)


def _read_back(
    planned: Plan, output: Path, layers: Sequence[LayerRecord], written: Mapping[str, WrittenWeights], stack: ExitStack
) -> dict[str, LayoutFolder]:
    """Reads every folder back from disk, and leaves it open until the stack is closed.

    Returns:
        The folders by layout name; those that share weights follow one another.
    """
    folders: dict[str, LayoutFolder] = {}
    for group in planned.distinct:
        first = planned.folder(output, group[0])
        for layout in group:
            path, weights = planned.folder(output, layout), written[layout.name]
            layout.weights.read_back(path, weights, checked=None if layout is group[0] else first)
            layout.check(path)
            folder = stack.enter_context(open_layout(planned, layout, path, layers, weights))
            check_headers(planned.merged.checkpoint, folder.opened.artifact)
            folders[layout.name] = folder
    return folders


def _measure(
    planned: Plan, reference: Reference | None, folders: Mapping[str, LayoutFolder], work: _Work
) -> dict[str, Report]:
    """Weights that layouts share are measured once. Each folder gets its own report, since its other files differ."""
    reports: dict[str, Report] = {}
    if reference is None:
        return reports
    for group in planned.distinct:
        for same_kind in _grouped_by_kind([folders[layout.name] for layout in group]):
            first = same_kind[0]
            looks = work.journal.looks(f"{first.layout.name}, {first.opened.artifact.kind}")
            verified = measure_folder(
                reference, first.opened, looks=looks, execution=work.execution, progress=work.progress
            )
            served = _serve(planned, verified, same_kind, work.progress)
            for folder, found in zip(same_kind, served, strict=True):
                reports[folder.layout.name] = verified.report_on(
                    folder.opened, served=found, made=planned.protected.notes, command=work.command
                )
    return reports


def _serve(
    planned: Plan, verified: Verified, folders: Sequence[LayoutFolder], progress: ProgressCallback
) -> list[ServedArtifact]:
    """What the runtimes make of layouts with the same weights. Each serves one of them: they differ in small files."""
    if verified.measured.ended_early:
        return [NOT_SERVED] * len(folders)
    layouts, served = [layout.name for layout in planned.layouts], list[ServedArtifact]()
    for folder in folders:
        own, unasked = runtimes_of(folder.layout.name, verified.reference.settings, layouts)
        found = measure_through(verified.reference, folder.opened, verified.gates, own, progress=progress)
        served.append(replace(found, unconfirmed=[*found.unconfirmed, *unasked]))
    names = (folder.layout.name for folder, found in zip(folders, served, strict=True) if found.records)
    if (name := next(names, None)) is None:
        return served
    return [found if found.records else found.decided_in(name) for found in served]


def _record(
    planned: Plan,
    texts: Texts,
    folders: Mapping[str, LayoutFolder],
    reports: Mapping[str, Report],
    device: torch.device,
) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Writes report, card, manifest and listing into each folder, in this order; returns manifests and root digests."""
    manifests, roots, merged = dict[str, Manifest](), dict[str, str](), planned.merged
    for name in (layout.name for layout in planned.layouts):
        folder, found = folders[name], reports.get(name)
        path = folder.opened.artifact.folder
        if found:
            write_report(found, path / REPORT_FOLDER)
        write_card(folder, merged.checkpoint.origin, merged.checkpoint.adapter, found)
        manifests[name] = make_manifest(planned, texts.calibration, folder, found, device)
        manifests[name].write(path)
        roots[name] = write_listing(path, manifests[name])
    return manifests, roots


def _publish(
    planned: Plan,
    publication: Publication,
    manifests: Mapping[str, Manifest],
    reports: Mapping[str, Report],
    roots: Mapping[str, str],
) -> Result:
    """Moves the finished folder to its path, with the root digest of each layout in a file beside it."""
    verdict = overall(each.verdict for each in reports.values())
    passed = verdict == "pass"
    target = publication.output if passed else publication.rejected
    inside = {str(planned.folder(Path(), layout)): roots[layout.name] for layout in planned.layouts}
    with recording_roots(target, inside):
        path = publication.publish() if passed else publication.reject()
    return Result(path, manifests, reports, verdict, roots=roots)


def _grouped_by_kind(folders: Sequence[LayoutFolder]) -> list[list[LayoutFolder]]:
    """A graph is run differently, and so measured apart, even if it shares the files of its weights."""
    kinds = get_args(Kind)
    groups = ([folder for folder in folders if folder.opened.artifact.kind == kind] for kind in kinds)
    return [group for group in groups if group]
