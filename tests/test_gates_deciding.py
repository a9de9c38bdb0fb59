from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qexport.artifact.figures import CATALOGUE, CheckResult, Figure, GateResult, Verdict, overall
from qexport.errors import RecipeError
from qexport.gates import GatesFile
from qexport.gates.deciding import BuiltIn, decide, needs_more
from qexport.gates.deciding_again import decide_again, noise_floors
from qexport.gates.failures import gates_error
from qexport.gates.limits import Bound, Limit
from qexport.quantizing import profile_of_layer
from reports import figure, gate_result, report

VERDICTS = {"fail": 0, "undecided": 1, "pass": 2}


def between(low: float | None, high: float | None, *, name: str = "mean_kl", **changes: Any) -> Figure:
    """A figure whose confidence sequence is that, and whose fixed-sample interval would decide anything."""
    middle = 0.0 if low is None or high is None else low + (high - low) / 2  # halves of the least numbers are 0
    return figure(name, middle, half=0.0, sequence_low=low, sequence_high=high, **changes)


def decided(
    limit: float, bound: Bound, *figures: Figure, name: str = "mean_kl", domain: str | None = None
) -> GateResult:
    (result,) = decide([Limit(name, domain, bound, limit, True)], figures, [], [])
    return result


@pytest.mark.parametrize(
    ("low", "high", "at_most", "at_least"),
    [
        (0.1, 0.2, "pass", "fail"),
        (0.1, 0.3, "pass", "undecided"),
        (0.1, 0.4, "undecided", "undecided"),
        (0.3, 0.4, "undecided", "pass"),
        (0.4, 0.5, "fail", "pass"),
        (0.3, 0.3, "pass", "pass"),
        (0.3 - 1e-12, 0.3 - 1e-12, "pass", "fail"),
        (0.3 + 1e-12, 0.3 + 1e-12, "fail", "pass"),
    ],
)
def test_a_gate_is_decided_on_its_whole_confidence_sequence(
    low: float, high: float, at_most: str, at_least: str
) -> None:
    assert decided(0.3, "at_most", between(low, high)).verdict == at_most
    assert decided(0.3, "at_least", between(low, high)).verdict == at_least


def test_a_result_says_what_decided_it() -> None:
    result = decided(0.3, "at_most", between(0.1, 0.2, domain="code", n=19), domain="code")
    assert result == GateResult(
        name="mean_kl[code]", figure="mean_kl", domain="code", bound="at_most", limit=0.3, value=0.1 / 2 + 0.2 / 2,
        low=0.1, high=0.2, n=19, unit="window", verdict="pass", reason="lies at 0.1 to 0.2, all of it at most 0.3",
        room=(0.3 - 0.2) / 0.3,
    )  # fmt: skip
    assert decided(0.15, "at_most", between(0.1, 0.2)).reason == (
        "lies at 0.1 to 0.2, part of it at most 0.15: not decided by 38 windows"
    )
    assert decided(0.05, "at_most", between(0.1, 0.2)).reason == "lies at 0.1 to 0.2, none of it at most 0.05"
    assert decided(0.3, "at_least", between(0.2, 0.2)).reason == "is exactly 0.2, not at least 0.3"


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ([], "not measured"),
        ([between(0.1, 0.2, domain="code")], "not measured"),
        ([between(0.1, 0.2, name="median_kl")], "not measured"),
        ([between(0.1, 0.2, n=0)], "not measured"),
        ([between(None, 0.2)], "measured on 38 windows, which gives no interval to decide on"),
        ([between(0.1, None)], "measured on 38 windows, which gives no interval to decide on"),
        ([between(None, 0.2, n=1024)], "measured on 1,024 windows, which gives no interval to decide on"),
        ([between(None, None, n=1)], "measured on 1 window, which gives no interval to decide on"),
        ([between(0.2, 0.1)], "its interval is empty: 0.2 to 0.1"),
    ],
)
@pytest.mark.parametrize("limit", [-1e9, 0.15, 1e9])
@pytest.mark.parametrize("bound", ["at_most", "at_least"])
def test_what_was_not_measured_is_never_passed(figures: list[Figure], reason: str, limit: float, bound: Bound) -> None:
    result = decided(limit, bound, *figures)
    assert (result.verdict, result.reason) == ("undecided", reason)


