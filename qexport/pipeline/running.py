"""One run, from the recipe to the published artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.architectures.devices import find_device
from qexport.artifact.digests import taken_meanwhile
from qexport.artifact.disk import ensure_space
from qexport.artifact.figures import Verdict, overall
from qexport.artifact.manifest import REPORT_FOLDER, Manifest
from qexport.artifact.publish import Publication, check_output
from qexport.artifact.report import Report
from qexport.errors import RecipeError
from qexport.export.tensor_writer import WrittenWeights
from qexport.pipeline.judging import refuse_unmeasurable, refuse_unproven_merge
from qexport.pipeline.opened import Opened, open_folder
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.recording import Record, make_manifest, make_record
from qexport.pipeline.reference import Reference
from qexport.pipeline.texts import Evaluation, Texts, read_texts
from qexport.pipeline.verification import measure_folder
from qexport.progress import Progress, Reporter, silent
from qexport.reading.stored_model import holds_graph
from qexport.recipe.model import Recipe
from qexport.records import LayerRecord
from qexport.reporting.writing import write_report
from qexport.verifying.verification import check_headers


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        artifact_path: the published folder, or the one set aside where a gate failed.
        manifests: the manifest of each layout's folder, by the layout's name, in the recipe's order.
        reports: the report of each layout's folder; empty where the recipe has no `verify`.
        verdict: over all gates.
    """

    artifact_path: Path
    manifests: Mapping[str, Manifest]
    reports: Mapping[str, Report]
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """Every gate passed."""
        return self.verdict == "pass"

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first layout."""
        return next(iter(self.manifests.values()))


def run(
    recipe: Recipe,
    *,
    force: bool = False,
    device: str = "auto",
    command: str = "qexport verify . --reference RECIPE.yaml",
    report: Reporter = silent,
) -> Result:
    """Merges, quantizes, exports and verifies; publishes the artifact with one rename.

    Where a gate fails or is undecided, the artifact is set aside as `<output>.rejected/`, and the result says so.

    Args:
        recipe: what to make of which model.
        force: replace an output folder that is not empty.
        device: `auto`, `cpu` or `cuda`.
        command: for the report, what measures the same again.
        report: is told of progress, and of what a user should know.

    Raises:
        GateFailed: the merge is not what PEFT makes of the adapter; found out before anything is quantized.
        GateUndecided: that could not be found out, and the recipe does not waive the gate.
        QexportError: one of its kinds, see `qexport.errors`. Nothing new is at the final path then.
    """
    output, where = _output(recipe, force=force), find_device(device)
    planned = plan(recipe, report=report)
    ensure_space(output, planned.total_bytes)
    for layout in planned.layouts:
        layout.prepare()
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure, report=report)
    with Publication(output, force=force) as publication:
        with taken_meanwhile(planned.merged.checkpoint.origin.sha256):
            reference = _reference(planned, texts.evaluation, where, report)
            layers, written = _write(planned, texts, publication.folder, where, report)
        records = [
            make_record(planned, layout, publication.folder, layers, written[layout.name]) for layout in planned.layouts
        ]
        with ExitStack() as hashing:
            for weights in written.values():
                hashing.enter_context(taken_meanwhile(weights.files))
            reports = _check(planned, reference, records, command, report)
        manifests = {}
        for record in records:
            found = reports.get(record.layout.name)
            if found:
                write_report(found, record.folder / REPORT_FOLDER)
            manifests[record.layout.name] = make_manifest(planned, texts.calibration, record, found, where)
            manifests[record.layout.name].write(record.folder)
        verdict = overall(each.verdict for each in reports.values())
        path = publication.publish() if verdict == "pass" else publication.reject()
    return Result(path, manifests, reports, verdict)


def _reference(
    planned: Plan, evaluation: Evaluation | None, device: torch.device, report: Reporter
) -> Reference | None:
    """Measures the reference alone, so that what can be known before the work is not found out after it.

    Raises:
        RecipeError: a limit of the recipe is tighter than three times the noise floor.
        GateFailed: the merge is not what PEFT makes of the adapter.
        GateUndecided: that could not be found out, and the gate is not waived.
    """
    settings = planned.recipe.verify
    if evaluation is None or settings is None:
        return None
    dtype: torch.dtype = getattr(torch, planned.recipe.merge.dtype)
    reference = Reference.prepare(planned.merged, evaluation, settings, dtype=dtype, device=device, report=report)
    refuse_unmeasurable(settings, reference.prepared)
    if planned.merged.adapter is not None:
        refuse_unproven_merge(settings, reference.prepared)
    return reference


def _write(
    planned: Plan, texts: Texts, output: Path, device: torch.device, report: Reporter
) -> tuple[list[LayerRecord], dict[str, WrittenWeights]]:
    """The one pass, and what lies beside the weights.

    Layouts that want the same weights get them once, as links to the same files.
    """
    for layout in planned.layouts:
        planned.folder(output, layout).mkdir(exist_ok=True)
    layers, weights_of = _write_weights(planned, texts, output, device, report)
    report(Progress("export", 0, len(planned.layouts), "layout", "finishing"))
    written: dict[str, WrittenWeights] = {}
    for group, weights in zip(planned.distinct, weights_of, strict=True):
        for layout in group:
            folder = planned.folder(output, layout)
            if layout is not group[0]:
                weights.link_into(planned.folder(output, group[0]), folder)
            layout.write_files(folder, planned.merged.checkpoint)
            written[layout.name] = weights
            report(Progress("export", len(written), len(planned.layouts), "layout", layout.name))
    return layers, written


def _write_weights(
    planned: Plan, texts: Texts, output: Path, device: torch.device, report: Reporter
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
        report=report,
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


def _check(
    planned: Plan, reference: Reference | None, records: Sequence[Record], command: str, report: Reporter
) -> dict[str, Report]:
    """Reads every folder back; weights that layouts share are measured once, their other files are not the same."""
    reports: dict[str, Report] = {}
    for group in planned.distinct:
        members = [record for record in records if record.layout in group]
        for record in members:
            weights, checked = record.layout.weights, None if record is members[0] else members[0].folder
            weights.read_back(record.folder, record.written, checked=checked)
            record.layout.check(record.folder)
            check_headers(planned.merged.checkpoint, record.folder)
        if reference is None:
            continue
        for alike in _alike(members):
            folders = [_open(planned, record) for record in alike]
            verified = measure_folder(reference, folders[0], report=report)
            for record, opened in zip(alike, folders, strict=True):
                unread = record.layout.readers
                reports[record.layout.name] = verified.report_on(opened, command=command, unread=unread)
    return reports


def _alike(records: Sequence[Record]) -> list[list[Record]]:
    """Those together that are run alike: a graph computes by itself, even where it shares the files of its weights."""
    graphs = [record for record in records if holds_graph(record.folder)]
    others = [record for record in records if record not in graphs]
    return [alike for alike in (others, graphs) if alike]


def _open(planned: Plan, record: Record) -> Opened:
    merged = planned.merged
    origins = [merged.checkpoint.origin, *([merged.adapter.origin] if merged.adapter else [])]
    return open_folder(
        record.folder,
        planned.structure,
        getattr(torch, planned.recipe.merge.dtype),
        name=" + ".join(origin.name.rpartition("/")[2] for origin in origins),
        layouts=[record.layout.name],
        layers=record.layers,
        digests=record.written.files,
    )


def _output(recipe: Recipe, *, force: bool) -> Path:
    if recipe.output is None:
        raise RecipeError("the recipe names no output", where="output", mend="add `output:`, or give --output DIR")
    return check_output(Path(recipe.output), force=force)
