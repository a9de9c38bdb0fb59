"""Fixed-sample intervals: by hand where it can be done by hand, by simulation where coverage is claimed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift import MEAN, SCALES, drift, misses, strata_of
from qexport.errors import NumericalError
from qexport.statistics.means import Array, moments, stratified_mean, student_multiplier
from qexport.statistics.samples import DIFFERENCE, SHARE, Interval, Sample, groups, transformed

THOUSANDTHS = st.integers(-(10**6), 10**6).map(lambda thousandths: thousandths / 1000)


def sample(*values: float, strata: str | None = None, trials: int | None = None) -> Sample:
    return Sample(np.array(values, dtype=np.float64), list(strata or "a" * len(values)), trials)


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def coverage(kind: str, units: int) -> float:
    found = moments(drift(kind, units, 4000, seed=units), strata_of(units))
    return 1 - float(misses(*found.interval(student_multiplier(found)), MEAN).mean())


def plain_coverage(values: Array, strata: list[str], truth: float) -> float:
    found = moments(values, strata)
    reach = student_multiplier(found) * np.sqrt(found.variance)
    return 1 - float(misses(found.mean - reach, found.mean + reach, truth).mean())


def test_without_skewness_it_is_students_interval() -> None:
    interval = stratified_mean(sample(1, 2, 3, 4, 5))
    assert interval.value == 3
    assert interval.n == 5
    assert ends(interval) == pytest.approx((3 - 2.7764451052 * math.sqrt(0.5), 3 + 2.7764451052 * math.sqrt(0.5)))


def test_variance_degrees_and_skewness_by_hand() -> None:
    found = moments(np.array([0.0, 1, 5, 10, 12, 14, 16]), list("aaabbbb"))
    spread = (7.0, 20 / 3)
    parts = [3**2 / 7**2 * spread[0] / 3, 4**2 / 7**2 * spread[1] / 4]
    assert found.mean == pytest.approx(58 / 7)
    assert found.variance == pytest.approx(sum(parts))
    assert found.degrees == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3))
    third = 3 / (2 * 1) * ((-2) ** 3 + (-1) ** 3 + 3**3)
    assert found.skewness == pytest.approx((3 / 7) ** 3 * third / 3**2 / sum(parts) ** 1.5)


def test_the_ends_are_the_means_whose_statistic_is_the_quantile() -> None:
    values = sample(0.1, 0.2, 0.2, 0.9, 0.1, 3.0)
    found = moments(values.values, values.strata)
    low, high = ends(stratified_mean(values))
    quantile = float(student_multiplier(found))
    assert found.statistic(low) == pytest.approx(quantile)
    assert found.statistic(high) == pytest.approx(-quantile)
    assert high - values.values.mean() > 2 * (values.values.mean() - low)


def test_one_unit_has_no_interval_and_equal_units_one_without_width() -> None:
    assert stratified_mean(sample(0.3)) == Interval(0.3, None, None, 1)
    equal = stratified_mean(sample(*[0.1] * 7))
    assert equal.low == equal.high == equal.value


@pytest.mark.parametrize(
    ("strata", "expected"),
    [
        ("aaabbb", [[0, 1, 2], [3, 4, 5]]),
        ("abcdefgh", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("abcaaa", [[0, 1, 2, 3, 4, 5]]),
        ("abcdaaa", [[0, 4, 5, 6], [1, 2, 3]]),
        ("aaabbbbc", [[0, 1, 2, 7], [3, 4, 5, 6]]),
        ("ab", [[0, 1]]),
    ],
)
def test_strata_of_fewer_than_three_units_are_collapsed(strata: str, expected: list[list[int]]) -> None:
    assert sorted(group.tolist() for group in groups(strata)) == expected


@given(st.lists(st.sampled_from("abcdef"), min_size=3, max_size=40))
def test_every_unit_is_in_one_group_of_three_or_more(strata: list[str]) -> None:
    found = groups(strata)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(strata)))
    assert min(len(group) for group in found) >= 3


@given(st.lists(THOUSANDTHS, min_size=2, max_size=30), st.integers(1, 4))
def test_the_value_lies_in_its_interval_and_scale_carries_over(values: list[float], kinds: int) -> None:
    strata = "".join("abcd"[index % kinds] for index in range(len(values)))
    interval = stratified_mean(sample(*values, strata=strata))
    low, high = ends(interval)
    assert low <= interval.value <= high
    doubled = stratified_mean(sample(*[2 * value for value in values], strata=strata))
    assert ends(doubled) == pytest.approx((2 * low, 2 * high))


def test_shares_are_clipped_and_are_not_certain_because_windows_agree() -> None:
    assert stratified_mean(sample(0.9, 1, 1, 1, 1, 1), SHARE).high == 1
    none_seen = sample(*[0.0] * 8, trials=511)
    low, high = ends(stratified_mean(none_seen, SHARE))
    assert low == 0
    assert 3 / (8 * 511) < high < 4.5 / (8 * 511)


def test_no_changed_answer_in_a_few_items_is_not_certainty() -> None:
    unchanged, few = sample(*[0.0] * 20, trials=1), sample(*[0.0] * 18, 1.0, -1.0, trials=1)
    low, high = ends(stratified_mean(unchanged, DIFFERENCE))
    assert low == -high
    assert 2 / 20 < high < 4 / 20  # the rule of three: up to 3 of 20 may change
    lost = ends(stratified_mean(sample(*[0.0] * 19, -1.0, trials=1), DIFFERENCE))
    gained = ends(stratified_mean(sample(*[0.0] * 19, 1.0, trials=1), DIFFERENCE))
    assert lost == pytest.approx((-gained[1], -gained[0]))
    assert ends(stratified_mean(few, DIFFERENCE))[1] > 2 / 20


def test_the_variance_under_a_share_keeps_the_design_effect() -> None:
    found = moments(np.array([[0.0, 0.5], [0.1, 0.6], [0.2, 0.7]]), ["all"] * 3)
    under = found.as_for_share(0.3)
    assert under.variance == pytest.approx([found.variance[0] * 0.3 * 0.7 / (0.1 * 0.9), found.variance[1]])
    assert np.all(under.mean == found.mean)


def test_a_variance_that_is_raised_keeps_the_third_moment_and_so_less_skewness() -> None:
    """Skewness is the third central moment over the 1.5th power of the variance."""
    found = moments(np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [5.0, 5.0, 1.0]]), ["all"] * 3)
    raised = found.at_least(np.array([4.0, 0.25, 1.0]) * np.where(found.variance > 0, found.variance, 1.0))
    assert raised.variance == pytest.approx([4 * found.variance[0], found.variance[1], 1.0])
    assert raised.skewness == pytest.approx([found.skewness[0] / 8, found.skewness[1], 0.0])
    assert found.skewness[0] > 0


def test_a_share_whose_windows_differ_keeps_their_variance() -> None:
    values = (0.1, 0.3, 0.2, 0.4, 0.3, 0.2, 0.5, 0.1)
    assert stratified_mean(sample(*values, trials=511)) == stratified_mean(sample(*values))


@pytest.mark.parametrize("kind", ["normal", "gamma", "lognormal"])
@pytest.mark.parametrize("units", [24, 32, 64])
def test_drift_of_known_size_is_covered_at_the_nominal_rate(kind: str, units: int) -> None:
    assert 0.935 <= coverage(kind, units) <= 0.97


@pytest.mark.parametrize("units", [8, 16])
@pytest.mark.parametrize("kind", ["normal", "gamma", "lognormal"])
def test_collapsed_strata_make_intervals_wider_but_not_absurdly(kind: str, units: int) -> None:
    assert 0.95 <= coverage(kind, units) <= 0.99


def test_heavily_skewed_drift_is_missed_by_students_interval_and_not_by_ours() -> None:
    values, strata = drift("heavy lognormal", 32, 4000, seed=32), strata_of(32)
    assert plain_coverage(values, strata, MEAN) < 0.925
    assert coverage("heavy lognormal", 32) > 0.935


def test_strata_narrow_the_interval_where_domains_differ() -> None:
    values = drift("normal", 32, 500, seed=1)
    with_strata, without = moments(values, strata_of(32)), moments(values, ["all"] * 32)
    widths = [np.subtract(*found.interval(student_multiplier(found))[::-1]) for found in (with_strata, without)]
    assert np.median(widths[0]) < 0.85 * np.median(widths[1])
    same = values / np.tile(SCALES, 4)[:, None]
    with_strata, without = moments(same, strata_of(32)), moments(same, ["all"] * 32)
    assert np.median(with_strata.variance) == pytest.approx(np.median(without.variance), rel=0.1)


def test_columns_do_not_know_each_other() -> None:
    values = drift("gamma", 24, 5, seed=3)
    found = moments(values, strata_of(24))
    low, high = found.interval(student_multiplier(found))
    for run in range(5):
        assert ends(stratified_mean(Sample(values[:, run], strata_of(24)))) == pytest.approx((low[run], high[run]))


def test_a_ratio_has_the_ends_of_the_difference() -> None:
    interval = transformed(Interval(0.1, -0.2, 0.4, 8), math.exp)
    assert interval == Interval(math.exp(0.1), math.exp(-0.2), math.exp(0.4), 8)
    assert transformed(Interval(0.0, None, 1000.0, 8), math.exp) == Interval(1.0, None, None, 8)
    with pytest.raises(NumericalError, match="too large for float64"):
        transformed(Interval(1000.0, 0.0, 2000.0, 8), math.exp)


def test_what_is_no_sample_is_refused() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        sample(0.1, math.nan)
    with pytest.raises(ValueError, match="strata"):
        Sample(np.zeros(3), ["a"])
    with pytest.raises(ValueError, match="shape"):
        Sample(np.zeros(0), [])
