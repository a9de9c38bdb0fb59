"""Paired items: McNemar's test, Tango's interval against a maximized likelihood, and the power that is said before."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.statistics.means import Array
from qexport.statistics.paired import (
    change_of_accuracy,
    fewest_items,
    items_for,
    mcnemar,
    power_to_pass,
    smallest_drop,
)
from qexport.statistics.samples import Interval

Z = 1.959963984540054


@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("c", range(12))
def test_mcnemar_sums_the_binomial_tails(b: int, c: int) -> None:
    total = b + c
    tails = [math.comb(total, k) for k in range(total + 1) if abs(k - total / 2) >= abs(b - total / 2)]
    assert mcnemar(b, c) == pytest.approx(min(1.0, sum(tails) / 2**total))


def test_mcnemar_keeps_its_level_and_refuses_negative_counts() -> None:
    for items in (5, 30, 101):
        rejected = [b for b in range(items + 1) if mcnemar(b, items - b) <= 0.05]
        assert sum(math.comb(items, b) for b in rejected) <= 0.05 * 2**items
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 3)


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def score(b: int, c: int, n: int, d: float) -> float:
    """Of the hypothesis that the artifact gains d, with the likeliest probabilities under it, found by trying all."""
    lost = np.linspace(max(0.0, -d), (1 - d) / 2, 400_001)[1:-1]
    gained, same = lost + d, 1 - 2 * lost - d
    likelihood = b * np.log(lost) + c * np.log(np.maximum(gained, 1e-300)) + (n - b - c) * np.log(same)
    best = lost[np.argmax(likelihood)]
    return float((c - b - n * d) / math.sqrt(n * (2 * best + d - d**2)))


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (0, 3, 20), (5, 5, 40), (30, 60, 400), (1, 0, 9)])
def test_at_its_ends_the_score_test_is_at_its_limit(b: int, c: int, n: int) -> None:
    low, high = ends(change_of_accuracy(b, c, n))
    assert score(b, c, n, low) == pytest.approx(Z, abs=2e-3)
    assert score(b, c, n, high) == pytest.approx(-Z, abs=2e-3)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 200))
def test_gains_and_losses_mirror_each_other_and_more_items_say_more(b: int, c: int, others: int) -> None:
    n = b + c + others
    found, mirrored = change_of_accuracy(b, c, n), change_of_accuracy(c, b, n)
    low, high = ends(found)
    assert (found.value, found.n) == ((c - b) / n, n)
    assert -1 <= low <= found.value <= high <= 1
    assert ends(mirrored) == pytest.approx((-high, -low), abs=1e-9)
    wider, wide = ends(change_of_accuracy(4 * b, 4 * c, 4 * n))
    assert wide - wider < high - low


def test_no_changed_answer_is_no_proof() -> None:
    for n in (5, 40, 1000):
        reach = Z**2 / (n + Z**2)
        assert ends(change_of_accuracy(0, 0, n)) == pytest.approx((-reach, reach), abs=1e-9)


def exact(n: int, lost: float, gained: float) -> tuple[Array, list[tuple[int, int]]]:
    """The probability of every (b, c)."""
    counts = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    log = [
        math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(n - b - c + 1)
        + b * math.log(lost) + c * math.log(gained) + (n - b - c) * math.log(1 - lost - gained)
        for b, c in counts
    ]  # fmt: skip
    return np.exp(log), counts


@pytest.mark.parametrize(("lost", "gained"), [(0.05, 0.05), (0.1, 0.02), (0.01, 0.01), (0.2, 0.1)])
def test_the_interval_covers_by_summing_over_all_outcomes(lost: float, gained: float) -> None:
    """The interval from the differences' own scatter would cover in 45 % where one answer in a hundred changes."""
    weights, counts = exact(40, lost, gained)
    likely = weights > 1e-7
    found = [
        (weight, ends(change_of_accuracy(b, c, 40)))
        for weight, (b, c), chosen in zip(weights, counts, likely, strict=True)
        if chosen
    ]
    covered = sum(weight for weight, (low, high) in found if low <= gained - lost <= high)
    assert 0.94 <= covered <= 1
    too_good = sum(weight for weight, (low, _) in found if low > gained - lost)
    assert too_good <= 0.03


def shown(items: int, lost: float, gained: float, margin: float, runs: int = 4000) -> tuple[float, float]:
    """How often a drop shows, and how often the margin passes."""
    draws = np.random.default_rng(items).multinomial(items, [lost, gained, 1 - lost - gained], size=runs)
    pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    intervals = [ends(change_of_accuracy(int(b), int(c), items)) for b, c in pairs]
    drops = sum(count for count, (_, high) in zip(counts, intervals, strict=True) if high < 0)
    passes = sum(count for count, (low, _) in zip(counts, intervals, strict=True) if low > -margin)
    return drops / runs, passes / runs


@pytest.mark.parametrize("items", [200, 1000])
def test_the_smallest_drop_shows_in_four_of_five_measurements(items: int) -> None:
    drop = smallest_drop(items)
    drops, _ = shown(items, (0.1 + drop) / 2, (0.1 - drop) / 2, 0.02)
    assert drops == pytest.approx(0.8, abs=0.05)
    fewer, _ = shown(items, (0.1 + drop / 2) / 2, (0.1 - drop / 2) / 2, 0.02)
    assert fewer < 0.4


def test_the_power_to_pass_is_that_of_an_artifact_that_loses_nothing() -> None:
    items = items_for(0.05)
    _, passes = shown(items, 0.05, 0.05, 0.05)
    assert passes == pytest.approx(0.8, abs=0.04)
    assert power_to_pass(items, 0.05) == pytest.approx(0.8, abs=0.01)
    _, at_the_margin = shown(items, 0.075, 0.025, 0.05)
    assert at_the_margin <= 0.05


@pytest.mark.parametrize("margin", [0.01, 0.05, 0.3])
def test_with_fewer_than_the_fewest_items_nothing_can_pass(margin: float) -> None:
    fewest = fewest_items(margin)
    assert ends(change_of_accuracy(0, 0, fewest))[0] >= -margin
    assert ends(change_of_accuracy(0, 0, fewest - 1))[0] < -margin


def test_few_items_show_only_large_drops_and_more_show_smaller_ones() -> None:
    found = [smallest_drop(items) for items in (1, 5, 20, 100, 1000, 10_000)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0
    assert found[-1] < 0.01


def test_what_cannot_be_counted_is_refused() -> None:
    for counts in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="items"):
            change_of_accuracy(*counts)
