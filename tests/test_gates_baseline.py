"""How much worse than a release an artifact may be, and how that is decided."""

from __future__ import annotations

import math
from typing import Any

import pytest

import reports
from qexport.artifact.figures import Figure, GateResult, Verdict
from qexport.gates import GatesFile
from qexport.gates.baseline import PAIRED, baseline_limits
from qexport.gates.deciding import decide, needs_more
from qexport.gates.deciding_again import decide_again
from qexport.gates.failures import gates_error
from qexport.gates.limits import Limit
from reports import baseline_record, figure


def limits(floors: dict[str, float] | None = None, gates: dict[str, Any] | None = None, **release: Any) -> list[Limit]:
    settings = GatesFile.model_validate({"gates": gates or {}})
    found, _ = baseline_limits(baseline_record(**release), floors or {}, settings)
    return found


def values(found: list[Limit]) -> dict[str, float]:
    return {limit.figure: limit.value for limit in found}


def decided(name: str, low: float, high: float, value: float | None = None, **release: Any) -> GateResult:
    limit = next(limit for limit in limits(**release) if limit.figure == name)
    measured = figure(name, (low + high) / 2 if value is None else value, sequence_low=low, sequence_high=high)
    (gate,) = decide([limit], [measured], [], [])
    return gate


def test_each_limit_is_a_share_of_what_the_release_has_lost() -> None:
    found = values(limits())
    assert list(found) == list(PAIRED)
    assert found["baseline_mean_kl"] == pytest.approx(0.1 * 0.155)
    assert found["baseline_perplexity_ratio"] == pytest.approx(math.exp(0.1 * 0.155))
    assert found["baseline_top1_agreement"] == pytest.approx(-0.1 * 0.203)
    assert found["baseline_decisive_flips"] == pytest.approx(0.1 * 0.058)
    assert values(limits(margin=0.3))["baseline_mean_kl"] == pytest.approx(0.3 * 0.155)


def test_a_release_without_drift_counts_as_one_that_another_order_of_sums_has_moved() -> None:
    found = values(limits(mean_kl=0.0, perplexity_ratio=1.0, top1_agreement=1.0, decisive_flips=0.0))
    assert found == pytest.approx({
        "baseline_mean_kl": 0.0003, "baseline_perplexity_ratio": math.exp(0.0003), "baseline_top1_agreement": -0.005,
        "baseline_decisive_flips": 0.0001,
    })  # fmt: skip


def test_no_limit_is_below_three_times_the_noise_floor() -> None:
    floors = {"mean_kl": 0.02, "perplexity_ratio": 0.98, "top1_agreement": 0.97, "decisive_flips": 0.01}
    found = values(limits(floors))
    assert found == pytest.approx({
        "baseline_mean_kl": 0.06, "baseline_perplexity_ratio": math.exp(-3 * math.log(0.98)),
        "baseline_top1_agreement": -0.09, "baseline_decisive_flips": 0.03,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.01, 0.015, "pass"), (0.0, 0.0, "pass"), (0.016, 0.02, "fail"), (0.0, 0.02, "undecided")],
)
def test_divergence_must_be_shown_to_be_no_more_than_the_margin_worse(
    low: float, high: float, verdict: Verdict
) -> None:
    assert decided("baseline_mean_kl", low, high).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.01, 0.01, "pass"), (-0.03, -0.021, "fail"), (-0.03, 0.01, "undecided")],
)
def test_agreement_is_better_the_higher_it_is(low: float, high: float, verdict: Verdict) -> None:
    assert decided("baseline_top1_agreement", low, high).verdict == verdict


@pytest.mark.parametrize("name", ["baseline_perplexity_ratio", "baseline_decisive_flips"])
def test_gates_on_what_scatters_most_only_fail(name: str) -> None:
    limit = values(limits())[name]
    beyond = decided(name, limit + 0.001, limit + 0.01)
    assert beyond.verdict == "fail"
    assert "none of it at most" in beyond.reason
    across = decided(name, limit - 0.01, limit + 0.01, value=limit + 0.005)
    assert across.verdict == "pass"
    assert "not shown to be worse by 38 windows" in across.reason
    assert across.room is None, "the interval reaches beyond the limit"
    within = decided(name, limit - 0.02, limit - 0.01)
    assert (within.verdict, within.room) == ("pass", None)


def test_without_an_interval_nothing_passes() -> None:
    for limit in limits():
        for low, high in ((None, 0.0), (0.0, None), (None, None)):
            measured = figure(limit.figure, 0.0, sequence_low=low, sequence_high=high)
            (gate,) = decide([limit], [measured], [], [])
            assert gate.verdict == "undecided"
            assert needs_more([gate])
        (missing,) = decide([limit], [], [], [])
        assert (missing.verdict, missing.reason) == ("undecided", "not measured")


def test_a_users_limit_takes_the_place_of_the_margins() -> None:
    own = {"baseline_mean_kl": {"at_most": 0.0}, "baseline_top1_agreement": {"domains": {"code": {"at_least": -0.1}}}}
    assert [limit.figure for limit in limits(gates=own)] == list(PAIRED[1:])


def test_null_waives_one_and_the_waiver_is_noted() -> None:
    settings = GatesFile.model_validate({"gates": {"baseline_mean_kl": None}})
    found, notes = baseline_limits(baseline_record(), {}, settings)
    assert [limit.figure for limit in found] == list(PAIRED[1:])
    assert notes == ["the gate baseline_mean_kl is waived: verify.gates sets baseline_mean_kl to null"]


def no_profile(method: str, bits: int, parameters: int) -> None:
    raise AssertionError("the profile is off")


def again(figures: list[Figure], gates: dict[str, Any] | None = None) -> tuple[dict[str, GateResult], list[str]]:
    report = reports.report(figures=[*reports.figures(), *figures], baseline=baseline_record())
    settings = GatesFile.model_validate({"profile": "off", "gates": gates or {}})
    results, notes = decide_again(report, settings, no_profile)
    return {result.name: result for result in results if result.name in PAIRED}, notes


def test_gates_are_decided_again_with_the_reports_margin() -> None:
    found, _ = again(reports.baseline_figures(mean_kl=0.03))
    assert {name: result.verdict for name, result in found.items()} == {
        "baseline_mean_kl": "fail", "baseline_perplexity_ratio": "pass", "baseline_top1_agreement": "pass",
        "baseline_decisive_flips": "pass",
    }  # fmt: skip
    assert found["baseline_mean_kl"].source == "verify.baseline_margin"
    assert found["baseline_mean_kl"].limit == pytest.approx(0.0155)
    other, notes = again(
        reports.baseline_figures(mean_kl=0.03),
        {"baseline_mean_kl": {"at_most": 0.05}, "baseline_decisive_flips": None},
    )
    assert other["baseline_mean_kl"].verdict == "pass"
    assert "baseline_decisive_flips" not in other
    assert any("baseline_decisive_flips is waived" in note for note in notes)


def test_the_error_says_by_how_much_and_that_production_is_better() -> None:
    failed = decided("baseline_mean_kl", 0.02, 0.03)
    error = gates_error([failed], "out")
    assert error is not None
    assert "baseline_mean_kl is 0.025 where the limit is at most 0.0155" in error.what
    assert "keep the release that is in production" in (error.mend or "")
