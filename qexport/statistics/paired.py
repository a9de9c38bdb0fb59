"""Accuracy of two models on the same items: the test for paired items, the interval of the change, and its power."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from scipy.special import bdtr, ndtr, ndtri

from qexport.statistics.samples import ALPHA, Interval

_Z: Final = float(ndtri(1 - ALPHA / 2))

POWER: Final = 0.8
"""The probability with which a drop should show, as is usual in planning."""

TYPICAL_CHANGED: Final = 0.1
"""Share of the answers that change before anything is measured: of the order that arXiv:2407.09141 finds for 4 bits."""


def mcnemar(only_reference: int, only_artifact: int) -> float:
    """The two-sided p-value of McNemar's exact test: do two models answer the same items equally well?

    If they do, each of the b + c items that only one model answers correctly is the reference's with probability 1/2:
    p = min(1, 2 P(X <= min(b, c))), X binomial(b + c, 1/2). (McNemar 1947, with the binomial in place of chi-squared.)

    Args:
        only_reference: b, the number of items that only the reference answers correctly.
        only_artifact: c, the number that only the artifact answers correctly.

    Raises:
        ValueError: a number is negative.
    """
    if only_reference < 0 or only_artifact < 0:
        raise ValueError(f"negative counts: {only_reference} and {only_artifact}")
    discordant = only_reference + only_artifact
    if not discordant:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_reference, only_artifact), discordant, 0.5)))


def change_of_accuracy(only_reference: int, only_artifact: int, items: int) -> Interval:
    """The artifact's accuracy minus the reference's, with Tango's 95 % score interval.

    The interval holds every difference d that a score test does not reject:
    |c - b - n d| <= z sqrt(n (2 q + d (1 - d))), with q the likeliest probability of an item that only the reference
    answers correctly, if the difference is d: the larger root of 2 n q^2 + B q - b d (1 - d) = 0,
    B = (2 n - c + b) d - b - c. (T. Tango, Equivalence test and confidence interval for the difference in proportions
    for the paired-sample design, Statistics in Medicine 17, 1998, 891-908.) Unlike an interval from the differences'
    own scatter it holds with few items, and where no answer has changed it still reaches from -z^2 / (n + z^2) to
    z^2 / (n + z^2).

    Args:
        only_reference: b.
        only_artifact: c.
        items: n.

    Raises:
        ValueError: there are no items, or more changed ones than items.
    """
    b, c, n = only_reference, only_artifact, items
    if min(b, c) < 0 or n < max(1, b + c):
        raise ValueError(f"{b} and {c} of {n} items")

    def score(d: float) -> float:
        variance, distance = _variance(b, c, n, d), c - b - n * d
        return distance / math.sqrt(n * variance) if variance > 0 else math.copysign(math.inf, distance)

    value = (c - b) / n
    low = _crossing(lambda d: score(d) <= _Z, -1.0, value)
    high = -_crossing(lambda d: score(-d) >= -_Z, -1.0, -value)
    return Interval(value, low, high, n)


def _variance(b: float, c: float, n: float, d: float) -> float:
    """Of an item's difference, with the likeliest probabilities if the difference is d: 2 q + d (1 - d)."""
    first = (2 * n - c + b) * d - b - c
    q = (math.sqrt(max(0.0, first**2 + 8 * n * b * d * (1 - d))) - first) / (4 * n)
    return 2 * q + d * (1 - d)


def _crossing(inside: Callable[[float], bool], outside: float, within: float) -> float:
    """The end of an interval between a point outside and one within it, by bisection."""
    if inside(outside):
        return outside
    for _ in range(60):
        middle = (outside + within) / 2
        outside, within = (outside, middle) if inside(middle) else (middle, within)
    return within


def smallest_drop(items: int, changed: float = TYPICAL_CHANGED) -> float:
    """The smallest drop of accuracy whose interval lies below 0 with a probability of `POWER`; 1 if none does.

    The difference of n paired items, of which a share w changes, has the variance (w - d^2) / n; under the hypothesis
    of no change it is w / n (Connett, Smith and McHugh, Sample size and power for pair-matched case-control studies,
    Statistics in Medicine 6, 1987, 53-59). A drop of d needs at least d of the items to change.

    Args:
        items: n, at least 1.
        changed: w, the share of items whose answers change in either direction.
    """

    def shows(drop: float) -> bool:
        share = max(changed, drop)
        scatter = math.sqrt(max(share - drop**2, 0.0))
        reach = drop * math.sqrt(items) - _Z * math.sqrt(share)
        return reach >= float(ndtri(POWER)) * scatter

    return _crossing(shows, 0.0, 1.0) if shows(1.0) else 1.0


def power_to_pass(items: int, margin: float, changed: float = TYPICAL_CHANGED) -> float:
    """The probability that an artifact as good as the reference is shown to be at most `margin` worse."""
    scatter = math.sqrt(_variance(changed / 2, changed / 2, 1, -margin))
    return float(ndtr((margin * math.sqrt(items) - _Z * scatter) / math.sqrt(changed)))


def items_for(margin: float, changed: float = TYPICAL_CHANGED) -> int:
    """The number of items with which `power_to_pass` is `POWER`."""
    scatter = math.sqrt(_variance(changed / 2, changed / 2, 1, -margin))
    needed = ((_Z * scatter + float(ndtri(POWER)) * math.sqrt(changed)) / margin) ** 2
    return max(fewest_items(margin), math.ceil(needed))


def fewest_items(margin: float) -> int:
    """The number of items below which no artifact can be shown to be at most `margin` worse: with fewer, the interval
    reaches further even if no answer has changed.
    """
    return math.ceil(_Z**2 * (1 - margin) / margin)
