"""The finished artifact, read back from disk, compared with the merged reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.memory import resident
from qexport.architectures.runner import BlockRunner
from qexport.artifact.baseline import DocumentSums
from qexport.artifact.figures import CheckResult, Figure, GateResult
from qexport.artifact.measurements import BlockDrift, Generations, TaskRecord, Timings, WeightsRecord
from qexport.errors import listed
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution
from qexport.formats.stored_weight import input_roundings
from qexport.gates.baseline import PAIRED
from qexport.gates.deciding import needs_more
from qexport.progress import ProgressCallback, Steps, silent
from qexport.reading.stored_model import StoredModel
from qexport.statistics.means import PLANNED_UNITS
from qexport.tensors import GroupQuantizedSpec, WeightSource
from qexport.tensors.input_rounding import CodeType
from qexport.verifying import VerifySettings
from qexport.verifying.config_comparison import config_differences, refuse_other_config
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.document_sums import baseline_figures, document_sums, held_out_windows
from qexport.verifying.estimates import divergence_figures, rival_figures
from qexport.verifying.kept import digest_of
from qexport.verifying.layer_inputs import KeptInputs
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.predictors import windows_at_once
from qexport.verifying.reference import Reference
from qexport.verifying.rounds import NO_LOOKS, KeptWindows, Looks, Measured, Models, measure
from qexport.verifying.speed import MeasuredSpeed
from qexport.verifying.suites import MeasuredSuites, measure_suites
from qexport.verifying.units import document_units
from qexport.verifying.weights import WeightCheck
from qexport.verifying.whole_models import Pair, Whole, measure_speed, measure_whole

if TYPE_CHECKING:
    from qexport.verifying.graphs import GraphRunner

Judge = Callable[[Sequence[Figure]], list[GateResult]]
"""Decides the gates from the figures measured so far."""

_COARSE_BITS: Final = 4
"""With more bits, rounding to nearest is so close to the reference that little is closer by more than noise."""


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        figures: of the held-out text and the prompts.
        tokens: the artifact compared with the reference, for every predicted token.
        document_sums: of these, by document.
        looks: how many windows had been measured at each look at the gates.
        block_drift: see `qexport.verifying.predictors`; empty for an ONNX graph, which exposes no hidden states.
        weights: each tensor held against the reference's.
        generations: None if there are no prompts.
        tasks: of lm-evaluation-harness.
        suites: what the models were asked besides.
        checks: of the gate `weights`, and of the gate `graph` where the artifact is an ONNX graph.
        readers: what read the artifact for these figures, with its version.
        unconfirmed: what could not be measured, and why.
        notes: for users.
        timings: how long it took.
        ended_early: a gate has failed, and nothing more was measured; see `Reference.ends_early`.
    """

    figures: list[Figure]
    tokens: TokenFigures
    document_sums: DocumentSums
    looks: list[int]
    block_drift: list[BlockDrift]
    weights: WeightsRecord
    generations: Generations | None
    tasks: list[TaskRecord]
    suites: MeasuredSuites
    checks: list[CheckResult]
    readers: list[str]
    unconfirmed: list[str]
    notes: list[str]
    timings: Timings
    ended_early: bool = False


