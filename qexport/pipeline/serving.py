"""The artifact measured through the runtimes that the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch

from qexport.artifact.figures import CATALOGUE, Figure, GateResult
from qexport.artifact.served import RuntimeFacts, ServedRecord
from qexport.gates.deciding import decide
from qexport.gates.serving import (
    decide_record,
    decide_served,
    fidelity_limit,
    left_out,
    limits_of_runtime,
    unless_waived,
)
from qexport.pipeline.folders import ArtifactFolder
from qexport.pipeline.reference import Gates
from qexport.pipeline.runtimes import misfit
from qexport.progress import Notice, ProgressCallback, Steps
from qexport.reading.stored_model import StoredModel, open_stored
from qexport.runtimes import RuntimeSettings
from qexport.runtimes.child import ChildRuntime
from qexport.runtimes.endpoints import open_endpoint
from qexport.text.tokenizers import text_of
from qexport.verifying.reference import Reference
from qexport.verifying.sampled import measure_endpoint
from qexport.verifying.served import check_tokenizer, measure_served, most_tokens
from qexport.verifying.speed import Continuing, MeasuredPace, compare_pace


@dataclass(frozen=True)
class ServedArtifact:
    """What all runtimes made of an artifact.

    Attributes:
        records: one for each runtime.
        gates: of all of them.
        unconfirmed: the runtimes that were named and not asked, and why.
        served_in: the layout with the same weights that runtimes have computed in place of this one.
    """

    records: Sequence[ServedRecord] = ()
    gates: Sequence[GateResult] = ()
    unconfirmed: Sequence[str] = ()
    served_in: str | None = None

    def decided_in(self, name: str) -> ServedArtifact:
        """Without gates: the report of the layout that was served has them."""
        return replace(self, gates=(), served_in=name)


NOT_SERVED: Final = ServedArtifact()


def measure_through(
    reference: Reference,
    opened: ArtifactFolder,
    gates: Gates,
    runtimes: Sequence[RuntimeSettings],
    *,
    progress: ProgressCallback,
) -> ServedArtifact:
    """Measures an artifact through each runtime that can load it.

    Args:
        reference: what to compare it with.
        opened: the artifact.
        gates: its gates; each runtime's are decided with the same limits.
        runtimes: what to measure it through. If none can load it, gates on what only runtimes tell are undecided.
        progress: is called with each step.

    Raises:
        InputError: a runtime fails.
        CompatibilityError: a runtime refuses the artifact.
        ResourceError: a runtime takes too much time or memory.
    """
    records, decided, unconfirmed = list[ServedRecord](), list[GateResult](), list[str]()
    for each in runtimes:
        if why := misfit(each, opened.artifact):
            unconfirmed.append(f"serving with {each.label} ({why})")
            continue
        record = _measure(each, reference, opened.artifact, gates, progress)
        records.append(record)
        decided += decide_record(gates.limits, record, reference.settings)[0]
    if not records:
        decided = decide([limit for limit in gates.limits if CATALOGUE[limit.figure].served], [], [], [])
    return ServedArtifact(records, decided, unconfirmed)


def _measure(
    settings: RuntimeSettings, reference: Reference, artifact: StoredModel, gates: Gates, progress: ProgressCallback
) -> ServedRecord:
    with open_stored(artifact.folder, dtype=torch.float32, like=artifact.architecture) as wide:
        if settings.runtime is None:
            return _ask(settings, reference, wide, gates, progress)
        return _start(settings, reference, wide, gates, progress)


def _start(
    settings: RuntimeSettings, reference: Reference, artifact: StoredModel, gates: Gates, progress: ProgressCallback
) -> ServedRecord:
    """Measures through a program in an environment of its own."""
    progress(Notice(f"starting {settings.label} with {artifact.folder.name}"))
    longest = max(most_tokens(reference.held_out.input_ids.shape[1]), _timed_tokens(reference))
    with ChildRuntime(settings, artifact.folder, longest=longest) as runtime:
        fidelity = _fidelity(settings, runtime.facts, reference, artifact)
        of_runtime = limits_of_runtime(fidelity, rounds=artifact.rounds_activations)
        own, waived = unless_waived(reference.settings, of_runtime)
        gates_of = partial(decide_served, gates.limits, of_runtime=own, label=settings.label)
        figures = measure_served(runtime, artifact, reference, gates_of, Steps(progress))
        tokens = check_tokenizer(runtime, reference)
        speed = _speed(settings, runtime, reference, progress)
        figures = [*figures, *speed.figures]
        return ServedRecord(
            label=settings.label,
            runtime=runtime.facts,
            scored="vocabulary",
            figures=figures,
            checks=tokens,
            fidelity_limit=fidelity,
            compares_drift=artifact.rounds_activations,
            notes=[
                *_other_dtype(settings, runtime.facts),
                *_rounded_inputs(runtime.facts),
                *_rounding(artifact),
                *waived,
                *_not_limited(figures, gates),
                *_without_speed(speed),
            ],
            speed=speed.pace,
        )


def _ask(
    settings: RuntimeSettings, reference: Reference, artifact: StoredModel, gates: Gates, progress: ProgressCallback
) -> ServedRecord:
    """Measures through an endpoint."""
    endpoint = open_endpoint(settings, partial(text_of, reference.tokenizer))
    progress(Notice(f"{settings.label} is {endpoint.facts.name} {endpoint.facts.version}"))
    fidelity = _fidelity(settings, endpoint.facts, reference, artifact)
    measured = measure_endpoint(endpoint, artifact, reference, Steps(progress))
    fidelity = None if measured.scored == "nothing" else fidelity
    drift = artifact.rounds_activations and measured.scored != "nothing"
    _, waived = unless_waived(reference.settings, limits_of_runtime(fidelity, rounds=drift))
    speed = _speed(settings, endpoint, reference, progress)
    figures = [*measured.figures, *speed.figures]
    return ServedRecord(
        label=settings.label,
        runtime=endpoint.facts,
        scored=measured.scored,
        figures=figures,
        checks=measured.checks,
        fidelity_limit=fidelity,
        compares_drift=drift,
        notes=[
            *measured.notes,
            *_other_dtype(settings, endpoint.facts),
            *_rounding(artifact),
            *waived,
            *_not_limited(figures, gates),
            *_without_speed(speed),
        ],
        speed=speed.pace,
    )


def _timed_tokens(reference: Reference) -> int:
    """The tokens that a runtime must have room for where its speed is measured, if the model has so many positions."""
    speed, positions = reference.settings.speed, reference.merged.architecture.structure.positions
    needed = 0 if speed is None else speed.prompt_tokens + speed.new_tokens + 1
    return 0 if positions is not None and needed > positions else needed


def _speed(
    settings: RuntimeSettings, runtime: Continuing, reference: Reference, progress: ProgressCallback
) -> MeasuredPace:
    """Beside the reference in transformers, where the recipe asks for it."""
    asked = reference.settings.speed
    if asked is None:
        return MeasuredPace(None)
    if settings.runtime == "llama.cpp" and settings.dtype == "float32":
        return MeasuredPace(None, "nobody serves with llama.cpp in float32")
    progress(Notice(f"measuring the speed of {settings.label}"))
    ids, dtype = reference.held_out.input_ids, reference.dtype
    return compare_pace(reference.merged, runtime, ids, asked, dtype=dtype, device=reference.device)


def _without_speed(speed: MeasuredPace) -> list[str]:
    return [] if speed.unmeasured is None else [f"speed was not measured: {speed.unmeasured}"]


def _not_limited(figures: Sequence[Figure], gates: Gates) -> list[str]:
    """Which limits do not hold for what the runtime computes."""
    others = [limit.name for limit in left_out(gates.limits, figures)]
    return [f"not limited here: {', '.join(others)}"] if others else []


def _rounding(artifact: StoredModel) -> list[str]:
    if not artifact.rounds_activations:
        return []
    return ["fidelity_kl has no limit: activations are rounded, so that two sound computations differ"]


def _fidelity(
    settings: RuntimeSettings, facts: RuntimeFacts, reference: Reference, artifact: StoredModel
) -> float | None:
    """The limit of the narrower dtype, where a runtime computes in another than its entry says."""
    if artifact.rounds_activations:
        return None
    floor, own = reference.prepared.noise_floor.get("mean_kl"), str(reference.dtype).removeprefix("torch.")
    return min(fidelity_limit(dtype, floor, own) for dtype in {facts.dtype, settings.dtype or facts.dtype})


def _other_dtype(settings: RuntimeSettings, facts: RuntimeFacts) -> list[str]:
    if settings.dtype in (None, facts.dtype):
        return []
    return [f"{settings.label} says that it computes in {facts.dtype}, not in {settings.dtype}"]


def _rounded_inputs(facts: RuntimeFacts) -> list[str]:
    layers = sum(count for name, count in facts.kernels.items() if name.endswith("with int8 inputs"))
    if not layers:
        return []
    return [f"vLLM rounds the inputs of {layers} layers to int8: VLLM_CPU_INT4_W4A8=0 keeps them at 16 bits"]
