"""Where the drift sits: the spread of the divergence, flips by margin, the worst tokens."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.artifact.figures import DECISIVE_MARGIN
from qexport.artifact.measurements import Histogram, MarginBin, WorstToken
from qexport.text.held_out import HeldOut
from qexport.verifying.divergence import TokenFigures

_DECADES: Final = (-6, 2)
_BINS_PER_DECADE: Final = 4
_MARGINS: Final = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_WORST: Final = 5
_CONTEXT_TOKENS: Final = 24
_CONTEXT_CHARACTERS: Final = 80


def decisive_flips(figures: TokenFigures) -> Tensor:
    """Bool: the likeliest token changed where the reference's margin is over `DECISIVE_MARGIN`."""
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
