"""Gates on what a runtime computes: the recipe's limits, and how far it may be from our reading of the same files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from qexport.artifact.figures import CATALOGUE, CheckResult, Figure, GateResult
from qexport.artifact.report import Report
from qexport.artifact.served import ServedRecord, through
from qexport.gates import HasGates
from qexport.gates.deciding import decide
from qexport.gates.deciding_again import noise_floors
from qexport.gates.limits import Bound, Limit, above_floor, limits_of, waiver
from qexport.gates.profiles import ProfileOfLayer, profile_for

_EPSILON: Final[Mapping[str, float]] = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "q8_0": 2.0**-6.7,
}
"""Of rounding steps. Rounding 32 values to integers with one scale, llama.cpp's Q8_0, diverges by about one and
a half times what bfloat16 does: its step is taken to be larger by the root of that."""

_LEAST: Final[Mapping[str, float]] = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 4e-3, "q8_0": 8e-3}
"""Nats. Measured with SmolLM2, through vLLM unquantized and GPTQ alike: 2.9e-9, 2e-5 and 1.4e-3; through llama.cpp,
which rounds the inputs of quantized layers to Q8_0, 2.2e-3 for a well calibrated artifact on windows of 512 tokens and
4.7e-3 for a badly calibrated one on 64, where the rolled scales of one layer give 1.2e-2."""

_FLOORS: Final = 4.0

_SAME_DRIFT: Final = 0.15
"""Where activations are rounded: a runtime's divergence from the reference may be 1.35 times that of our reading, or
that much smaller. vLLM with SmolLM2 in W8A8 is at -0.02, with a layer of zeros at 0.62."""


def fidelity_limit(dtype: str, noise_floor: float | None, reference_dtype: str) -> float:
    """The largest mean KL divergence, in nats, that computing in a dtype explains.

    Divergences grow with the square of the rounding step, so the reference's own noise floor gives every dtype's: four
    times that, and at least what was measured on a small model.

    Args:
        dtype: what the runtime computes in, or rounds inputs to; an unknown one counts as bfloat16.
        noise_floor: of `mean_kl`, between the reference's dtype and a wider one; None if it was not measured.
        reference_dtype: the reference's.
    """
    known = dtype if dtype in _EPSILON else "bfloat16"
    least = _LEAST[known]
    if noise_floor is None or reference_dtype not in _EPSILON:
        return least
    return max(least, _FLOORS * noise_floor * (_EPSILON[known] / _EPSILON[reference_dtype]) ** 2)


def limits_of_runtime(fidelity: float | None, *, rounds: bool) -> list[Limit]:
    """The limits that hold for what a runtime computes, unless the settings have others for the same figures.

    Args:
        fidelity: the largest `fidelity_kl`; None for no such limit.
        rounds: whether its drift is compared with our reading's instead, since activations are rounded.
    """
    if rounds:
        sides: list[tuple[Bound, float]] = [("at_most", _SAME_DRIFT), ("at_least", -_SAME_DRIFT)]
        return [Limit("kl_over_reading", None, bound, value, by_user=False, one_sided=False) for bound, value in sides]
    return [] if fidelity is None else [Limit("fidelity_kl", None, "at_most", fidelity, by_user=False)]


def decide_served(
    limits: Sequence[Limit],
    figures: Sequence[Figure],
    of_runtime: Sequence[Limit],
    label: str,
    checks: Sequence[CheckResult] = (),
) -> list[GateResult]:
    """The gates of one runtime, each named after its figure and the runtime.

    Limits on figures of our own reader that the runtime cannot tell are left out; see `left_out`. Those on figures that
    only runtimes give are undecided then.

    Args:
        limits: the recipe's and the profile's.
        figures: what was measured through the runtime.
        of_runtime: further ones, for figures that these do not limit; see `limits_of_runtime`.
        label: the runtime's.
        checks: of the endpoint's tokenizer.
    """
    others = left_out(limits, figures)
    limited = {limit.figure for limit in limits}
    own = [each for each in limits if each not in others] + [each for each in of_runtime if each.figure not in limited]
    decided = decide([], [], checks, ["tokenizer"]) if checks else []
    decided += [_one(limit, figures) for limit in own]
    return [gate.model_copy(update={"name": through(gate.name, label)}) for gate in decided]


def left_out(limits: Sequence[Limit], figures: Sequence[Figure]) -> list[Limit]:
    """The limits on figures of our own reader that a runtime cannot tell.

    Args:
        limits: the recipe's and the profile's.
        figures: what was measured through the runtime.
    """
    measured = {(figure.name, figure.domain) for figure in figures}
    return [each for each in limits if (each.figure, each.domain) not in measured and not CATALOGUE[each.figure].served]


def unless_waived(settings: HasGates, limits: Sequence[Limit]) -> tuple[list[Limit], list[str]]:
    """The limits of a runtime that the settings do not waive by null, and a note for each that they do."""
    waived = dict.fromkeys(each.figure for each in limits if settings.gates.get(each.figure, each) is None)
    return [each for each in limits if each.figure not in waived], [waiver(figure, figure) for figure in waived]


def decide_record(
    limits: Sequence[Limit], record: ServedRecord, settings: HasGates
) -> tuple[list[GateResult], list[str]]:
    """The gates of a runtime that has been measured, and a note for each limit of its own that the settings waive."""
    own, waived = unless_waived(settings, limits_of_runtime(record.fidelity_limit, rounds=record.compares_drift))
    return decide_served(limits, record.figures, own, record.label, record.checks), waived


def decide_served_again(
    report: Report, settings: HasGates, of_layer: ProfileOfLayer
) -> tuple[list[GateResult], list[str]]:
    """The gates of every runtime in a report, decided with other settings, and notes; see `decide_again`."""
    profile = profile_for(settings, report.layers, report.subject.sizes, of_layer)
    limits, _ = above_floor(limits_of(settings, profile), noise_floors(report.figures))
    results, notes = list[GateResult](), list[str]()
    if report.served_in and any(CATALOGUE[limit.figure].served for limit in limits):
        notes.append(f"limits on what only runtimes tell are decided in the report of the layout {report.served_in}")
    for each in report.served:
        decided, waived = decide_record(limits, each, settings)
        results += decided
        notes += [note for note in waived if note not in notes]
    return results, notes


def _one(limit: Limit, figures: Sequence[Figure]) -> GateResult:
    (gate,) = decide([limit], figures, [], [])
    return gate
