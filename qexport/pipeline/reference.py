"""The merged model, prepared as the reference of a verification, and the gates of one artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from qexport.artifact.baseline import BaselineRecord
from qexport.artifact.figures import CATALOGUE, CheckResult, Figure, GateResult
from qexport.artifact.report import ProfileRecord
from qexport.errors import GateFailed, GateUndecided
from qexport.gates import HasGates, ProfileName
from qexport.gates.baseline import baseline_limits
from qexport.gates.deciding import BuiltIn, decide, expected_gates, waived
from qexport.gates.limits import Limit, above_floor, limits_of, margin_limits
from qexport.gates.profiles import profile_record
from qexport.loading.small_files import open_tokenizer
from qexport.merge.combining import Combination, layer_seed
from qexport.merge.merging import Merged
from qexport.pipeline.result import UnprovenMerge
from qexport.pipeline.texts import Evaluation
from qexport.progress import ProgressCallback, silent
from qexport.quantizing.rounding import NearestSource, rounding_of
from qexport.tensors.source import WeightSource
from qexport.verifying import VerifySettings
from qexport.verifying.kept import NOTHING_KEPT, Kept
from qexport.verifying.live_adapter import LiveAdapter
from qexport.verifying.peft_combination import CombinedByPeft, WeightedPart
from qexport.verifying.reference import Preparation, Reference, prepare


@dataclass(frozen=True)
class Gates:
    """The gates of one artifact.

    Attributes:
        profile: whose limits hold where the user sets none.
        limits: the limits on figures.
        expected: the built-in gates that apply.
        notes: which limits of a profile were moved, and which gates are waived.
        margin: how much accuracy may be lost in each task; None without that gate.
        paired: the limits on differences from a baseline.
    """

    profile: ProfileRecord
    limits: Sequence[Limit]
    expected: Sequence[BuiltIn]
    notes: Sequence[str]
    margin: float | None = None
    paired: Sequence[Limit] = ()

    def __call__(self, figures: Sequence[Figure], checks: Sequence[CheckResult]) -> list[GateResult]:
        """Decides on these figures and checks; those on what only runtimes tell are `measure_through`'s."""
        own = [limit for limit in self.limits if not CATALOGUE[limit.figure].served]
        margins = [] if self.margin is None else margin_limits(self.margin, figures, own)
        return decide([*own, *margins, *self.paired], figures, checks, self.expected)


def make_gates(
    settings: VerifySettings,
    profile: ProfileName,
    prepared: Preparation,
    *,
    adapter: bool,
    nearest: bool,
    graph: bool,
    baseline: BaselineRecord | None = None,
) -> Gates:
    """The gates of an artifact.

    Args:
        settings: the user's limits and profile.
        profile: the profile that the settings resolve to; never `auto` or `strict`.
        prepared: what was measured of the reference.
        adapter: whether the reference has an adapter.
        nearest: whether the model rounded to nearest is measured too.
        graph: whether the artifact is an ONNX graph.
        baseline: the release that it is compared with.
    """
    limits, notes = above_floor(limits_of(settings, profile), prepared.noise_floor)
    expected, given_up = expected_gates(settings, adapter=adapter, nearest=nearest, graph=graph)
    margin = settings.tasks.margin if settings.tasks else None
    paired, without = baseline_limits(baseline, prepared.noise_floor, settings) if baseline else ([], [])
    notes = [*notes, *given_up, *without]
    return Gates(profile_record(settings, profile), limits, expected, notes, margin, paired)


def refuse_unmeasurable(settings: HasGates, prepared: Preparation) -> None:
    """Refuses limits that noise alone would exceed, before any work is done.

    Raises:
        RecipeError: a limit set by the user is tighter than three times the noise floor, or that is more than any
            profile allows.
    """
    strictest: ProfileName = "off" if settings.profile == "off" else "16bit"
    above_floor(limits_of(settings, strictest), prepared.noise_floor)


