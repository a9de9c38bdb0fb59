"""The units that figures are measured on: documents for the held-out text, else windows, prompts or items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qexport.artifact.figures import Figure, Unit
from qexport.statistics.means import Array, confidence_sequence, stratified_mean
from qexport.statistics.quantiles import quantile_interval
from qexport.statistics.samples import REAL, Interval, Range, Sample, transformed
from qexport.text.windows import HeldOut

_NO_DOMAIN: Final = ""

_LEAST_SHARE: Final = 0.5
"""Of a window's tokens: a document with less is joined with the next one."""


@dataclass(frozen=True)
class Units:
    """The units that a figure was measured on.

    Attributes:
        domains: of each unit; None if it has none.
        unit: the kind of unit.
        tokens: predicted tokens per window; None if the unit is not counted in tokens.
        planned: the number of units for which confidence sequences are made narrowest.
        members: intp [windows, tokens], the unit of each predicted token; None if each window, prompt or item is one.
    """

    domains: Sequence[str | None]
    unit: Unit
    tokens: int | None
    planned: int
    members: NDArray[np.intp] | None = None

    @property
    def strata(self) -> list[str]:
        """The domains, for the statistics."""
        return [domain or _NO_DOMAIN for domain in self.domains]

    @property
    def row_domains(self) -> list[str | None]:
        """The domain of each window, prompt or item."""
        if self.members is None:
            return list(self.domains)
        return [self.domains[unit] for unit in self.members[:, 0]]

    @property
    def sizes(self) -> Array | None:
        """The predicted tokens of each unit, float64 [units]; None if the unit is not counted in tokens."""
        if self.members is not None:
            return np.bincount(self.members.reshape(-1), minlength=len(self.domains)).astype(np.float64)
        return None if self.tokens is None else np.full(len(self.domains), float(self.tokens))

    def chosen(self, rows: Sequence[int]) -> Units:
        """The units of these windows, prompts or items, as far as they lie in them."""
        if self.members is None:
            return replace(self, domains=[self.domains[row] for row in rows])
        kept, members = np.unique(self.members[list(rows)], return_inverse=True)
        shape = (len(rows), self.members.shape[1])
        return replace(self, domains=[self.domains[unit] for unit in kept], members=members.reshape(shape))

    def means(self, values: Tensor) -> Array:
        """Each unit's mean, float64 [units], of tokens' values [windows, tokens]. numpy sums in the same order with any
        number of threads.
        """
        if self.members is None:
            return row_means(values)
        tokens = values.numpy().astype(np.float64)
        of = self.members.reshape(-1)
        return np.asarray(np.bincount(of, tokens.reshape(-1)) / np.bincount(of))

    def figure(self, name: str, fixed: Interval, sequence: Interval) -> Figure:
        """The figure with both of its intervals."""
        sizes = self.sizes
        return Figure(
            name=name,
            value=fixed.value,
            low=fixed.low,
            high=fixed.high,
            sequence_low=sequence.low,
            sequence_high=sequence.high,
            n=fixed.n,
            unit=self.unit,
            tokens=None if sizes is None else int(sizes.sum()),
        )

    def mean(
        self,
        name: str,
        values: Array,
        within: Range = REAL,
        *,
        trials: int | None = None,
        function: Callable[[float], float] | None = None,
    ) -> Figure:
        """The figure that is the mean over all tokens, or over all units that are not counted in tokens, or an
        increasing function of it.

        Args:
            name: of the figure.
            values: float64 [units], the units' means.
            within: the values that the mean can have.
            trials: for a share or a difference of shares, the number of observations per token, or per unit.
            function: for example exp, if the values are logarithms.
        """
        sample = Sample(values, self.strata, trials, self.sizes)
        intervals = (
            stratified_mean(sample, within),
            confidence_sequence(sample, within, planned=self.planned),
        )
        if function is not None:
            intervals = (transformed(intervals[0], function), transformed(intervals[1], function))
        return self.figure(name, *intervals)

    def quantile(self, name: str, values: Array, q: float) -> Figure:
        """The figure that is a quantile of all tokens' values [windows, tokens]."""
        found = quantile_interval(values, self.strata, q, members=self.members, planned=self.planned)
        return self.figure(name, found.fixed, found.sequence)


def measured_once(figure: Figure) -> Figure:
    """The figure with its confidence interval for gates: more units are never added."""
    return figure.model_copy(update={"sequence_low": figure.low, "sequence_high": figure.high})


def row_means(values: Tensor) -> Array:
    """Each row's mean, float64 [rows], of tokens' values [rows, tokens]; numpy sums in a fixed order."""
    return np.asarray(values.numpy().astype(np.float64).mean(axis=1))


def document_units(held_out: HeldOut, windows: int, planned: int) -> Units:
    """The units of the first windows of the held-out text: its documents, as far as they lie in these windows.

    Tokens of one document are alike, in whichever windows they are; tokens of different documents are taken to be
    independent. A document with less than half a window's tokens, such as a line or a paragraph that was given as a
    document, is joined with those after it in its domain until they have as many, since neighbours are often alike.
    What is left over at the end of a domain belongs to its last unit.

    Args:
        held_out: the text.
        windows: how many were measured.
        planned: see `Units`.
    """
    rows, length = held_out.domains[:windows], held_out.input_ids.shape[1]
    if held_out.documents is None:
        return Units(rows, "document", length - 1, planned)
    documents = held_out.documents[:windows, 1:].numpy()
    members, domains = np.empty(documents.shape, dtype=np.intp), list[str | None]()
    for domain in dict.fromkeys(rows):
        own = np.asarray([row == domain for row in rows])
        numbers = _joined(documents[own], _LEAST_SHARE * (length - 1))
        members[own] = numbers + len(domains)
        domains += [domain] * (int(numbers.max()) + 1)
    return Units(domains, "document", length - 1, planned, members)


def _joined(documents: NDArray[np.int64], least: float) -> NDArray[np.intp]:
    """The unit of each token [windows, tokens] of one domain, from the number of its document."""
    _, places, counts = np.unique(documents, return_inverse=True, return_counts=True)
    units, unit, held = np.empty(len(counts), dtype=np.intp), 0, 0
    for document, count in enumerate(counts):
        units[document], held = unit, held + int(count)
        if held >= least:
            unit, held = unit + 1, 0
    if held and unit:
        units[units == unit] = unit - 1
    return np.asarray(units[places.reshape(documents.shape)])
