"""From tokens to figures: each over all text and over each domain, with its interval, and which tokens drift most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.artifact.figures import DECISIVE_MARGIN, PROBABILITY_QUANTILES, QUANTILES, Figure, Unit
from qexport.artifact.measurements import Histogram, MarginBin, WorstToken
from qexport.statistics.means import confidence_sequence, stratified_mean
from qexport.statistics.quantiles import quantile_interval
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, REAL, SHARE, Interval, Range, Sample, transformed
from qexport.text.windows import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.rounds import Measured

_DECADES: Final = (-6, 2)
_BINS_PER_DECADE: Final = 4
_MARGINS: Final = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_WORST: Final = 5
_CONTEXT_TOKENS: Final = 24
_CONTEXT_CHARACTERS: Final = 80


def decisive_flips(figures: TokenFigures) -> Tensor:
    """Bool: the likeliest token changed and the reference's margin is over `DECISIVE_MARGIN`."""
    return figures.flipped & (figures.margin > DECISIVE_MARGIN)


def kl_histogram(figures: TokenFigures) -> Histogram:
    """Counts of the tokens' KL divergence, on a logarithmic scale."""
    first, last = _DECADES
    bins = (last - first) * _BINS_PER_DECADE
    edges = [10.0 ** (first + index / _BINS_PER_DECADE) for index in range(bins + 1)]
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = torch.bucketize(figures.kl.flatten(), inner, right=True).bincount(minlength=bins)
    return Histogram(edges=edges, counts=counts.tolist())


def flips_by_margin(figures: TokenFigures) -> list[MarginBin]:
    """How often the likeliest token changed, by the reference's margin."""
    place = torch.bucketize(figures.margin.flatten(), torch.tensor(_MARGINS[1:], dtype=torch.float64), right=True)
    tokens = place.bincount(minlength=len(_MARGINS)).tolist()
    flips = place[figures.flipped.flatten()].bincount(minlength=len(_MARGINS)).tolist()
    ends = (*_MARGINS[1:], None)
    return [
        MarginBin(low=low, high=high, tokens=count, flips=changed)
        for low, high, count, changed in zip(_MARGINS, ends, tokens, flips, strict=True)
    ]


def worst_tokens(figures: TokenFigures, held_out: HeldOut, tokenizer: PreTrainedTokenizerBase) -> list[WorstToken]:
    """The tokens of the largest divergence, worst first."""
    found = torch.sort(figures.kl.flatten(), descending=True, stable=True).indices[:_WORST].tolist()
    return [_described(figures, held_out, tokenizer, *divmod(index, figures.kl.shape[1])) for index in found]