@pytest.mark.parametrize("field", ["value", "sequence_low", "sequence_high"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_does_not_come_to_be(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Figure.model_validate(figure("mean_kl", 0.1).model_dump() | {field: value})


finite = st.floats(-1e6, 1e6)
maybe = st.none() | finite


@given(finite, maybe, maybe, st.integers(0, 3), st.sampled_from(["at_most", "at_least"]))
def test_no_gate_passes_whose_interval_crosses_its_limit_or_is_missing(
    limit: float, low: float | None, high: float | None, n: int, bound: Bound
) -> None:
    verdict = decided(limit, bound, between(low, high, n=n)).verdict
    if n == 0 or low is None or high is None or low > high:
        assert verdict == "undecided"
    elif low == high == limit:
        assert verdict == "pass"
    elif low < limit < high:
        assert verdict == "undecided"
    else:
        kept = [value <= limit if bound == "at_most" else value >= limit for value in (low, high)]
        assert verdict == ("pass" if all(kept) else "fail" if not any(kept) else "undecided")


@given(finite, finite, finite, finite, st.sampled_from(["at_most", "at_least"]))
def test_a_looser_limit_never_gives_a_worse_verdict(
    limit: float, looser: float, low: float, high: float, bound: Bound
) -> None:
    assume(low <= high)
    tight, loose = sorted((limit, looser), reverse=bound == "at_least")
    verdicts = [VERDICTS[decided(each, bound, between(low, high)).verdict] for each in (tight, loose)]
    assert verdicts == sorted(verdicts)


@given(finite, finite, finite, finite, finite)
def test_a_narrower_interval_decides_no_gate_the_other_way(
    limit: float, a: float, b: float, c: float, d: float
) -> None:
    low, inner_low, inner_high, high = sorted((a, b, c, d))
    wide = decided(limit, "at_most", between(low, high)).verdict
    assert wide in ("undecided", decided(limit, "at_most", between(inner_low, inner_high)).verdict)


def test_room_is_a_share_of_what_the_limit_allows() -> None:
    """An interval that ends half way to the limit leaves half, whatever the value of an equal artifact is."""
    kinds: list[tuple[str, float, Bound, float, float]] = [
        ("mean_kl", 0.2, "at_most", 0.05, 0.1),
        ("perplexity_ratio", 1.2, "at_most", 0.9, 1.1),
        ("perplexity_ratio", 0.8, "at_least", 0.9, 1.1),
        ("top1_agreement", 0.8, "at_least", 0.9, 0.95),
        ("artifact_perplexity", 20.0, "at_most", 5.0, 10.0),
    ]
    for name, limit, bound, low, high in kinds:
        limits = [Limit(name, None, bound, limit, by_user=True, source="the user's gates")]
        (result,) = decide(limits, [between(low, high, name=name)], [], [])
        assert result.room == pytest.approx(0.5), name
        assert result.source == "the user's gates"
    assert decided(0.15, "at_most", between(0.1, 0.2)).room == pytest.approx(-1 / 3)
    assert built_in("adapter", between(-0.2, -0.1, name="kl_over_base")).room is None
    assert decided(0.15, "at_most").room is None


# Built-in gates


def built_in(name: BuiltIn, *figures: Figure, checks: Sequence[CheckResult] = ()) -> GateResult:
    (result,) = decide([], figures, checks, [name])
    assert result.name == name
    return result


@pytest.mark.parametrize(
    ("low", "high", "better", "applied"),
    [
        (-0.3, -0.1, "pass", "pass"),
        (-0.3, 0.1, "undecided", "undecided"),
        (-0.3, 0.0, "undecided", "undecided"),
        (0.1, 0.2, "fail", "fail"),
        (0.0, 0.2, "fail", "fail"),
        (0.0, 0.0, "fail", "undecided"),
        (-1e-9, -1e-9, "pass", "pass"),
    ],
)
def test_differences_must_be_below_zero(low: float, high: float, better: str, applied: str) -> None:
    assert built_in("better_than_rtn", between(low, high, name="kl_over_rtn")).verdict == better
    assert built_in("adapter", between(low, high, name="kl_over_base")).verdict == applied


def test_an_adapter_without_effect_is_undecided_and_told_so() -> None:
    result = built_in("adapter", between(0.0, 0.0, name="kl_over_base"))
    assert result.reason.startswith("the adapter changes no prediction")
    assert built_in("adapter", between(-0.3, 0.0, name="kl_over_base")).reason.startswith("lies at -0.3 to 0, part of")


def test_an_artifact_that_is_round_to_nearest_is_not_better_than_it() -> None:
    result = built_in("better_than_rtn", between(0.0, 0.0, name="kl_over_rtn"))
    assert (result.verdict, result.reason) == ("fail", "is exactly 0, not below 0")


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.001, 0.003, "pass"), (0.002, 0.004, "undecided"), (0.0031, 0.004, "fail")]
)
def test_the_merge_must_lie_within_three_times_its_noise_floor(low: float, high: float, verdict: str) -> None:
    result = built_in("merge", between(low, high, name="merge_kl", noise_floor=0.001))
    assert (result.verdict, result.limit) == (verdict, 0.003)


