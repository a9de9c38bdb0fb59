"""Deciding gates: pass, fail or undecided, on confidence sequences, so that gates may be decided after every round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from qexport.amounts import counted
from qexport.artifact.figures import CATALOGUE, CheckResult, Figure, GateResult, Verdict, find_figure
from qexport.gates import HasGates
from qexport.gates.limits import NOISE_MARGIN, Bound, Limit, waiver

BuiltIn = Literal[
    "config", "files", "tokenizer", "weights", "graph", "merge", "adapter", "adapter_strength", "better_than_rtn"
]
"""Gates that need no configured limit. Each is decided where it is expected, whether or not it was measured."""

BUILT_IN: Final[tuple[BuiltIn, ...]] = get_args(BuiltIn)

FIGURE_OF: Final[Mapping[BuiltIn, str]] = {
    "merge": "merge_kl",
    "adapter": "kl_over_base",
    "adapter_strength": "adapter_strength_weights",
    "better_than_rtn": "kl_over_rtn",
}
"""The figure that a built-in gate limits and is waived by; the other gates are decided on checks."""

MERGE_ERROR: Final = "merge_error"
"""The second figure of the gate `merge`. It is absent if the adapter has no effect on the text."""

MOST_MERGE_ERROR: Final = 0.01
"""The largest KL divergence of the unrounded merge from the adapter in PEFT, as a share of that of the base. Both grow
with the square of a difference, so this is an error of a tenth of what the adapter does."""


OF_PROFILES: Final[tuple[BuiltIn, ...]] = ("adapter", "adapter_strength", "better_than_rtn")
"""Built-in gates that belong to every profile but `off`: like its limits they say how good an artifact must be. The
others say whether it is what it claims to be."""

ADAPTER_STRENGTHS: Final[Mapping[str, tuple[float, float]]] = {
    "adapter_strength_weights": (0.8, 1.25),
    "adapter_strength_predictions": (0.6, 1.6),
}
"""The figures of the gate `adapter_strength`, with the smallest and the largest share of the adapter that passes."""


LEAST_SURVIVAL: Final = 0.8
"""The least share of the adapter's change that must be left after all rounding: the gate `adapter_strength` fails where
it is shown to be less. `protect_adapter` holds single layers to it."""


def waived(settings: HasGates) -> dict[BuiltIn, str]:
    """The built-in gates that a user has waived by setting their figure to null, with a note on each."""
    return {
        name: waiver(name, figure)
        for name, figure in FIGURE_OF.items()
        if figure in settings.gates and settings.gates[figure] is None
    }


def expected_gates(
    settings: HasGates, *, adapter: bool, nearest: bool, graph: bool, files: bool = True, weights: bool = True
) -> tuple[list[BuiltIn], list[str]]:
    """The built-in gates that apply and are not waived, and a note on each that applies but is waived, or that the
    profile `off` does not set.

    Args:
        settings: the user's.
        adapter: whether the reference has an adapter.
        nearest: whether the model rounded to nearest is run.
        graph: whether the artifact is an ONNX graph.
        files: whether the files beside the weights were compared; false for reports of earlier versions.
        weights: whether the weights were compared; likewise.
    """
    applies: dict[BuiltIn, bool] = {
        "config": True,
        "files": files,
        "tokenizer": True,
        "weights": weights,
        "graph": graph,
        "merge": adapter,
        "adapter": adapter,
        "adapter_strength": adapter and weights,
        "better_than_rtn": nearest,
    }
    given_up = waived(settings)
    if settings.profile == "off":
        off = {name: f"the gate {name} is not set: profile is off" for name in OF_PROFILES}
        given_up = off | given_up
    expected = [name for name, applying in applies.items() if applying and name not in given_up]
    return expected, [note for name, note in given_up.items() if applies[name]]


@dataclass(frozen=True)
class _Gate:
    """A gate on a figure's interval.

    Attributes:
        name: of the result.
        figure: the name of the figure that it limits.
        domain: None for all text.
        bound: which side is limited.
        limit: None if it is not known, which leaves the gate undecided.
        strict: whether a value equal to the limit fails.
        unknown: why the limit is not known.
        equal: what a value exactly equal to a strict limit means; None if that is a failure.
        source: who sets the limit; None for a gate that is built in.
        only_fails: whether it passes unless the limit is shown to be broken.
    """

    name: str
    figure: str
    domain: str | None
    bound: Bound
    limit: float | None
    strict: bool = False
    unknown: str = ""
    equal: str | None = None
    source: str | None = None
    only_fails: bool = False


def decide(
    limits: Sequence[Limit], figures: Sequence[Figure], checks: Sequence[CheckResult], expected: Sequence[BuiltIn]
) -> list[GateResult]:
    """Decides every gate.

    Args:
        limits: from `qexport.gates.limits`.
        figures: what was measured, over all text and by domain.
        checks: passed or not, without statistics.
        expected: the built-in gates that apply: `graph` for ONNX, `merge` and `adapter` with an adapter,
            `better_than_rtn` for GPTQ. One that is expected and was not measured is undecided.

    Returns:
        The built-in gates first, then one result for each limit. Names are unique.
    """
    return [*_built_in(figures, checks, expected), *(_decided(_gate(limit), figures) for limit in limits)]


def needs_more(results: Sequence[GateResult]) -> bool:
    """Whether more windows could decide an undecided gate: they narrow its interval, or give an interval to a domain or
    a tail that had too few windows for one.
    """
    return any(
        result.verdict == "undecided"
        and result.figure is not None
        and CATALOGUE[result.figure].teacher_forced
        and None not in (result.limit, result.value)
        and (result.low is None or result.low != result.high)
        for result in results
    )


def _built_in(
    figures: Sequence[Figure], checks: Sequence[CheckResult], expected: Sequence[BuiltIn]
) -> Iterator[GateResult]:
    for name in BUILT_IN:
        if name in expected:
            match name:
                case "config" | "files" | "tokenizer" | "weights" | "graph":
                    yield _checked(name, [check for check in checks if check.gate == name])
                case "merge":
                    yield _merge(figures)
                case "adapter":
                    yield _decided(_ADAPTER, figures)
                case "adapter_strength":
                    yield _adapter_strength(figures)
                case "better_than_rtn":
                    yield _decided(_BETTER_THAN_RTN, figures)


_ADAPTER: Final = _Gate(
    "adapter", FIGURE_OF["adapter"], None, "at_most", 0.0, strict=True,
    equal="the adapter changes no prediction on this text, so nothing tells whether it was applied",
)  # fmt: skip

_BETTER_THAN_RTN: Final = _Gate("better_than_rtn", FIGURE_OF["better_than_rtn"], None, "at_most", 0.0, strict=True)


def _merge(figures: Sequence[Figure]) -> GateResult:
    """The worse one of the verdicts on both figures, since each must hold."""
    gates = [_merge_gate(figures, FIGURE_OF["merge"], 0.0)]
    if find_figure(figures, MERGE_ERROR) is not None:
        gates.append(_merge_gate(figures, MERGE_ERROR, MOST_MERGE_ERROR))
    return max((_decided(gate, figures) for gate in gates), key=lambda result: _BADNESS[result.verdict])


_BADNESS: Final[Mapping[Verdict, int]] = {"pass": 0, "undecided": 1, "fail": 2}


def _adapter_strength(figures: Sequence[Figure]) -> GateResult:
    """The share in the weights decides. That in the predictions, which every kind of drift moves and a few documents
    leave open, can only fail; so can the share that rounding left, which earlier reports do not have.
    """
    weights, predictions = (_worse_side(name, figures) for name in ADAPTER_STRENGTHS)
    survival = _decided(_SURVIVAL, figures)
    failed = (each for each in (weights, survival, predictions) if each.verdict == "fail")
    return next(failed, weights)


_SURVIVAL: Final = _Gate("adapter_strength", "adapter_survival", None, "at_least", LEAST_SURVIVAL)


def _worse_side(name: str, figures: Sequence[Figure]) -> GateResult:
    sides = zip(_SIDES, ADAPTER_STRENGTHS[name], strict=True)
    gates = [_Gate("adapter_strength", name, None, bound, limit) for bound, limit in sides]
    return max((_decided(gate, figures) for gate in gates), key=lambda result: _BADNESS[result.verdict])


_SIDES: Final[tuple[Bound, Bound]] = ("at_least", "at_most")


def _merge_gate(figures: Sequence[Figure], name: str, allowed: float) -> _Gate:
    """A limit on what exceeds the noise."""
    measured = find_figure(figures, name)
    floor = None if measured is None else measured.noise_floor
    limit = None if floor is None else allowed + NOISE_MARGIN * floor
    return _Gate("merge", name, None, "at_most", limit, unknown="the noise floor was not measured")


def _checked(name: str, checks: Sequence[CheckResult]) -> GateResult:
    passed = sum(check.passed is True for check in checks)
    failed = [f"{check.name} ({check.detail})" for check in checks if check.passed is False]
    if failed:
        return GateResult(name=name, verdict="fail", reason=f"not as in the reference: {', '.join(failed)}")
    if not passed:
        return GateResult(name=name, verdict="undecided", reason="nothing was checked")
    count = "1 check" if passed == 1 else f"{passed} checks"
    return GateResult(name=name, verdict="pass", reason=f"{count} passed")


def _gate(limit: Limit) -> _Gate:
    return _Gate(
        limit.name, limit.figure, limit.domain, limit.bound, limit.value, source=limit.source or None,
        only_fails=limit.only_fails,
    )  # fmt: skip


def _decided(gate: _Gate, figures: Sequence[Figure]) -> GateResult:
    figure = find_figure(figures, gate.figure, gate.domain)
    verdict, reason = _verdict(gate, figure)
    measured: dict[str, Any] = {}
    if figure is not None:
        ends = {"low": figure.sequence_low, "high": figure.sequence_high}
        measured = {"value": figure.value, **ends, "n": figure.n, "unit": figure.unit}
    return GateResult(
        name=gate.name,
        figure=gate.figure,
        domain=gate.domain,
        bound=gate.bound,
        limit=gate.limit,
        verdict=verdict,
        reason=reason,
        source=gate.source,
        room=_room(gate, figure),
        **measured,
    )


def _room(gate: _Gate, figure: Figure | None) -> float | None:
    """How far the worse end of the interval is from the limit, as a share of the distance between the limit and the
    value of an artifact that equals its reference; of the limit itself where no such value is known. None where the
    interval may reach beyond the limit.
    """
    if figure is None or gate.limit is None or gate.only_fails:
        return None
    end = figure.sequence_high if gate.bound == "at_most" else figure.sequence_low
    allowed = abs(gate.limit - (CATALOGUE[gate.figure].ideal or 0.0))
    if end is None or not allowed:
        return None
    room = (gate.limit - end if gate.bound == "at_most" else end - gate.limit) / allowed
    return room if math.isfinite(room) else None


def _verdict(gate: _Gate, figure: Figure | None) -> tuple[Verdict, str]:
    if figure is None or figure.n < 1:
        return "undecided", "not measured"
    low, high = figure.sequence_low, figure.sequence_high
    if low is None or high is None:
        return "undecided", f"measured on {counted(figure.n, figure.unit)}, which gives no interval to decide on"
    if low > high:
        return "undecided", f"its interval is empty: {low:.5g} to {high:.5g}"
    if gate.limit is None:
        return "undecided", gate.unknown
    verdict, reason = _compared(gate, gate.limit, low, high, counted(figure.n, figure.unit))
    if gate.only_fails:
        return verdict, reason
    excess = figure.value - gate.limit if gate.bound == "at_most" else gate.limit - figure.value
    if verdict == "pass" and excess > 0:
        return "undecided", f"the value, {figure.value:.5g}, breaks the limit although its interval does not"
    return verdict, reason


def _compared(gate: _Gate, limit: float, low: float, high: float, number: str) -> tuple[Verdict, str]:
    """The verdict on an interval with both ends."""
    if gate.equal is not None and low == high == limit:
        return "undecided", gate.equal
    # negated for at_least, so that a smaller value is always better
    best, worst = (low, high) if gate.bound == "at_most" else (-high, -low)
    end = limit if gate.bound == "at_most" else -limit
    words = f"{'below' if gate.strict else gate.bound.replace('_', ' ')} {limit:.5g}"
    place = f"lies at {low:.5g} to {high:.5g}" if low != high else f"is exactly {low:.5g}"
    if worst < end or (worst == end and not gate.strict):
        return "pass", f"{place}, {'all of it ' if low != high else ''}{words}"
    if best > end or (best == end and gate.strict):
        return "fail", f"{place}, {'none of it' if low != high else 'not'} {words}"
    if gate.only_fails:
        return "pass", f"{place}, part of it {words}: not shown to be worse by {number}"
    return "undecided", f"{place}, part of it {words}: not decided by {number}"