def verify(
    artifact: StoredModel,
    reference: Reference,
    judge: Judge,
    *,
    looks: Looks = NO_LOOKS,
    execution: Execution = INLINE,
    progress: ProgressCallback = silent,
) -> Measurement:
    """Measures an artifact until its gates are decided or the text is used up.

    All models run block by block, except an ONNX graph, which ONNX Runtime runs one window at a time. Prompts are
    continued by whole models if these fit in memory, else block by block too. docs/verification.md defines every
    figure.

    Args:
        artifact: the artifact, which `check_parameters` has accepted.
        reference: what to compare it with.
        judge: decides the gates.
        looks: what an interrupted run has measured.
        execution: the workers, on which all models run but an ONNX graph, over the held-out text.
        progress: is called with each step.

    Raises:
        InputError: the artifact cannot be read.
        NumericalError: logits hold NaN or Inf.
    """
    started, steps = time.monotonic(), Steps(progress)
    figures: list[Figure] = []

    def decide(found: Measured) -> list[GateResult]:
        figures[:] = _figures(found, reference)
        return judge(figures)

    weights, settings, inputs = WeightCheck(artifact, reference), reference.settings, None
    ids, kept = reference.held_out.input_ids, KeptWindows(reference.kept, _nearest_key(artifact))
    if artifact.kind == "graph":
        own, reading = reference.runner(reference.merged), _read_graph(artifact, reference)
    else:
        own = reference.runner(replace(reference.merged, weights=weights.reference_weights))
        first = KeptInputs(reference.kept, digest_of(_first_windows(ids, settings)))
        inputs = weights.watch(own, first)
        kept = replace(kept, reads_reference=inputs.known)
        reading = _read_blocks(artifact, weights.artifact_weights, reference)
    rivals = _rivals(reference, artifact.grids, artifact.transposed)
    models = Models(own, reading.runner, *rivals, inputs)
    if looks.earlier and isinstance(reading.runner, BlockRunner) and not kept.reads_reference:
        run_in_lockstep(
            [own, reading.runner], _first_windows(ids, settings), lambda _: None, drift=False, inputs=inputs
        )
    wants_more = partial(_needs_more, reference)
    measured = measure(models, ids, settings.windows, decide, wants_more, steps, looks, kept, execution)
    compared = weights.finish()
    pair = Pair(own, reading.runner, reference.merged, artifact, reference.tokenizer, reference.kept)
    ended = reference.ends_early and _has_failed(judge(figures), compared.checks)
    asked = _Asked() if ended else _ask(pair, reference, steps, progress)
    whole, suites, speed = asked.whole, asked.suites, asked.speed
    tokens = measured.tokens()["artifact"]
    drift = zip(own.structure.blocks, measured.block_drift, strict=bool(measured.block_drift))
    return Measurement(
        figures=[*figures, *compared.figures, *whole.figures, *suites.figures],
        tokens=tokens,
        document_sums=document_sums(tokens, reference.held_out),
        looks=measured.looks,
        block_drift=[BlockDrift(name=name, relative_error=error) for name, error in drift],
        weights=compared.record,
        generations=whole.generations,
        tasks=whole.tasks,
        suites=suites,
        checks=[*compared.checks, *reading.checks],
        readers=[reading.reader],
        unconfirmed=[*reference.prepared.unconfirmed, *reading.unconfirmed, *whole.unconfirmed],
        notes=[*reading.notes, *whole.notes, *suites.notes, *([ENDED_EARLY] if ended else [])],
        timings=_timings(time.monotonic() - started, speed),
        ended_early=ended,
    )


ENDED_EARLY: Final = (
    "a gate has failed, so nothing more was measured: no more windows, prompts, tasks, suites, speed or runtimes"
)
"""The note in the report of an artifact that was not measured further."""


@dataclass(frozen=True)
class _Asked:
    """What was measured besides held-out text and weights."""

    whole: Whole = field(default_factory=Whole)
    suites: MeasuredSuites = field(default_factory=MeasuredSuites)
    speed: MeasuredSpeed = field(default_factory=lambda: MeasuredSpeed(None, "a gate has failed"))


def _ask(pair: Pair, reference: Reference, steps: Steps, progress: ProgressCallback) -> _Asked:
    settings, ids = reference.settings, reference.held_out.input_ids
    whole = measure_whole(pair, reference.prompts, settings, steps, progress)
    suites = measure_suites(pair, reference.suites, steps)
    return _Asked(whole, suites, measure_speed(pair, ids, settings.speed, reference.dtype, progress))


def _has_failed(gates: Sequence[GateResult], checks: Sequence[CheckResult]) -> bool:
    return any(gate.verdict == "fail" for gate in gates) or any(check.passed is False for check in checks)


def _nearest_key(artifact: StoredModel) -> Any:
    """What tells the merged model rounded to nearest on an artifact's grids from those on other grids."""
    grids = {name: [grid.bits, grid.group_size, grid.sym] for name, grid in artifact.grids.items()}
    return {"grids": grids, "transposed": sorted(artifact.transposed)}


def _first_windows(input_ids: Tensor, settings: VerifySettings) -> Tensor:
    """The windows that go through the models first, as one batch. The layers' outputs are compared on their inputs,
    also when an interrupted run has measured the windows already.
    """
    at_once = windows_at_once(input_ids.shape[1])
    return input_ids[: min(settings.windows, at_once)]


def has_nearest_rival(grids: Mapping[str, GroupQuantizedSpec]) -> bool:
    """Whether an artifact whose layers have these grids is compared with the model rounded to nearest on them."""
    return bool(grids) and min(grid.bits for grid in grids.values()) <= _COARSE_BITS


def check_config(reference: Checkpoint, artifact: StoredModel) -> CheckResult:
    """Whether the artifact's config.json describes the reference's model."""
    problems = config_differences(reference.architecture, artifact.config)
    detail = listed(problems) if problems else "every key means the reference's model"
    return CheckResult(gate="config", name="config.json", passed=not problems, detail=detail)


def check_headers(reference: Checkpoint, artifact: StoredModel) -> None:
    """Checks the artifact's config.json and headers against the reference's; reads no weights.

    Raises:
        InputError: the artifact was not made from this reference.
    """
    refuse_other_config(reference.architecture, artifact.config)
    check_parameters(reference, artifact)


def check_parameters(reference: Checkpoint, artifact: StoredModel) -> None:
    """Checks the artifact's headers against the reference, and against its own config.json if that describes other
    parameters.

    Raises:
        InputError: parameters are missing, unexpected or of another shape.
    """
    expected = reference.architecture.structure
    artifact.check_complete(expected)
    if artifact.architecture.structure != expected:
        artifact.check_complete()


