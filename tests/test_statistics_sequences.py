"""Intervals that are looked at again and again: a simulated measurement must almost never see one that misses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import nct
from scipy.stats import t as student

from drift import LOOKS, MEAN, drift, misses, strata_of
from qexport.statistics.means import (
    PLANNED_UNITS,
    Array,
    Moments,
    confidence_sequence,
    mixture_multiplier,
    moments,
    share_floor,
    stratified_mean,
    student_multiplier,
)
from qexport.statistics.samples import NOT_NEGATIVE, SHARE, Interval, Sample

RUNS = 2000
KINDS = ["normal", "gamma", "lognormal", "heavy lognormal"]
# 5 %, and three standard errors of a simulation of that many runs
LIMIT = 0.05 + 3 * float(np.sqrt(0.05 * 0.95 / RUNS))

Multiplier = Callable[[Moments], Array]


def sequence(found: Moments) -> Array:
    return mixture_multiplier(found, PLANNED_UNITS)


def ever_misses(values: Array, truth: float, multiplier: Multiplier) -> float:
    missed = np.zeros(values.shape[1], dtype=bool)
    for units in LOOKS:
        found = moments(values[:units], strata_of(units))
        missed |= misses(*found.interval(multiplier(found)), truth)
    return float(missed.mean())


def wrong_verdicts(values: Array, truth: float, multiplier: Multiplier) -> float:
    """Stops when a gate at the truth itself is decided, so every decision is wrong."""
    decided = np.zeros(values.shape[1], dtype=bool)
    for units in LOOKS:
        open_runs = np.flatnonzero(~decided)
        found = moments(values[:units, open_runs], strata_of(units))
        low, high = found.interval(multiplier(found))
        decided[open_runs] = (high < truth) | (low > truth)
    return float(decided.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_sequence_hardly_ever_misses_at_any_look(kind: str) -> None:
    assert ever_misses(drift(kind, LOOKS[-1], RUNS, seed=7), MEAN, sequence) <= 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_peeking_at_a_fixed_interval_fails_the_same_test(kind: str) -> None:
    assert ever_misses(drift(kind, LOOKS[-1], RUNS, seed=7), MEAN, student_multiplier) > 2 * LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_when_decided_gives_wrong_verdicts_only_to_those_who_peek(kind: str) -> None:
    values = drift(kind, LOOKS[-1], RUNS, seed=8)
    assert wrong_verdicts(values, MEAN, sequence) <= 0.05
    assert wrong_verdicts(values, MEAN, student_multiplier) > 0.1


def test_the_sequence_is_exact_for_normal_units_looked_at_one_by_one() -> None:
    values = np.random.default_rng(9).normal(size=(120, RUNS))
    missed = np.zeros(RUNS, dtype=bool)
    for units in range(2, 121):
        symmetric = replace(moments(values[:units], ["all"] * units), skewness=np.zeros(RUNS))
        missed |= misses(*symmetric.interval(sequence(symmetric)), 0.0)
    assert 0.01 < missed.mean() <= LIMIT


def test_rare_events_are_not_certain_after_a_few_windows_without_any() -> None:
    trials, rate = 511, 0.0006
    values = np.random.default_rng(10).binomial(trials, rate, size=(LOOKS[-1], RUNS)) / trials
    missed, careless = np.zeros(RUNS, dtype=bool), np.zeros(RUNS, dtype=bool)
    for units in LOOKS:
        found = moments(values[:units], ["all"] * units)
        careless |= misses(*found.interval(sequence(found)), rate)
        found = found.at_least(share_floor(found.mean, units * trials))
        missed |= misses(*found.interval(sequence(found)), rate)
    assert missed.mean() <= 0.05
    assert careless.mean() > LIMIT


def mixture(n: int, degrees: float, planned: int = PLANNED_UNITS) -> float:
    return float(mixture_multiplier(Moments(np.zeros(()), np.ones(()), np.zeros(()), np.array(degrees), n), planned))


def asymptotic(n: int, rho: float) -> float:
    return float(np.sqrt((1 + 1 / (n * rho**2)) * np.log((n * rho**2 + 1) / 0.05**2)))


@pytest.mark.parametrize("planned", [8, 16, 64])
def test_for_many_degrees_it_is_the_asymptotic_sequence_narrowest_where_planned(planned: int) -> None:
    rhos = np.geomspace(0.01, 10, 20001)
    best = min(rhos, key=lambda rho: asymptotic(planned, rho))
    for n in (planned, 3 * planned):
        assert mixture(n, 1e9, planned) == pytest.approx(asymptotic(n, best), rel=1e-3)


def test_at_its_end_the_evidence_against_the_mean_is_twenty_to_one() -> None:
    n, degrees = 24, 13.0
    prior = (9.211968061878816 - 1) / PLANNED_UNITS  # variance of the effect: 1 + planned rho^2 = -W(-alpha^2 / e)
    t = mixture(n, degrees)
    effects = np.linspace(-5, 5, 4001) * np.sqrt(prior)
    weights = np.exp(-(effects**2) / (2 * prior))
    ratio = nct.pdf(t, degrees, effects * np.sqrt(n)) / student.pdf(t, degrees)
    assert (ratio * weights).sum() / weights.sum() == pytest.approx(20, rel=1e-3)


def test_few_degrees_bound_nothing_and_more_units_bound_more() -> None:
    assert mixture(4, 3) == np.inf
    reach = [mixture(n, n - 1) / np.sqrt(n) for n in (8, 16, 32, 64, 128)]
    assert reach == sorted(reach, reverse=True)
    assert mixture(32, 31) > 1.5 * 2.04


def sample(values: Array, trials: int | None = None) -> Sample:
    return Sample(np.asarray(values, dtype=np.float64), strata_of(len(values)), trials)


def test_one_sample_gives_what_the_simulation_tries() -> None:
    values = drift("gamma", 32, 3, seed=11)
    found = moments(values, strata_of(32))
    low, high = found.interval(sequence(found))
    for run in range(3):
        interval = confidence_sequence(sample(values[:, run]))
        assert (interval.low, interval.high) == pytest.approx((low[run], high[run]))
        fixed = stratified_mean(sample(values[:, run]))
        assert fixed.low is not None
        assert low[run] < fixed.low


def test_too_few_units_have_no_interval_and_equal_ones_have_no_width() -> None:
    assert confidence_sequence(sample(np.array([0.1]))) == Interval(0.1, None, None, 1)
    few = confidence_sequence(sample(np.array([0.1, 0.2, 0.3, 0.4])), NOT_NEGATIVE)
    assert (few.low, few.high) == (None, None)
    assert confidence_sequence(sample(np.zeros(4)), NOT_NEGATIVE) == Interval(0.0, 0.0, 0.0, 4)


def test_ends_stay_in_the_range_of_the_figure() -> None:
    values = np.array([0.9, 1, 0.2, 1, 1, 0.4, 1, 1])
    assert confidence_sequence(sample(values), SHARE).high == 1
    assert confidence_sequence(sample(1 - values), NOT_NEGATIVE).low == 0
    free = confidence_sequence(sample(1 - values)).low
    assert free is not None
    assert free < 0