def _described(
    figures: TokenFigures, held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, window: int, position: int
) -> WorstToken:
    ids = held_out.input_ids[window]
    before = _text(tokenizer, ids[max(0, position + 1 - _CONTEXT_TOKENS) : position + 1].tolist())
    return WorstToken(
        domain=held_out.domains[window],
        window=window,
        position=position + 1,
        before=before[-_CONTEXT_CHARACTERS:],
        token=_text(tokenizer, [int(ids[position + 1])]),
        kl=float(figures.kl[window, position]),
        reference_top=_text(tokenizer, [int(figures.reference_top[window, position])]),
        reference_probability=float(figures.reference_nll[window, position].neg().exp()),
        artifact_top=_text(tokenizer, [int(figures.artifact_top[window, position])]),
        artifact_probability=float(figures.artifact_nll[window, position].neg().exp()),
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


Array = NDArray[np.float64]

_NO_DOMAIN: Final = ""


@dataclass(frozen=True)
class Units:
    """The units that a figure was measured on.

    Attributes:
        domains: of each unit; None if it has none.
        unit: the kind of unit.
        tokens: predicted tokens per unit; None if the unit is not counted in tokens.
        planned: the number of units for which confidence sequences are made narrowest.
    """

    domains: Sequence[str | None]
    unit: Unit
    tokens: int | None
    planned: int

    @property
    def strata(self) -> list[str]:
        """The domains, for the statistics."""
        return [domain or _NO_DOMAIN for domain in self.domains]

    def chosen(self, indices: Sequence[int]) -> Units:
        """The units with these indices."""
        return replace(self, domains=[self.domains[index] for index in indices])

    def figure(self, name: str, fixed: Interval, sequence: Interval) -> Figure:
        """The figure with both of its intervals."""
        return Figure(
            name=name,
            value=fixed.value,
            low=fixed.low,
            high=fixed.high,
            sequence_low=sequence.low,
            sequence_high=sequence.high,
            n=fixed.n,
            unit=self.unit,
            tokens=None if self.tokens is None else self.tokens * fixed.n,
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
        """The figure that is the mean of the units' values, or an increasing function of it.

        Args:
            name: of the figure.
            values: float64 [units].
            within: the values that the mean can have.
            trials: for a share or a difference of shares, the number of observations per unit.
            function: for example exp, if the values are logarithms.
        """
        sample = Sample(values, self.strata, trials)
        intervals = (
            stratified_mean(sample, within),
            confidence_sequence(sample, within, planned=self.planned),
        )
        if function is not None:
            intervals = (transformed(intervals[0], function), transformed(intervals[1], function))
        return self.figure(name, *intervals)

    def quantile(self, name: str, values: Array, q: float) -> Figure:
        """The figure that is a quantile of all tokens' values [units, tokens]."""
        found = quantile_interval(values, self.strata, q, planned=self.planned)
        return self.figure(name, found.fixed, found.sequence)


def by_domain(units: Units, estimate: Callable[[Units, NDArray[np.bool_]], list[Figure]]) -> list[Figure]:
    """Figures over all units, then over the units of each domain.

    Args:
        units: all of them.
        estimate: computes the figures of a selection, from its units and its mask [units] over all units.
    """
    domains = np.asarray(units.strata)
    figures = estimate(units, np.ones(len(domains), dtype=bool))
    for domain in dict.fromkeys(units.domains):
        if domain is not None:
            mask = domains == domain
            chosen = replace(units, domains=[domain] * int(mask.sum()))
            figures += [figure.model_copy(update={"domain": domain}) for figure in estimate(chosen, mask)]
    return figures


def divergence_figures(tokens: TokenFigures, units: Units) -> list[Figure]:
    """The artifact compared with the reference: perplexity, divergence, agreement; overall and by domain."""

    def estimate(chosen: Units, mask: NDArray[np.bool_]) -> list[Figure]:
        return _means(tokens, chosen, mask) + _quantiles(tokens, chosen, mask)

    return by_domain(units, estimate)


def rival_figures(found: Measured, units: Units) -> list[Figure]:
    """Round-to-nearest and the base without the adapter, over the windows that they were run on."""
    figures = []
    means = {name: window_means(tokens.kl) for name, tokens in found.tokens().items()}
    if "nearest" in means:
        chosen, own = units.chosen(found.indices["nearest"]), means["artifact"][found.indices["nearest"]]
        figures += [
            chosen.mean("rtn_mean_kl", means["nearest"], NOT_NEGATIVE),
            chosen.mean("kl_over_rtn", relative_difference(own, means["nearest"]), DIFFERENCE),
        ]
    if "base" in means:
        chosen, own = units.chosen(found.indices["base"]), means["artifact"][found.indices["base"]]
        figures += [
            chosen.mean("adapter_effect", means["base"], NOT_NEGATIVE),
            chosen.mean("kl_over_base", relative_difference(own, means["artifact_from_base"]), DIFFERENCE),
        ]
    return figures


def relative_difference(own: Array, other: Array) -> Array:
    """(own - other) / (own + other) of each window, -1 to 1; 0 where both are 0.

    Domains differ in divergence by more than models do. A relative difference needs only a few windows.
    """
    both = own + other
    return np.divide(own - other, both, out=np.zeros_like(both), where=both > 0)


def _means(tokens: TokenFigures, units: Units, mask: NDArray[np.bool_]) -> list[Figure]:
    def mean(values: torch.Tensor) -> Array:
        return window_means(values)[mask]

    trials = tokens.kl.shape[1]
    change = tokens.probability_change
    return [
        units.mean("reference_perplexity", mean(tokens.reference_nll), NOT_NEGATIVE, function=math.exp),
        units.mean("artifact_perplexity", mean(tokens.artifact_nll), NOT_NEGATIVE, function=math.exp),
        units.mean("perplexity_ratio", mean(tokens.artifact_nll - tokens.reference_nll), function=math.exp),
        units.mean("mean_kl", mean(tokens.kl), NOT_NEGATIVE),
        units.mean("top1_agreement", mean(~tokens.flipped), SHARE, trials=trials),
        units.mean("decisive_flips", mean(decisive_flips(tokens)), SHARE, trials=trials),
        units.mean("probability_change", mean(change)),
        units.mean("probability_change_rms", mean(change.square()), NOT_NEGATIVE, function=math.sqrt),
    ]


def _quantiles(tokens: TokenFigures, units: Units, mask: NDArray[np.bool_]) -> list[Figure]:
    kl, change = tokens.kl.numpy()[mask], tokens.probability_change.numpy()[mask]
    largest = Interval(float(kl.max()), None, None, len(kl))
    return [
        *(units.quantile(name, kl, q) for name, q in QUANTILES.items()),
        units.figure("max_kl", largest, largest),
        *(units.quantile(name, change, q) for name, q in PROBABILITY_QUANTILES.items()),
    ]


def window_means(values: torch.Tensor) -> Array:
    """Each window's mean; numpy sums a row in the same order with any number of threads."""
    return np.asarray(values.numpy().astype(np.float64).mean(axis=1))