def test_the_merge_is_undecided_without_its_noise_floor() -> None:
    result = built_in("merge", between(0.0, 0.0, name="merge_kl"), between(0.1, 0.2, noise_floor=0.1))
    assert (result.verdict, result.reason) == ("undecided", "the noise floor was not measured")


def test_checks_that_had_nothing_to_look_at_are_undecided_together() -> None:
    nothing, passed, failed = (
        CheckResult(gate="config", name="x", passed=each, detail="") for each in (None, True, False)
    )
    assert built_in("config", checks=[nothing]).verdict == "undecided"
    assert built_in("config", checks=[nothing, passed]).reason == "1 check passed"
    assert built_in("config", checks=[nothing, passed, failed]).verdict == "fail"


@pytest.mark.parametrize(
    ("weights", "predictions", "verdict", "limit"),
    [
        ((0.97, 1.01), (0.7, 1.1), "pass", None),
        ((1.0, 1.0), None, "pass", None),
        ((0.49, 0.51), (0.7, 1.1), "fail", 0.8),
        ((1.9, 2.1), (0.7, 1.1), "fail", 1.25),
        ((0.97, 1.01), (0.3, 0.4), "fail", 0.6),
        ((0.97, 1.01), (1.5, 1.7), "pass", None),
        ((0.7, 1.0), (2.0, 3.0), "fail", 1.6),
        (None, (0.9, 1.1), "undecided", 0.8),
        (None, None, "undecided", 0.8),
    ],
)
def test_the_adapter_must_be_in_the_artifact_once(
    weights: tuple[float, float] | None, predictions: tuple[float, float] | None, verdict: str, limit: float | None
) -> None:
    figures = [
        between(*ends, name=name)
        for name, ends in (("adapter_strength_weights", weights), ("adapter_strength_predictions", predictions))
        if ends is not None
    ]
    result = built_in("adapter_strength", *figures)
    assert result.verdict == verdict
    assert limit in (None, result.limit)


@pytest.mark.parametrize(
    ("survival", "verdict"), [((0.7, 0.79), "fail"), ((0.7, 0.9), "pass"), ((0.9, 1.0), "pass"), (None, "pass")]
)
def test_rounding_must_leave_most_of_the_adapter(survival: tuple[float, float] | None, verdict: str) -> None:
    figures = [between(0.97, 1.01, name="adapter_strength_weights")]
    figures += [] if survival is None else [between(*survival, name="adapter_survival")]
    result = built_in("adapter_strength", *figures, between(0.9, 1.1, name="adapter_strength_predictions"))
    assert (result.verdict, result.limit) == (verdict, 0.8)
    assert (result.figure == "adapter_survival") == (verdict == "fail")


