"""Intervals of quantiles over tokens, when the tokens of a document are correlated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qexport.statistics.means import PLANNED_UNITS, Array, mixture_multiplier, moments, student_multiplier
from qexport.statistics.samples import Interval, bounded, refuse_non_finite

# Candidates on each side of the quantile: their distances grow by 5 %, so an end is at most 5 % too far out.
_DISTANCES: Final = np.geomspace(1e-3, 14.0, 200)


@dataclass(frozen=True)
class QuantileIntervals:
    """A quantile with the interval of a fixed sample, and with that of a confidence sequence."""

    fixed: Interval
    sequence: Interval


def quantile_interval(
    values: NDArray[np.floating],
    strata: Sequence[str],
    q: float,
    *,
    members: NDArray[np.intp] | None = None,
    planned: int = PLANNED_UNITS,
) -> QuantileIntervals:
    """A quantile over all tokens with its 95 % intervals; the unit is the document, or the window.

    The interval reaches from the quantile to the nearest x on both sides whose share of values above it differs from
    p = 1 - q. That share is a mean over units, tested as `stratified_mean` and `confidence_sequence` test means
    (Francisco and Fuller, Quantile estimation with a complex survey design, Ann. Statist. 19, 1991, 454-469). The true
    quantile is tested with its own share only, so coverage carries over, also over all looks. (Far out in the tail
    single x may pass the test again, because a few values say little; they are ignored.) The variance of the
    share is the one under the hypothesis: the units' own, scaled by p (1 - p) / (m (1 - m)), and never below the
    p (1 - p) / N of N independent tokens. Without that, the interval of a tail with few values would be too narrow.

    Simulated with lognormal tokens, 256 or 2047 per window, whose windows differ by 0.3 to 0.7 of the tokens' own log
    scatter: at n = 8 to 64 the true quantile passes the test of the fixed interval in 94 to 98 % of the runs for q =
    0.01 to 0.99, in 94 to 100 % for q = 0.999, and it fails that of the sequence at some look in at most 2 %. Intervals
    that treat tokens as independent cover in 12 to 76 % for q = 0.01 to 0.99.

    Args:
        values: floating [rows, tokens].
        strata: [units], the domain of each unit.
        q: between 0 and 1, both excluded.
        members: intp [rows, tokens], the unit of each token, every unit at least once; None if each row is a unit.
        planned: see `confidence_sequence`.

    Returns:
        The value is the smallest one that a share q of all values does not exceed. An end is None where the values do
        not reach far enough to bound the quantile, as for the 99.9 % quantile of a few thousand tokens; both are for
        one unit.

    Raises:
        ValueError: the shape or q is wrong.
        NumericalError: a value is NaN or infinite.
    """
    n = len(strata)
    if values.ndim != 2 or not values.size or not 0 < q < 1:
        raise ValueError(f"values of shape {list(values.shape)}, q = {q}")
    if members is None:
        members = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    sizes = np.bincount(members.reshape(-1), minlength=n)
    if members.shape != values.shape or len(sizes) != n or not sizes.all():
        raise ValueError(f"values of shape {list(values.shape)} with {n} strata")
    refuse_non_finite(values)
    order = np.argsort(values, axis=None)
    ordered = values.reshape(-1)[order]
    value = float(np.quantile(ordered, q, method="inverted_cdf"))
    if n == 1:
        alone = Interval(value, None, None, n)
        return QuantileIntervals(alone, alone)
    candidates = _candidates(ordered, q)
    shares = _shares_above(candidates, ordered, members.reshape(-1)[order], sizes)
    found = (
        moments(shares, strata, sizes.astype(np.float64))
        .as_for_share(1 - q)
        .at_least(np.full(len(candidates), q * (1 - q) / ordered.size))
    )
    statistic = found.statistic(1 - q)

    def inverted(multiplier: Array) -> Interval:
        return bounded(value, *_ends(value, candidates, ordered, statistic, multiplier), n)

    return QuantileIntervals(inverted(student_multiplier(found)), inverted(mixture_multiplier(found, planned)))


def _candidates(ordered: NDArray[np.floating], q: float) -> Array:
    """Minus infinity, the least and the largest value, and quantiles whose logits are at growing distances from q's."""
    logits = np.log(q / (1 - q)) + np.concatenate([-_DISTANCES, [0.0], _DISTANCES])
    ranks = np.floor(ordered.size / (1 + np.exp(-logits))).astype(np.intp)
    inside = np.clip(ranks, 0, ordered.size - 1)
    return np.concatenate([[-np.inf], np.unique(ordered[np.concatenate([[0], inside, [ordered.size - 1]])])])


def _shares_above(
    candidates: Array, ordered: NDArray[np.floating], units: NDArray[np.intp], sizes: NDArray[np.intp]
) -> Array:
    """The share of each unit's values above each candidate, float64 [units, candidates], in one pass."""
    n = len(sizes)
    interval = np.searchsorted(candidates, ordered, side="left")
    counts = np.bincount(interval * n + units, minlength=(len(candidates) + 1) * n).reshape(-1, n)
    below = np.cumsum(counts[:-1], axis=0).T
    return 1 - below / sizes[:, None]


def _ends(
    value: float, candidates: Array, ordered: NDArray[np.floating], statistic: Array, multiplier: Array
) -> tuple[float, float]:
    """The nearest rejected x on each side of the quantile, rounded outward past values that were not tried."""
    too_high = np.flatnonzero((statistic > multiplier) & (candidates < value))
    too_low = np.flatnonzero((statistic < -multiplier) & (candidates >= value))
    low = float(ordered[np.searchsorted(ordered, candidates[too_high[-1]], side="right")]) if too_high.size else -np.inf
    return low, float(candidates[too_low[0]]) if too_low.size else np.inf