@dataclass(frozen=True)
class _Reading:
    """How an artifact is run.

    Attributes:
        runner: runs it.
        reader: the program that reads it, with its version.
        checks: of a graph.
        notes: for users.
        unconfirmed: what of the served computation was left out.
    """

    runner: BlockRunner | GraphRunner
    reader: str
    checks: list[CheckResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unconfirmed: list[str] = field(default_factory=list)


def _read_blocks(artifact: StoredModel, weights: WeightSource, reference: Reference) -> _Reading:
    """The artifact, run as its own config.json says, as its users will run it: with rounded activations if so."""
    runner = BlockRunner(artifact.architecture, weights, dtype=reference.dtype, device=reference.device)
    rounded = input_roundings(artifact.layers)
    left_out = runner.round_inputs(rounded)
    notes = [_ROUNDED[codes] for codes in sorted({each.codes for each in rounded.values()})]
    reading = _Reading(runner, f"qexport {version('qexport')}", notes=notes)
    return replace(reading, unconfirmed=[f"rounded activations of the experts in {path}" for path in left_out])


_ROUNDED: Final[Mapping[CodeType, str]] = {
    "int8": "activations are rounded to int8 as vLLM rounds them (simulated): for each token symmetric, its absolute "
    "maximum / 127, ties to even",
    "float8": "activations are rounded to e4m3 as vLLM rounds them on GPUs (simulated): for each token, or each block "
    "of one, its absolute maximum / 448, ties to even",
}


def _read_graph(artifact: StoredModel, reference: Reference) -> _Reading:
    """The graph in ONNX Runtime, after checks of what windows of text do not show."""
    from qexport.verifying.graphs import GraphRunner, check_graph

    runner = GraphRunner(artifact, reference.device)
    with runner.whole() as model:
        checks = check_graph(model, reference.held_out.input_ids)
        reader = f"onnxruntime {model.session.version} ({model.session.provider})"
        dtype = model.dtype
    notes = [_ROUNDED_BY_ITSELF] if artifact.rounds_activations else []
    notes += [] if dtype == reference.dtype else [_other_dtype(dtype, reference)]
    return _Reading(runner, reader, checks, notes)


_ROUNDED_BY_ITSELF: Final = "ONNX Runtime rounds the inputs of quantized layers to 8 bits, and the figures include that"


def _other_dtype(dtype: torch.dtype, reference: Reference) -> str:
    own, other = (str(each).removeprefix("torch.") for each in (dtype, reference.dtype))
    floor = reference.prepared.noise_floor.get("mean_kl")
    share = f": about {floor:.2g} of mean_kl is rounding, the noise floor" if floor else ""
    return f"the graph computes in {own}, the reference in {other}{share}"


def _rivals(
    reference: Reference, grids: Mapping[str, GroupQuantizedSpec], transposed: frozenset[str]
) -> tuple[BlockRunner | None, BlockRunner | None]:
    """The merged model rounded to nearest, and the base without the adapter; None for one that does not apply."""
    nearest = None
    if has_nearest_rival(grids):
        nearest = reference.runner(replace(reference.merged, weights=reference.nearest(grids, transposed)))
    base = reference.base_rival
    return nearest, reference.runner(base) if base else None


def _figures(found: Measured, reference: Reference) -> list[Figure]:
    """All figures over the held-out text so far, with their noise floors, and those of the preparation."""
    tokens = found.tokens()
    units = document_units(reference.held_out, found.windows, PLANNED_UNITS)
    floor = reference.prepared.noise_floor
    own = [
        figure.model_copy(update={"noise_floor": floor.get(figure.name)}) if figure.domain is None else figure
        for figure in divergence_figures(tokens["artifact"], units)
    ]
    paired = []
    if reference.baseline is not None:
        paired = baseline_figures(document_sums(tokens["artifact"], reference.held_out), reference.baseline, units)
    return [*own, *rival_figures(found, units), *reference.prepared.figures, *paired]


def _needs_more(reference: Reference, found: Measured, gates: Sequence[GateResult]) -> bool:
    """Whether more windows could decide a gate: on differences from a baseline, windows that it was measured on too."""
    if reference.ends_early and _has_failed(gates, []):
        return False
    baseline, text = reference.baseline, reference.held_out
    if baseline is None or not baseline.shared_rows(held_out_windows(text)[found.windows :]):
        gates = [gate for gate in gates if gate.figure not in PAIRED]
    return needs_more(gates)


def _timings(seconds: float, measured: MeasuredSpeed) -> Timings:
    return Timings(
        seconds=seconds,
        finished=datetime.now(UTC).replace(microsecond=0),
        peak_memory_bytes=resident().peak,
        speed=measured.speed,
        speed_unmeasured=measured.unmeasured,
        figures=measured.figures,
    )
