"""Fixed-sample intervals of stratified means."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import stdtrit

from qexport.statistics.moments import Array, Moments, moments, share_floor
from qexport.statistics.samples import ALPHA, REAL, Interval, Range, Sample, bounded


def stratified_mean(sample: Sample, within: Range = REAL) -> Interval:
    """The mean and its 95 % interval, valid for a number of units that was fixed before the measurement.

    The interval holds all means mu with |h(T)| <= t(0.975, v): T = (m - mu) / sqrt(V) is Student's statistic with the
    variance from within strata, v the Welch-Satterthwaite degrees of freedom, h Hall's monotone cubic transformation
    that removes the first term of skewness (P. Hall, On the removal of skewness by transformation, J. R. Stat. Soc. B
    54, 1992, 221-228). The formulas are at `qexport.statistics.moments.Moments`.

    Why transformed: means of KL over windows are skewed to the right, and the plain t interval then lies too low. In
    simulations with 8 strata whose scales differ fourfold and n = 24 to 64, the plain interval covers lognormal values
    (sigma 0.8) in 92 % of the runs, and nearly all its misses lie too low; this one covers them in 94 to 95 %, and
    normal, gamma (shape 4) and lognormal (sigma 0.5) ones in 95 to 96 %. At n = 8 and 16, where strata are collapsed,
    it covers the latter in 97 to 99 %, and heavily skewed ones in 94 to 95 % (plain: 88 to 90 %).

    Args:
        sample: one unit gives no interval; units that are all equal, without `trials`, one of width 0.
        within: what values the figure can have.
    """
    return interval_of_mean(sample, within, student_multiplier)


def interval_of_mean(sample: Sample, within: Range, multiplier: Callable[[Moments], Array]) -> Interval:
    """The interval with a multiplier that is found from the moments."""
    mean, n = float(sample.values.mean()), len(sample.values)
    if n == 1:
        return Interval(mean, None, None, n)
    found = moments(sample.values, sample.strata)
    if sample.trials is not None:
        found = found.at_least(share_floor(np.abs(found.mean), n * sample.trials))
    low, high = found.interval(multiplier(found))
    return bounded(mean, float(low), float(high), n, within)


def student_multiplier(found: Moments) -> Array:
    """The two-sided 95 % point of Student's t with the degrees of freedom of the moments, float64 [...]."""
    return np.asarray(stdtrit(found.degrees, 1 - ALPHA / 2), dtype=np.float64)
