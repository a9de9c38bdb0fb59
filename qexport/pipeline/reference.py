"""The merged model, prepared as the reference of a verification, and the gates of one artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from qexport.artifact.figures import CheckResult, Figure, GateResult
from qexport.errors import GateFailed, GateUndecided
from qexport.gates.deciding import BuiltIn, decide, expected_gates, waived
from qexport.gates.limits import Limit, above_floor, limits_of
from qexport.gates.settings import HasGates, ProfileName
from qexport.loading.small_files import open_tokenizer
from qexport.merge.merging import Merged
from qexport.pipeline.result import UnprovenMerge
from qexport.pipeline.texts import Evaluation
from qexport.progress import ProgressCallback, silent
from qexport.quantizing.rounding import NearestSource
from qexport.verifying.live_adapter import LiveAdapter
from qexport.verifying.preparation import Preparation, prepare
from qexport.verifying.reference import Reference
from qexport.verifying.settings import VerifySettings


@dataclass(frozen=True)
class Gates:
    """Decides what it was made for.

    Attributes:
        limits: on figures.
        expected: the built-in gates that apply.
        notes: limits of a profile that had to be moved.
    """

    limits: Sequence[Limit]
    expected: Sequence[BuiltIn]
    notes: Sequence[str]

    def __call__(self, figures: Sequence[Figure], checks: Sequence[CheckResult]) -> list[GateResult]:
        """The decisions on what is known."""
        return decide(self.limits, figures, checks, self.expected)


def make_gates(
    settings: HasGates, profile: ProfileName, prepared: Preparation, *, adapter: bool, nearest: bool, graph: bool
) -> Gates:
    """The gates of an artifact.

    Args:
        settings: the user's.
        profile: what the settings' own profile has been resolved to; never `auto`.
        prepared: what was measured of the reference.
        adapter: whether there is one.
        nearest: whether the model rounded to nearest is run.
        graph: whether the artifact is an ONNX graph.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor.
    """
    limits, notes = above_floor(limits_of(settings, profile), prepared.noise_floor)
    expected, given_up = expected_gates(settings, adapter=adapter, nearest=nearest, graph=graph)
    return Gates(limits, expected, [*notes, *given_up])


def refuse_unmeasurable(settings: HasGates, prepared: Preparation) -> None:
    """Refuses limits that noise alone would break, before any work is done for them.

    Raises:
        RecipeError: a limit of the user's is tighter than three times the noise floor, or that is beyond what any
            profile allows.
    """
    strictest: ProfileName = "off" if settings.profile == "off" else "16bit"
    above_floor(limits_of(settings, strictest), prepared.noise_floor)


def unproven_merge(settings: HasGates, prepared: Preparation) -> UnprovenMerge | None:
    """A merge that is further from base and adapter in PEFT than three times the noise floor, or that could not be
    compared with them and whose gate the user has not waived; None where the merge is proven or waived.
    """
    if "merge" in waived(settings):
        return None
    (gate,) = decide([], prepared.figures, [], ["merge"])
    if gate.verdict == "fail":
        failed = GateFailed(
            f"the merged model is not base and adapter as PEFT computes them: {gate.reason}",
            where=f"gate merge, mean KL divergence {gate.value:.4g} nats a token",
            mend="check that the adapter was made for this base; if it was, please report this",
        )
        return UnprovenMerge(gate, failed)
    if gate.verdict == "undecided":
        undecided = GateUndecided(
            "that the merge is the adapter's could not be proven, so nothing was quantized",
            where=f"gate merge: {'; '.join([*prepared.unconfirmed]) or gate.reason}",
            mend="take a machine with more memory, or waive the gate: verify.gates.merge_kl=null",
        )
        return UnprovenMerge(gate, undecided)
    return None


def prepare_reference(
    merged: Merged,
    evaluation: Evaluation,
    settings: VerifySettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: ProgressCallback = silent,
) -> Reference:
    """Measures what the reference alone can tell: the noise floor and the proof of the merge.

    Args:
        merged: the model and what it was merged from.
        evaluation: text and prompts.
        settings: how to compare.
        dtype: what the blocks compute in.
        device: where to compute.
        progress: is called with each step.

    Raises:
        InputError: a tensor cannot be read.
        NumericalError: logits hold NaN or Inf.
    """
    checkpoint, adapter = merged.checkpoint, merged.adapter
    live = LiveAdapter(merged.base, adapter.folder) if adapter else None
    reference = Reference(
        merged=checkpoint,
        base=merged.base,
        adapter=adapter.origin if adapter else None,
        nearest=partial(NearestSource, checkpoint.weights),
        prepared=prepare(checkpoint, live, evaluation.held_out, dtype=dtype, device=device, progress=progress),
        held_out=evaluation.held_out,
        prompts=evaluation.prompts,
        open_tokenizer=partial(open_tokenizer, checkpoint),
        settings=settings,
        dtype=dtype,
        device=device,
    )
    if adapter is None or reference.base_rival is not None:
        return reference
    unmeasured = [*reference.prepared.unconfirmed, "the artifact against the base (the adapter changes shapes)"]
    return replace(reference, prepared=replace(reference.prepared, unconfirmed=unmeasured))