@pytest.mark.parametrize("name", ["config", "files", "tokenizer", "weights", "merge", "adapter", "better_than_rtn"])
def test_a_built_in_gate_that_was_not_measured_is_undecided(name: BuiltIn) -> None:
    other = CheckResult(gate="config" if name == "tokenizer" else "tokenizer", name="x", passed=True, detail="")
    assert built_in(name, between(0.1, 0.2, noise_floor=0.1), checks=[other]).verdict == "undecided"


def test_checks_fail_with_the_names_of_what_failed() -> None:
    checks = [
        CheckResult(gate="config", name="rope_theta", passed=False, detail="10000 for 100000"),
        CheckResult(gate="config", name="head_dim", passed=True, detail="equal"),
        CheckResult(gate="tokenizer", name="ids", passed=True, detail="equal"),
    ]
    config, tokenizer = decide([], [], checks, ["tokenizer", "config"])
    assert (config.verdict, config.reason) == ("fail", "not as in the reference: rope_theta (10000 for 100000)")
    assert (tokenizer.verdict, tokenizer.reason) == ("pass", "1 check passed")


def test_gates_that_are_not_expected_are_not_decided() -> None:
    assert decide([], report().figures, report().checks, []) == []


# More windows


def test_more_windows_are_wanted_for_what_they_can_decide() -> None:
    undecided = decided(0.15, "at_most", between(0.1, 0.2))
    assert needs_more([gate_result(), undecided])
    assert needs_more([gate_result(), decided(0.15, "at_most", between(None, None))])
    assert needs_more([gate_result(), decided(0.15, "at_most", between(0.1, None))])
    assert needs_more([built_in("better_than_rtn", between(-0.1, 0.1, name="kl_over_rtn"))])
    assert needs_more([decided(0.15, "at_most", between(None, None))]), "a few windows give no interval, more do"
    assert needs_more([decided(9.0, "at_most", between(0.1, None, name="kl_p999"), name="kl_p999")])


@pytest.mark.parametrize(
    "result",
    [
        decided(0.3, "at_most", between(0.1, 0.2)),
        decided(0.05, "at_most", between(0.1, 0.2)),
        decided(0.15, "at_most"),
        decided(0.15, "at_most", between(0.1, 0.2, name="edit_distance"), name="edit_distance"),
        built_in("adapter", between(0.0, 0.0, name="kl_over_base")),
        built_in("merge", between(0.1, 0.2, name="merge_kl")),
        built_in("merge", between(0.1, 0.2, name="merge_kl", noise_floor=0.05)),
        built_in("config"),
    ],
    ids=lambda result: f"{result.name} {result.verdict} {result.reason[:20]}",
)
def test_more_windows_are_not_wanted_where_they_change_nothing(result: GateResult) -> None:
    assert not needs_more([gate_result(), result])


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "undecided"], "undecided"),
        (["undecided", "pass", "fail"], "fail"),
        (["pass", "fail"], "fail"),
        (["undecided"], "undecided"),
        ([], "pass"),
    ],
)
def test_one_verdict_that_is_no_pass_keeps_the_whole_from_passing(verdicts: list[Verdict], whole: Verdict) -> None:
    """Of gates in a report, and of reports in a run, whose layouts are published together."""
    assert overall(verdicts) == overall(reversed(verdicts)) == whole


# Deciding again


def again(**settings: Any) -> dict[str, str]:
    results, _ = decide_again(
        report(**settings.pop("report", {})), GatesFile.model_validate(settings), profile_of_layer
    )
    return {result.name: result.verdict for result in results}


