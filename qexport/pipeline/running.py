"""One run, from the recipe to the published artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from qexport.architectures.devices import find_device
from qexport.architectures.memory import keeping_to
from qexport.artifact.digests import hashed_in_background
from qexport.artifact.disk import ensure_space
from qexport.artifact.figures import overall
from qexport.artifact.manifest import REPORT_FOLDER
from qexport.artifact.publish import Publication, check_output
from qexport.artifact.report import Report
from qexport.errors import RecipeError
from qexport.export.tensor_writer import WrittenWeights
from qexport.hidden_packages import hidden
from qexport.pipeline.folders import LayoutFolder, open_layout
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.recording import make_manifest
from qexport.pipeline.reference import prepare_reference, refuse_unmeasurable, unproven_merge
from qexport.pipeline.result import Result, UnprovenMerge
from qexport.pipeline.texts import Evaluation, Texts, read_texts
from qexport.pipeline.verification import measure_folder
from qexport.progress import Progress, ProgressCallback, silent
from qexport.recipe import Recipe
from qexport.records import LayerRecord
from qexport.reporting.writing import write_report
from qexport.verifying.reference import Reference
from qexport.verifying.verification import check_headers


@hidden("kernels")
def run(
    recipe: Recipe,
    *,
    force: bool = False,
    device: str = "auto",
    command: str = "qexport verify . --reference RECIPE.yaml",
    progress: ProgressCallback = silent,
) -> Result:
    """Merges, quantizes, exports and verifies; publishes the artifact with one rename.

    If a gate fails or is undecided, the artifact is set aside as `<output>.rejected/`; if the merge differs from
    PEFT's, nothing is quantized. The result says so; see `Result.raise_for_verdict`.

    Args:
        recipe: the model, the method, the layouts and the gates.
        force: replace an output folder that is not empty.
        device: `auto`, `cpu` or `cuda`.
        command: for the report, the command that repeats the measurement.
        progress: is called with each step, and with what a user should know.

    Raises:
        QexportError: one of its subclasses, see `qexport.errors`. The final path is unchanged then.
    """
    output, where = _output(recipe, force=force), find_device(device)
    planned = plan(recipe, progress=progress)
    if where.type == "cpu":
        planned.expected.refuse_beyond(recipe.max_memory)
    ensure_space(output, planned.expected.disk)
    for layout in planned.layouts:
        layout.prepare()
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure, progress=progress)
    with keeping_to(planned.expected.budget), Publication(output, force=force) as publication:
        with hashed_in_background(planned.merged.checkpoint.origin.sha256):
            reference = _reference(planned, texts.evaluation, where, progress)
            if unproven := _unproven_merge(planned, reference):
                return Result(None, {}, {}, unproven.gate.verdict, unproven)
            layers, written = _write(planned, texts, publication.folder, where, progress)
        with ExitStack() as stack:
            for weights in written.values():
                stack.enter_context(hashed_in_background(weights.files))
            folders = _read_back(planned, publication.folder, layers, written, stack)
            reports = _measure(planned, reference, folders, command, progress)
        manifests = {}
        for layout in planned.layouts:
            folder, found = folders[layout.name], reports.get(layout.name)
            path = folder.opened.artifact.folder
            if found:
                write_report(found, path / REPORT_FOLDER)
            manifests[layout.name] = make_manifest(planned, texts.calibration, folder, found, where)
            manifests[layout.name].write(path)
        verdict = overall(each.verdict for each in reports.values())
        path = publication.publish() if verdict == "pass" else publication.reject()
    return Result(path, manifests, reports, verdict)


def _reference(
    planned: Plan, evaluation: Evaluation | None, device: torch.device, progress: ProgressCallback
) -> Reference | None:
    """Measures what needs only the reference, so that wrong limits and a wrong merge are found before quantizing."""
    settings = planned.recipe.verify
    if evaluation is None or settings is None:
        return None
    dtype: torch.dtype = getattr(torch, planned.recipe.merge.dtype)
    reference = prepare_reference(planned.merged, evaluation, settings, dtype=dtype, device=device, progress=progress)
    refuse_unmeasurable(settings, reference.prepared)
    return reference


def _unproven_merge(planned: Plan, reference: Reference | None) -> UnprovenMerge | None:
    settings = planned.recipe.verify
    if reference is None or settings is None or planned.merged.adapter is None:
        return None
    return unproven_merge(settings, reference.prepared)


def _write(
    planned: Plan, texts: Texts, output: Path, device: torch.device, progress: ProgressCallback
) -> tuple[list[LayerRecord], dict[str, WrittenWeights]]:
    """Writes the weights in one pass, then the other files of each layout.

    Weights that layouts share are written once; the other layouts get links to the files.
    """
    for layout in planned.layouts:
        planned.folder(output, layout).mkdir(exist_ok=True)
    layers, weights_of = _write_weights(planned, texts, output, device, progress)
    progress(Progress("export", 0, len(planned.layouts), "layout", "finishing"))
    written: dict[str, WrittenWeights] = {}
    for group, weights in zip(planned.distinct, weights_of, strict=True):
        for layout in group:
            folder = planned.folder(output, layout)
            if layout is not group[0]:
                weights.link_into(planned.folder(output, group[0]), folder)
            layout.write_files(folder, planned.merged.checkpoint)
            written[layout.name] = weights
            progress(Progress("export", len(written), len(planned.layouts), "layout", layout.name))
    return layers, written


def _write_weights(
    planned: Plan, texts: Texts, output: Path, device: torch.device, progress: ProgressCallback
) -> tuple[list[LayerRecord], list[WrittenWeights]]:
    """Every tensor is read, merged, quantized and handed to the writers before the next block is read."""
    layers: list[LayerRecord] = []
    stream = planned.recipe.quantize.quantize(
        planned.merged.checkpoint,
        planned.outputs,
        texts.calibration,
        dtype=getattr(torch, planned.recipe.merge.dtype),
        device=device,
        scratch=output,
        progress=progress,
    )
    with ExitStack() as stack:
        writers = [
            stack.enter_context(group[0].weights.writer(planned.folder(output, group[0]))) for group in planned.distinct
        ]
        for record in stream:
            for writer in writers:
                writer.write(record)
            if record.layer:
                layers.append(record.layer)
        return layers, [writer.finish() for writer in writers]


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
    planned: Plan,
    reference: Reference | None,
    folders: Mapping[str, LayoutFolder],
    command: str,
    progress: ProgressCallback,
) -> dict[str, Report]:
    """Weights that layouts share are measured once. Each folder gets its own report, since its other files differ."""
    reports: dict[str, Report] = {}
    if reference is None:
        return reports
    for group in planned.distinct:
        for same_kind in _grouped_by_kind([folders[layout.name] for layout in group]):
            verified = measure_folder(reference, same_kind[0].opened, progress=progress)
            for folder in same_kind:
                reports[folder.layout.name] = verified.report_on(folder.opened, command=command)
    return reports


def _grouped_by_kind(folders: Sequence[LayoutFolder]) -> list[list[LayoutFolder]]:
    """A graph is run differently, and so measured apart, even if it shares the files of its weights."""
    kinds = ("weights", "graph")
    groups = ([folder for folder in folders if folder.opened.artifact.kind == kind] for kind in kinds)
    return [group for group in groups if group]


def _output(recipe: Recipe, *, force: bool) -> Path:
    if recipe.output is None:
        raise RecipeError("the recipe names no output", where="output", mend="add `output:`, or give --output DIR")
    return check_output(Path(recipe.output), force=force)
