"""One run, from the recipe to the published artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.artifact.disk import ensure_space
from qexport.artifact.manifest import Manifest, Verification
from qexport.artifact.publish import Publication, check_output
from qexport.errors import RecipeError
from qexport.export import readback
from qexport.export.safetensors_layout import Written
from qexport.load.tokenizer import open_tokenizer
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.recording import make_manifest
from qexport.pipeline.texts import Texts, read_texts
from qexport.progress import Progress, Reporter, silent
from qexport.quantize.gptq import quantize
from qexport.recipe.model import Recipe
from qexport.tensors import LayerReport
from qexport.verify.verification import verify


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        artifact_path: the published folder, or the one set aside where a gate failed.
        manifest: its manifest.
        passed: every gate passed.
    """

    artifact_path: Path
    manifest: Manifest
    passed: bool


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
    output, where = _output(recipe, force=force), _device(device)
    planned = plan(recipe, report=report)
    ensure_space(output, planned.layout.total_bytes)
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure.vocab_size)
    with Publication(output, force=force) as publication:
        layers, written = _write(planned, texts, publication.folder, where, report)
        readback.check(publication.folder, planned.layout.specs, written.digests)
        figures = _verify(planned, texts, publication.folder, where, report)
        manifest = make_manifest(planned, texts.calibration, layers, written, figures, publication.folder, where)
        manifest.write(publication.folder)
        passed = figures is None or all(gate.passed for gate in figures.gates)
        path = publication.publish() if passed else publication.reject()
    return Result(path, manifest, passed)


def _write(
    planned: Plan, texts: Texts, folder: Path, device: torch.device, report: Reporter
) -> tuple[list[LayerReport], Written]:
    """The one pass: every tensor is read, merged, quantized and written before the next block is read."""
    layers: list[LayerReport] = []
    writer = planned.layout.writer(folder)
    stream = quantize(
        planned.merged.checkpoint,
        planned.recipe.quantize,
        texts.calibration,
        dtype=getattr(torch, planned.recipe.merge.dtype),
        device=device,
        scratch=folder,
        report=report,
    )
    for record in stream:
        writer.write(record)
        if record.report:
            layers.append(record.report)
    report(Progress("export", 0, 1, "layout", "finishing"))
    written = writer.finish(planned.merged.checkpoint, planned.recipe.quantize)
    report(Progress("export", 1, 1, "layout", f"{written.total_bytes / 1e6:,.0f} MB"))
    return layers, written


def _verify(planned: Plan, texts: Texts, folder: Path, device: torch.device, report: Reporter) -> Verification | None:
    if planned.recipe.verify is None or texts.held_out is None:
        return None
    return verify(
        planned.merged.checkpoint,
        folder,
        texts.held_out,
        texts.prompts,
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


def _device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError("there is no CUDA device", where="--device cuda", mend="use --device cpu, or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
