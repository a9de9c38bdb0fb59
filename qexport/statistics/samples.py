"""A figure measured on units, and its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qexport.errors import NumericalError

ALPHA: Final = 0.05  # every interval has 95 % confidence
MIN_STRATUM: Final = 3


@dataclass(frozen=True)
class Range:
    """The values that a figure can have; None for a side without a limit."""

    low: float | None = None
    high: float | None = None


REAL: Final = Range()
SHARE: Final = Range(0.0, 1.0)
NOT_NEGATIVE: Final = Range(low=0.0)
DIFFERENCE: Final = Range(-1.0, 1.0)
"""Of two shares."""


@dataclass(frozen=True)
class Sample:
    """A figure measured on units: windows, prompts, items or repeats.

    Units are independent of one another; what is inside one (its tokens) need not be. Each value is the mean of a
    unit's observations, and the figure is the mean over all observations: that of the values, weighted by the units'
    sizes. A paired difference is the sample of the units' differences.

    Args:
        values: float64 [units], in the order in which they were measured.
        strata: [units], the domain of each unit.
        trials: for shares and paired differences of them, the number of yes-or-no observations in a unit of size 1.
            Values that agree by chance (0 rare events in every document, no changed answer in a few items) then do not
            give an interval of width 0; see `qexport.statistics.means.share_floor`.
        sizes: float64 [units], how much each unit counts, for example its tokens; None if all have the size 1.

    Raises:
        ValueError: no units, a stratum or a size is missing, or a size is not above 0.
        NumericalError: a value is NaN or infinite.
    """

    values: NDArray[np.float64]
    strata: Sequence[str]
    trials: int | None = None
    sizes: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not self.values.size or len(self.strata) != self.values.size:
            raise ValueError(f"values of shape {list(self.values.shape)} with {len(self.strata)} strata")
        if self.sizes is not None and (self.sizes.shape != self.values.shape or not (self.sizes > 0).all()):
            raise ValueError(f"{self.values.size} values with sizes {self.sizes}")
        refuse_non_finite(self.values)

    @property
    def observations(self) -> float | None:
        """The number of yes-or-no observations in all units together; None if the figure is no share."""
        total = float(self.values.size if self.sizes is None else self.sizes.sum())
        return None if self.trials is None else self.trials * total


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval.

    Args:
        value: the estimate.
        low: the lower end; None if the units give no bound on that side.
        high: the upper end; likewise.
        n: the number of units.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def refuse_non_finite(values: NDArray[np.floating]) -> None:
    """Raises NumericalError if a measured value is NaN or infinite."""
    if not np.isfinite(values).all():
        raise NumericalError("a measured figure is NaN or Inf", where="verify")


def bounded(value: float, low: float, high: float, n: int, within: Range = REAL) -> Interval:
    """An Interval from ends of which infinite ones become None. Finite ends are clipped to the figure's range."""
    if np.isfinite(low):
        low = max(low, -np.inf if within.low is None else within.low)
    if np.isfinite(high):
        high = min(high, np.inf if within.high is None else within.high)
    return Interval(value, float(low) if np.isfinite(low) else None, float(high) if np.isfinite(high) else None, n)


def transformed(interval: Interval, function: Callable[[float], float]) -> Interval:
    """The interval of an increasing function of the figure, such as `math.exp` of a mean difference of log-likelihoods.

    An interval keeps its coverage when an increasing function is applied to its ends, however curved the function is.

    Args:
        interval: of the figure.
        function: increasing; defined on the whole interval.

    Raises:
        NumericalError: the value overflows float64. An end that overflows becomes None.
    """

    def end(bound: float | None) -> float | None:
        try:
            return None if bound is None else function(bound)
        except OverflowError:
            return None

    try:
        value = function(interval.value)
    except OverflowError as error:
        raise NumericalError("a figure is too large for float64", where="verify") from error
    return replace(interval, value=value, low=end(interval.low), high=end(interval.high))


def groups(strata: Sequence[str]) -> list[NDArray[np.intp]]:
    """The units of each stratum. Strata that are too small for a variance and a skewness are collapsed.

    Strata with fewer than three units become one group. If this group has fewer than three units, the smallest other
    stratum joins it (of equals, the first by name). Size decides, not the values, since joining strata with close
    values would make intervals too narrow. A collapsed group counts the differences
    between its strata as variance, which is on average too large, never too small (Cochran, Sampling Techniques, 1977,
    on collapsed strata).

    Returns:
        Indices of units; every unit is in one group. Only a sample of one or two units has a group of fewer than three.
    """
    counts = Counter(strata)
    names = sorted(counts, key=lambda name: (counts[name], name))
    small = [name for name in names if counts[name] < MIN_STRATUM]
    large = names[len(small) :]
    if small and large and sum(counts[name] for name in small) < MIN_STRATUM:
        small.append(large.pop(0))
    labels = np.asarray(list(strata))
    return [np.flatnonzero(np.isin(labels, group)) for group in [small, *([name] for name in large)] if group]