def test_a_report_is_decided_again_with_other_limits() -> None:
    built_in = dict.fromkeys(("config", "tokenizer", "merge", "adapter", "better_than_rtn"), "pass")
    sound = {
        **built_in,
        "perplexity_ratio": "pass",
        "mean_kl": "pass",
        "top1_agreement": "pass",
        "decisive_flips": "pass",
    }
    assert again() == sound
    assert again(gates={"mean_kl": {"at_most": 0.16}}) == sound | {"mean_kl": "undecided"}
    assert again(gates={"mean_kl": {"at_most": 0.1}}) == sound | {"mean_kl": "fail"}
    assert set(again(profile="nf4").values()) == {"pass", "fail", "undecided"}
    assert again(profile="off") == dict.fromkeys(("config", "tokenizer", "merge"), "pass")


def test_the_profile_off_sets_no_gate_on_how_good_an_artifact_is() -> None:
    """Worse than rounding to nearest and closer to the base: a failure, unless no limits are wanted."""
    worse = [
        each.model_copy(update={"value": 0.5, "sequence_low": 0.4, "sequence_high": 0.6})
        if each.name in {"kl_over_rtn", "kl_over_base"}
        else each
        for each in report().figures
    ]
    limited = again(report={"figures": worse})
    assert (limited["adapter"], limited["better_than_rtn"]) == ("fail", "fail")
    assert set(again(report={"figures": worse}, profile="off").values()) == {"pass"}
    _, notes = decide_again(report(figures=worse), GatesFile(profile="off"), profile_of_layer)
    assert notes == [
        "the gate adapter is not set: profile is off",
        "the gate better_than_rtn is not set: profile is off",
    ]
    asked = again(report={"figures": worse}, profile="off", gates={"kl_over_base": {"at_most": 0}})
    assert asked["kl_over_base"] == "fail"
    broken = [CheckResult(gate="config", name="config.json", passed=False, detail="another rope_theta")]
    assert again(report={"checks": broken}, profile="off")["config"] == "fail"


@pytest.mark.parametrize("name", ["merge", "adapter", "better_than_rtn"])
def test_a_gate_that_was_taken_out_of_a_report_is_decided_on_its_figure(name: str) -> None:
    limited = {"merge": "merge_kl", "adapter": "kl_over_base", "better_than_rtn": "kl_over_rtn"}[name]
    broken = [
        each.model_copy(update={"value": 0.5, "sequence_low": 0.4, "sequence_high": 0.6})
        if each.name == limited
        else each
        for each in report().figures
    ]
    assert again(report={"figures": broken, "gates": []})[name] == "fail"


def test_a_value_over_the_limit_is_no_pass_whatever_its_interval_says() -> None:
    edited = [figure("mean_kl", 5.0, sequence_low=0.15, sequence_high=0.17), figure("top1_agreement", 0.9)]
    limits = {"mean_kl": {"at_most": 0.3}, "top1_agreement": {"at_least": 0.8}}
    verdicts = again(profile="off", gates=limits, report={"figures": edited})
    assert (verdicts["mean_kl"], verdicts["top1_agreement"]) == ("undecided", "pass")


@pytest.mark.parametrize("floor", [5e-324, 1e308])
def test_a_noise_floor_of_no_ordinary_size_is_no_defect(floor: float) -> None:
    figures = [figure("mean_kl", 0.1, noise_floor=floor)]
    settings = GatesFile.model_validate({"profile": "off", "gates": {"mean_kl": {"at_most": 0.3}}})
    if floor < 1:
        notes = decide_again(report(figures=figures), settings, profile_of_layer)[1]
        assert not any("three times" in note for note in notes)
    else:
        with pytest.raises(RecipeError, match="noise floor"):
            decide_again(report(figures=figures), settings, profile_of_layer)


