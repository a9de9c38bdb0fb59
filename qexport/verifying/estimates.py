"""From tokens to figures: each over all text and over each domain, with its interval, and which tokens drift most."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.artifact.figures import DECISIVE_MARGIN, PROBABILITY_QUANTILES, QUANTILES, Figure
from qexport.artifact.measurements import Histogram, MarginBin, WorstToken
from qexport.statistics.means import Array
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, SHARE, Interval
from qexport.text.windows import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.rounds import Comparison, Measured
from qexport.verifying.units import Units

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


def by_domain(units: Units, estimate: Callable[[Units, NDArray[np.bool_]], list[Figure]]) -> list[Figure]:
    """Figures over all units, then over the units of each domain.

    Args:
        units: all of them.
        estimate: computes the figures of a selection, from its units and its mask [rows] over all rows: windows, or
            the units themselves where these are measured as a whole.
    """
    domains = np.asarray([domain or "" for domain in units.row_domains])
    figures = estimate(units, np.ones(len(domains), dtype=bool))
    for domain in dict.fromkeys(units.row_domains):
        if domain is not None:
            mask = domains == domain
            chosen = units.chosen(np.flatnonzero(mask).tolist())
            figures += [figure.model_copy(update={"domain": domain}) for figure in estimate(chosen, mask)]
    return figures


def divergence_figures(tokens: TokenFigures, units: Units) -> list[Figure]:
    """The artifact compared with the reference: perplexity, divergence, agreement; overall and by domain."""

    def estimate(chosen: Units, mask: NDArray[np.bool_]) -> list[Figure]:
        return _means(tokens, chosen, mask) + _quantiles(tokens, chosen, mask)

    return by_domain(units, estimate)


def rival_figures(found: Measured, units: Units) -> list[Figure]:
    """Round-to-nearest and the base without the adapter, over the windows that they were run on."""
    figures, tokens = [], found.tokens()

    def figures_of(rival: Comparison, other: Comparison, names: tuple[str, str]) -> list[Figure]:
        chosen = units.chosen(found.indices[rival])
        own = chosen.means(tokens["artifact"].kl[found.indices[rival]])
        relative = relative_difference(own, chosen.means(tokens[other].kl))
        return [
            chosen.mean(names[0], chosen.means(tokens[rival].kl), NOT_NEGATIVE),
            chosen.mean(names[1], relative, DIFFERENCE),
        ]

    if "nearest" in tokens:
        figures += figures_of("nearest", "nearest", ("rtn_mean_kl", "kl_over_rtn"))
    if "base" in tokens:
        figures += figures_of("base", "artifact_from_base", ("adapter_effect", "kl_over_base"))
        figures += _adapter_strength(found, units.chosen(found.indices["base"]))
    return figures


def _adapter_strength(found: Measured, units: Units) -> list[Figure]:
    """The slope of the artifact's change of the tokens' log-probabilities from the base's on the reference's change.
    None if the adapter changes no prediction.
    """
    base, artifact = found.tokens()["base"], found.tokens()["artifact"].artifact_nll[found.indices["base"]]
    wanted, own = base.artifact_nll - base.reference_nll, base.artifact_nll - artifact
    squares = units.means(wanted.square())
    if not squares.any():
        return []
    return [units.mean("adapter_strength_predictions", ratio_values(units.means(own * wanted), squares, units.sizes))]


def ratio_values(ours: Array, theirs: Array, sizes: Array | None = None) -> Array:
    """Values whose mean is the ratio of the means, and whose variance is that of a ratio estimator (Cochran, Sampling
    Techniques, 1977, section 6.4).

    Args:
        ours: float64 [units], the units' means.
        theirs: likewise.
        sizes: the units' tokens; None if all have as many.
    """
    scale = np.average(theirs, weights=sizes)
    ratio = np.average(ours, weights=sizes) / scale
    return np.asarray(ratio + (ours - ratio * theirs) / scale)


def relative_difference(own: Array, other: Array) -> Array:
    """(own - other) / (own + other) of each unit, -1 to 1; 0 where both are 0.

    Domains differ in divergence by more than models do. A relative difference needs only a few units.
    """
    both = own + other
    return np.divide(own - other, both, out=np.zeros_like(both), where=both > 0)


def _means(tokens: TokenFigures, units: Units, mask: NDArray[np.bool_]) -> list[Figure]:
    rows = torch.from_numpy(mask)

    def mean(values: torch.Tensor) -> Array:
        return units.means(values[rows])

    change = tokens.probability_change
    return [
        units.mean("reference_perplexity", mean(tokens.reference_nll), NOT_NEGATIVE, function=math.exp),
        units.mean("artifact_perplexity", mean(tokens.artifact_nll), NOT_NEGATIVE, function=math.exp),
        units.mean("perplexity_ratio", mean(tokens.artifact_nll - tokens.reference_nll), function=math.exp),
        units.mean("mean_kl", mean(tokens.kl), NOT_NEGATIVE),
        units.mean("top1_agreement", mean(~tokens.flipped), SHARE, trials=1),
        units.mean("decisive_flips", mean(decisive_flips(tokens)), SHARE, trials=1),
        units.mean("probability_change", mean(change)),
        units.mean("probability_change_rms", mean(change.square()), NOT_NEGATIVE, function=math.sqrt),
    ]


def _quantiles(tokens: TokenFigures, units: Units, mask: NDArray[np.bool_]) -> list[Figure]:
    kl, change = tokens.kl.numpy()[mask], tokens.probability_change.numpy()[mask]
    largest = Interval(float(kl.max()), None, None, len(units.domains))
    return [
        *(units.quantile(name, kl, q) for name, q in QUANTILES.items()),
        units.figure("max_kl", largest, largest),
        *(units.quantile(name, change, q) for name, q in PROBABILITY_QUANTILES.items()),
    ]
