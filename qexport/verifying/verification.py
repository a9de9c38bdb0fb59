"""The finished artifact, read back from disk, held against the merged reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from transformers import PreTrainedTokenizerBase

from qexport.architectures.config_keys import without_code_keys
from qexport.architectures.memory import resident
from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import describe
from qexport.artifact.figures import CheckResult, Figure, GateResult
from qexport.artifact.measurements import BlockDrift, Generations, TaskRecord, Timings
from qexport.errors import listed
from qexport.gates.deciding import needs_more
from qexport.progress import Reporter, silent
from qexport.reading.stored_model import StoredModel, holds_graph, open_stored
from qexport.statistics.sequences import PLANNED_UNITS
from qexport.tensors import Checkpoint, GroupQuantizedSpec, WeightSource
from qexport.text.held_out import HeldOut
from qexport.text.prompts import EncodedPrompts
from qexport.verifying.config_comparison import config_differences, refuse_other_config
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.estimates import Units, divergence_figures, rival_figures
from qexport.verifying.preparation import Preparation
from qexport.verifying.rounds import Measured, Models, measure
from qexport.verifying.settings import VerifySettings
from qexport.verifying.speed import MeasuredSpeed
from qexport.verifying.steps import Steps
from qexport.verifying.whole_models import Pair, measure_speed, measure_whole

if TYPE_CHECKING:
    from qexport.verifying.graphs import GraphRunner

Nearest = Callable[[Mapping[str, GroupQuantizedSpec], frozenset[str]], WeightSource]
"""From the grids of an artifact's layers, and the layers whose weights are [in, out] in files, to the merged model
rounded to nearest on those grids."""

Judge = Callable[[Sequence[Figure]], list[GateResult]]
"""The gates on figures, decided on what is known."""

_COARSE_BITS: Final = 4
"""With more, rounding to nearest is so near the reference that hardly anything can be nearer by more than noise."""


@dataclass(frozen=True)
class Given:
    """What an artifact is held against, and on what.

    Attributes:
        reference: the merged model, read from its source again.
        base: the model without the adapter, None where there is none or it has other shapes.
        nearest: makes the merged model rounded to nearest.
        prepared: what was measured of the reference alone.
        held_out: the text, as many windows as may be taken.
        prompts: what both models continue; None for nothing.
        tokenizer: the reference's.
        settings: the recipe's `verify`.
        dtype: what the blocks compute in: the merged model's dtype.
        device: where to compute.
    """

    reference: Checkpoint
    base: Checkpoint | None
    nearest: Nearest
    prepared: Preparation
    held_out: HeldOut
    prompts: EncodedPrompts | None
    tokenizer: PreTrainedTokenizerBase
    settings: VerifySettings
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Measurement:
    """What was found.

    Attributes:
        figures: of the held-out text and the prompts.
        tokens: the artifact against the reference, for every predicted token.
        looks: how many windows had been measured at each look at the gates.
        block_drift: see `qexport.verifying.predictors`; empty for an ONNX graph, which shows no hidden states.
        generations: None where there are no prompts or the model does not fit in memory.
        tasks: of lm-evaluation-harness.
        checks: of the gate `graph`, where the artifact is an ONNX graph.
        readers: what read the artifact for these figures, with its version.
        unconfirmed: what could not be measured, and why.
        notes: for the reader.
        timings: how long it took.
    """

    figures: list[Figure]
    tokens: TokenFigures
    looks: list[int]
    block_drift: list[BlockDrift]
    generations: Generations | None
    tasks: list[TaskRecord]
    checks: list[CheckResult]
    readers: list[str]
    unconfirmed: list[str]
    notes: list[str]
    timings: Timings


def verify(
    artifact: Path,
    given: Given,
    judge: Judge,
    *,
    grids: Mapping[str, GroupQuantizedSpec] | None = None,
    report: Reporter = silent,
) -> Measurement:
    """Measures the artifact until its gates are decided or the text is used up.

    All models run block by block but an ONNX graph, which ONNX Runtime runs a window at a time; prompts are continued
    where a whole model fits in memory. docs/verification.md defines every figure.

    Args:
        artifact: the folder, in any format that `qexport.load` reads.
        given: what to hold it against.
        judge: the gates.
        grids: of the artifact's layers, where more is known than its files tell.
        report: is told of each step.

    Raises:
        RecipeError: it is an ONNX artifact, and the extra `onnx` is not installed.
        InputError: the artifact cannot be read, or its tensors are not those of the reference.
        NumericalError: logits hold NaN or Inf.
    """
    started, steps = time.monotonic(), Steps(report)
    figures: list[Figure] = []

    def decide(found: Measured) -> list[GateResult]:
        figures[:] = _figures(found, given)
        return judge(figures)

    with open_stored(artifact, dtype=given.dtype) as source:
        reference = _runner(given, given.reference)
        source.check_complete(reference.structure)
        reading = _read_graph(artifact, given) if holds_graph(artifact) else _read_blocks(source, given)
        rivals = _rivals(given, source.grids if grids is None else grids, source.transposed)
        models = Models(reference, reading.runner, *rivals)
        measured = measure(models, given.held_out.input_ids, given.settings.windows, decide, needs_more, steps)
        pair = Pair(reference, reading.runner, given.reference, artifact, given.tokenizer)
        whole = measure_whole(pair, given.prompts, given.settings, steps, report)
        speed = measure_speed(pair, given.held_out.input_ids, given.settings.speed, given.dtype, report)
    drift = zip(reference.structure.blocks, measured.block_drift, strict=bool(measured.block_drift))
    return Measurement(
        figures=[*figures, *whole.figures],
        tokens=measured.tokens()["artifact"],
        looks=measured.looks,
        block_drift=[BlockDrift(name=name, relative_error=error) for name, error in drift],
        generations=whole.generations,
        tasks=whole.tasks,
        checks=reading.checks,
        readers=[reading.reader],
        unconfirmed=[*given.prepared.unconfirmed, *whole.unconfirmed],
        notes=[*reading.notes, *whole.notes],
        timings=_timings(time.monotonic() - started, speed),
    )


def has_nearest_rival(grids: Mapping[str, GroupQuantizedSpec]) -> bool:
    """Whether an artifact whose layers have these grids is held against the model rounded to nearest on them."""
    return bool(grids) and min(grid.bits for grid in grids.values()) <= _COARSE_BITS


def check_config(reference: Checkpoint, artifact: Path) -> CheckResult:
    """Whether the artifact's config.json means the reference's model.

    Raises:
        InputError: the artifact cannot be read.
    """
    with open_stored(artifact, dtype=torch.float32) as source:
        problems = config_differences(reference.config, source.config)
    detail = listed(problems) if problems else "every key means the reference's model"
    return CheckResult(gate="config", name="config.json", passed=not problems, detail=detail)


def check_headers(reference: Checkpoint, artifact: Path) -> None:
    """Holds the artifact's config.json and headers against the reference; reads no weights.

    Raises:
        InputError: the artifact cannot be read, or is not a form of the reference.
    """
    with open_stored(artifact, dtype=torch.float32) as source:
        refuse_other_config(reference.config, source.config)
        source.check_complete(describe(reference.config))


@dataclass(frozen=True)
class _Reading:
    """How an artifact is run.

    Attributes:
        runner: runs it.
        reader: what that is, with its version.
        checks: of a graph.
        notes: for the reader.
    """

    runner: BlockRunner | GraphRunner
    reader: str
    checks: list[CheckResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _runner(given: Given, checkpoint: Checkpoint) -> BlockRunner:
    return BlockRunner(checkpoint.config, checkpoint.weights, dtype=given.dtype, device=given.device)


def _read_blocks(source: StoredModel, given: Given) -> _Reading:
    """The artifact runs as its own config.json says, as its users will run it."""
    config, _ = without_code_keys(source.config)
    runner = BlockRunner(config, source, dtype=given.dtype, device=given.device)
    source.check_complete(runner.structure)
    return _Reading(runner, f"qexport {version('qexport')}")


def _read_graph(artifact: Path, given: Given) -> _Reading:
    """The graph in ONNX Runtime, after what windows of text do not show of it has been tried."""
    from qexport.verifying.graphs import GraphRunner, check_graph

    runner = GraphRunner(artifact, given.device)
    with runner.whole() as model:
        checks = check_graph(model, given.held_out.input_ids)
        reader = f"onnxruntime {model.session.version} ({model.session.provider})"
        dtype = model.dtype
    return _Reading(runner, reader, checks, [] if dtype == given.dtype else [_other_dtype(dtype, given)])


def _other_dtype(dtype: torch.dtype, given: Given) -> str:
    own, other = (str(each).removeprefix("torch.") for each in (dtype, given.dtype))
    floor = given.prepared.noise_floor.get("mean_kl")
    share = f": about {floor:.2g} of mean_kl is rounding, the noise floor" if floor else ""
    return f"the graph computes in {own}, the reference in {other}{share}"


def _rivals(
    given: Given, grids: Mapping[str, GroupQuantizedSpec], transposed: frozenset[str]
) -> tuple[BlockRunner | None, BlockRunner | None]:
    """The merged model rounded to nearest, and the base without the adapter, where there are such."""
    nearest = None
    if has_nearest_rival(grids):
        nearest = _runner(given, replace(given.reference, weights=given.nearest(grids, transposed)))
    return nearest, _runner(given, given.base) if given.base else None


def _figures(found: Measured, given: Given) -> list[Figure]:
    """Everything that is known of the text, with the noise floor beside it."""
    tokens = found.tokens()
    units = Units(given.held_out.domains[: found.windows], "window", tokens["artifact"].kl.shape[1], PLANNED_UNITS)
    floor = given.prepared.noise_floor
    own = [
        figure.model_copy(update={"noise_floor": floor.get(figure.name)}) if figure.domain is None else figure
        for figure in divergence_figures(tokens["artifact"], units)
    ]
    return [*own, *rival_figures(found, units), *given.prepared.figures]


def _timings(seconds: float, measured: MeasuredSpeed) -> Timings:
    return Timings(
        seconds=seconds,
        peak_memory_bytes=resident().peak,
        speed=measured.speed,
        speed_unmeasured=measured.unmeasured,
        figures=measured.figures,
    )