def test_domains_that_the_report_lacks_are_undecided() -> None:
    verdicts = again(gates={"mean_kl": {"domains": {"code": {"at_most": 0.3}, "law": {"at_most": 0.3}}}})
    assert (verdicts["mean_kl"], verdicts["mean_kl[code]"], verdicts["mean_kl[law]"]) == ("pass", "pass", "undecided")


def test_speed_is_found_among_the_timings() -> None:
    assert again(gates={"speed_ratio": {"at_least": 0.5}})["speed_ratio"] == "pass"


def test_built_in_gates_of_the_report_are_decided_again_from_its_figures() -> None:
    before = [gate_result(name, verdict="fail") for name in ("merge", "adapter", "better_than_rtn")]
    verdicts = again(report={"gates": before})
    assert [verdicts[gate.name] for gate in before] == ["pass", "pass", "pass"]
    missing = [each for each in report().figures if each.name != "kl_over_rtn"]
    assert again(report={"gates": before, "figures": missing})["better_than_rtn"] == "undecided"
    assert again(report={"gates": []})["better_than_rtn"] == "pass"
    assert "better_than_rtn" not in again(report={"gates": [], "figures": missing}), "no method that it is held against"


def test_the_gate_on_graphs_is_decided_again_where_there_was_a_graph() -> None:
    checked = [*report().checks, CheckResult(gate="graph", name="x", passed=True, detail="")]
    assert again(report={"checks": checked, "gates": []})["graph"] == "pass"
    assert again(report={"gates": [gate_result("graph", figure=None)]})["graph"] == "undecided"
    assert "graph" not in again()


def test_the_gate_on_files_is_decided_again_where_they_were_compared() -> None:
    checked = [*report().checks, CheckResult(gate="files", name="tokenizer.json", passed=False, detail="x")]
    assert again(report={"checks": checked, "gates": []})["files"] == "fail"
    assert again(report={"gates": [gate_result("files", figure=None)]})["files"] == "undecided"
    assert "files" not in again(), "qexport 0.2 compared none"


def test_checks_are_decided_even_where_the_report_has_none() -> None:
    verdicts = again(report={"checks": [], "gates": []})
    assert (verdicts["config"], verdicts["tokenizer"]) == ("undecided", "undecided")


def test_limits_below_the_reports_noise_floor_are_refused() -> None:
    with pytest.raises(RecipeError, match="noise floor"):
        again(gates={"mean_kl": {"at_most": 0.0002}})
    of_domain = between(0.1, 0.2, name="chrf", domain="code", noise_floor=0.1)
    assert noise_floors([*report().figures, of_domain]) == {
        "perplexity_ratio": 1.0001, "mean_kl": 0.0001, "top1_agreement": 0.999, "decisive_flips": 0.0,
        "merge_kl": 0.0001,
    }  # fmt: skip
    figures = [between(0.0, 0.0, noise_floor=0.002)]
    results, notes = decide_again(report(figures=figures), GatesFile(profile="16bit"), profile_of_layer)
    assert [result.limit for result in results if result.name == "mean_kl"] == [pytest.approx(0.006)]
    assert len(notes) == 1


@given(st.sampled_from([name for name, kind in CATALOGUE.items() if kind.gated]), finite)
def test_a_report_without_figures_passes_no_gate_on_any(name: str, limit: float) -> None:
    bound: Bound = "at_least" if CATALOGUE[name].better == "higher" else "at_most"
    assert decided(limit, bound, name=name).verdict == "undecided"


def test_a_failed_gate_of_a_runtime_is_mended_at_the_runtime() -> None:
    failed = decided(0.1, "at_most", between(0.2, 0.3))
    tokenizer, config = (GateResult(name=name, verdict="fail", reason="other") for name in ("tokenizer", "config"))
    for gate in (failed, tokenizer, config):
        own = gates_error([gate], "x")
        served = gates_error([gate.model_copy(update={"name": f"{gate.name} through vllm float16"})], "x")
        assert own is not None
        assert served is not None
        assert "check that it serves this very folder" in str(served.mend)
        assert "serves" not in str(own.mend)