def unproven_merge(settings: HasGates, prepared: Preparation) -> UnprovenMerge | None:
    """Why the merge is unproven; None if it is proven, or its gate is waived.

    It is unproven if it differs from base and adapter in PEFT by more than noise, or by more than a small share of the
    adapter's effect, or if it could not be compared with them.
    """
    if "merge" in waived(settings):
        return None
    (gate,) = decide([], prepared.figures, [], ["merge"])
    measured = "" if gate.figure is None else CATALOGUE[gate.figure].label
    if gate.verdict == "fail":
        failed = GateFailed(
            f"the merged model is not base and adapter as PEFT computes them: {gate.reason}",
            where=f"gate merge, {measured}: {gate.value:.4g}",
            mend="check that the adapter was made for this base; if it was, please report this",
        )
        return UnprovenMerge(gate, failed)
    if gate.verdict == "undecided":
        undecided = GateUndecided(
            "the merge could not be compared with PEFT's, so nothing was quantized",
            where=f"gate merge: {'; '.join([*prepared.unconfirmed]) or gate.reason}",
            mend="check that PEFT can load the adapter into this base, or waive the gate: verify.gates.merge_kl=null",
        )
        return UnprovenMerge(gate, undecided)
    return None


def live_adapter(merged: Merged) -> LiveAdapter | None:
    """What the merged model is held against: PEFT with the adapter, or with the combination that PEFT makes of several;
    None without one.
    """
    adapter = merged.adapter
    if adapter is None:
        return None
    tensors = adapter.tensors if adapter.combination is None else _by_peft(adapter.combination, adapter.tensors)
    return LiveAdapter(merged.base, adapter.folder, merged.unrounded, tensors, adapter.config)


def _by_peft(combination: Combination, combined: WeightSource) -> CombinedByPeft:
    settings = combination.settings
    parts = [
        WeightedPart(adapter.config, adapter.file, weight)
        for adapter, weight in zip(combination.adapters, combination.weights, strict=True)
    ]
    return CombinedByPeft(
        parts,
        combined.specs(),
        method=settings.combination,
        density=settings.density,
        seed_of=partial(layer_seed, settings.seed),
    )


def prepare_reference(
    merged: Merged,
    evaluation: Evaluation,
    settings: VerifySettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    earlier: Preparation | None = None,
    kept: Kept = NOTHING_KEPT,
    ends_early: bool = False,
    progress: ProgressCallback = silent,
) -> Reference:
    """Measures what needs only the reference: the noise floor and the proof of the merge.

    Args:
        merged: the model and what it was merged from.
        evaluation: text and prompts.
        settings: how to compare.
        dtype: what the blocks compute in.
        device: where to compute.
        earlier: what an interrupted run has measured, which is not measured again.
        kept: what other artifacts' measurements have left, and this one's leaves.
        ends_early: see `Reference`.
        progress: is called with each step.
    """
    checkpoint, adapter = merged.checkpoint, merged.adapter
    live = live_adapter(merged)
    if earlier is None and (found := kept.value("prepared", None)) is not None:
        earlier = Preparation.of(found)
    reference = Reference(
        merged=checkpoint,
        base=merged.base,
        adapter=adapter.origin if adapter else None,
        changed=frozenset(adapter.changed if adapter else ()),
        nearest=partial(NearestSource, checkpoint.weights),
        rounding_of=rounding_of,
        unrounded=merged.unrounded if adapter else None,
        prepared=earlier
        or prepare(checkpoint, live, evaluation.held_out, dtype=dtype, device=device, progress=progress),
        held_out=evaluation.held_out,
        prompts=evaluation.prompts,
        suites=evaluation.suites,
        baseline=evaluation.baseline,
        open_tokenizer=partial(open_tokenizer, checkpoint),
        settings=settings,
        dtype=dtype,
        device=device,
        kept=kept,
        ends_early=ends_early,
    )
    if earlier is None and adapter is not None and reference.base_rival is None:
        unmeasured = [*reference.prepared.unconfirmed, "the artifact against the base (the adapter changes shapes)"]
        reference = replace(reference, prepared=replace(reference.prepared, unconfirmed=unmeasured))
    if not kept.has("prepared", None):
        kept.keep_value("prepared", None, reference.prepared.as_dict())
    return reference
