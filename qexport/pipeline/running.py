"""One run, from the recipe to the published artifact."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.architectures.devices import find_device
from qexport.artifact.disk import ensure_space
from qexport.artifact.file_digests import taken_meanwhile
from qexport.artifact.manifest import Manifest, Verification
from qexport.artifact.publish import Publication, check_output
from qexport.errors import RecipeError
from qexport.export import readback
from qexport.export.weight_files import WrittenWeights
from qexport.loading.tokenizer import open_tokenizer
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.recording import Record, make_manifest
from qexport.pipeline.texts import Texts, read_texts
from qexport.progress import Notice, Progress, Reporter, silent
from qexport.quantize.methods import quantize
from qexport.recipe.model import Recipe
from qexport.tensors import LayerReport
from qexport.verifying.verification import check_headers, verify


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        artifact_path: the published folder, or the one set aside where a gate failed.
        manifests: the manifest of each layout's folder, by the layout's name, in the recipe's order.
        passed: every gate passed.
    """

    artifact_path: Path
    manifests: Mapping[str, Manifest]
    passed: bool

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first layout."""
        return next(iter(self.manifests.values()))


def run(recipe: Recipe, *, force: bool = False, device: str = "auto", report: Reporter = silent) -> Result:
    """Merges, quantizes, exports and verifies; publishes the artifact with one rename.

    Where a gate fails, the artifact is set aside as `<output>.rejected/`, and the result says so.

    Args:
        recipe: what to make of which model.
        force: replace an output folder that is not empty.
        device: `auto`, `cpu` or `cuda`.
        report: is told of progress, and of what a user should know.

    Raises:
        QexportError: one of its kinds, see `qexport.errors`. Nothing new is at the final path then.
    """
    output, where = _output(recipe, force=force), find_device(device)
    planned = plan(recipe, report=report)
    ensure_space(output, planned.total_bytes)
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure)
    for prompt, reason in texts.prompts.skipped.items() if texts.prompts else ():
        report(Notice(f"the prompt {prompt} is not continued: {reason}"))
    with Publication(output, force=force) as publication:
        with taken_meanwhile(planned.merged.checkpoint.origin.sha256):
            layers, written = _write(planned, texts, publication.folder, where, report)
        with ExitStack() as hashing:
            for weights in written.values():
                hashing.enter_context(taken_meanwhile(weights.files))
            figures = _check(planned, texts, written, publication.folder, where, report)
        manifests = {}
        for layout in planned.layouts:
            folder = planned.folder(publication.folder, layout)
            record = Record(layout, layers, written[layout.name], figures[layout.name])
            manifests[layout.name] = make_manifest(planned, texts.calibration, record, folder, where)
            manifests[layout.name].write(folder)
        passed = all(gate.passed for each in figures.values() if each for gate in each.gates)
        path = publication.publish() if passed else publication.reject()
    return Result(path, manifests, passed)


def _write(
    planned: Plan, texts: Texts, output: Path, device: torch.device, report: Reporter
) -> tuple[list[LayerReport], dict[str, WrittenWeights]]:
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
) -> tuple[list[LayerReport], list[WrittenWeights]]:
    """Every tensor is read, merged, quantized and handed to the writers before the next block is read."""
    layers: list[LayerReport] = []
    stream = quantize(
        planned.merged.checkpoint,
        planned.outputs,
        planned.recipe.quantize,
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
            if record.report:
                layers.append(record.report)
        return layers, [writer.finish() for writer in writers]


def _check(
    planned: Plan,
    texts: Texts,
    written: Mapping[str, WrittenWeights],
    output: Path,
    device: torch.device,
    report: Reporter,
) -> dict[str, Verification | None]:
    """Reads every folder back; weights that layouts share are measured once, their configs are not the same."""
    figures: dict[str, Verification | None] = {}
    for group in planned.distinct:
        for layout in group:
            folder = planned.folder(output, layout)
            first = None if layout is group[0] else planned.folder(output, group[0])
            readback.check(folder, written[layout.name], checked=first)
            layout.check(folder)
            check_headers(planned.merged.checkpoint, folder)
        measured = _verify(planned, texts, planned.folder(output, group[0]), device, report)
        figures |= dict.fromkeys((layout.name for layout in group), measured)
    return figures


def _verify(planned: Plan, texts: Texts, folder: Path, device: torch.device, report: Reporter) -> Verification | None:
    if planned.recipe.verify is None or texts.held_out is None:
        return None
    return verify(
        planned.merged.checkpoint,
        folder,
        texts.held_out,
        texts.prompts.prompts if texts.prompts else (),
        planned.recipe.verify,
        open_tokenizer(planned.merged.checkpoint),
        dtype=getattr(torch, planned.recipe.merge.dtype),
        device=device,
        report=report,
    )


def _output(recipe: Recipe, *, force: bool) -> Path:
    if recipe.output is None:
        raise RecipeError("the recipe names no output", where="output", mend="add `output:`, or give --output DIR")
    return check_output(Path(recipe.output), force=force)
