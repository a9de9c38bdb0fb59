"""Where the drift sits, against counts by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import factories
from qexport.text.windows import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.estimates import decisive_flips, flips_by_margin, kl_histogram, worst_tokens

MARGIN_ENDS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf)


def figures(windows: int = 6, tokens: int = 40, *, seed: int = 0) -> TokenFigures:
    random = torch.Generator().manual_seed(seed)

    def positive(scale: float) -> torch.Tensor:
        return torch.randn(windows, tokens, generator=random, dtype=torch.float64).mul(scale).exp()

    tops = [torch.randint(3, (windows, tokens), generator=random, dtype=torch.int32) for _ in range(2)]
    return TokenFigures(positive(1), positive(1), positive(5) * 1e-3, positive(2), *tops)


def test_the_histogram_counts_every_token_where_it_belongs() -> None:
    found = figures()
    found.kl[0, :3] = torch.tensor([0.0, -1e-17, 1e9])
    found.kl[1, 0] = 10.0 ** (-6 + 8 / 4)  # an edge
    histogram = kl_histogram(found)
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert sum(histogram.counts) == found.kl.numel()
    clipped = np.clip(found.kl.numpy().ravel(), histogram.edges[0], histogram.edges[-1])
    assert histogram.counts == np.histogram(clipped, bins=histogram.edges)[0].tolist()
    assert histogram.edges == pytest.approx(np.logspace(-6, 2, 33))


def test_flips_are_counted_by_the_margin_of_the_reference() -> None:
    found = figures()
    found.margin[0, :4] = torch.tensor([0.0, 0.1, 0.5, 8.0])
    margin, flipped = found.margin.numpy(), (found.reference_top != found.artifact_top).numpy()
    bins = flips_by_margin(found)
    for (low, high), own in zip(itertools.pairwise(MARGIN_ENDS), bins, strict=True):
        inside = (margin >= low) & (margin < high)
        assert (own.low, own.high) == (low, None if math.isinf(high) else high)
        assert (own.tokens, own.flips) == (inside.sum(), (inside & flipped).sum())
    assert sum(own.tokens for own in bins) == margin.size


def test_a_flip_is_decisive_above_half_a_nat_and_not_at_it() -> None:
    found = figures(1, 3)
    found.margin[0] = torch.tensor([0.5, 0.5000001, 9.0])
    found.reference_top[0], found.artifact_top[0] = torch.tensor([1, 1, 1]), torch.tensor([2, 2, 1])
    assert decisive_flips(found).tolist() == [[False, True, False]]


def test_the_worst_tokens_are_named_with_the_text_before_them() -> None:
    tokenizer = factories.tokenizer()
    text = " ".join(factories.TEXT)
    ids = torch.tensor(tokenizer(text)["input_ids"][: 2 * 41]).reshape(2, 41)
    found = figures(2, 40)
    found.kl.clamp_(max=0.5)
    for rank, place in enumerate([(1, 39), (0, 0), (1, 7), (0, 39), (0, 20)]):
        found.kl[place] = 9.0 - rank
    found.reference_nll[1, 39], found.artifact_nll[1, 39] = math.log(2), math.log(8)
    found.reference_top[1, 39], found.artifact_top[1, 39] = ids[1, 40], ids[0, 0]
    worst = worst_tokens(found, HeldOut(ids, ("code", None), "0" * 64, "held-out.jsonl"), tokenizer)
    assert [token.kl for token in worst] == [9.0, 8.0, 7.0, 6.0, 5.0]
    assert [(token.domain, token.window, token.position) for token in worst[:2]] == [(None, 1, 40), ("code", 0, 1)]
    first = worst[0]
    assert (first.token, first.reference_top) == (tokenizer.decode(ids[1, 40:]),) * 2
    assert first.artifact_top == tokenizer.decode(ids[0, :1])
    assert (first.reference_probability, first.artifact_probability) == pytest.approx((0.5, 0.125))
    assert str(tokenizer.decode(ids[1, :40])).endswith(first.before)
    assert 20 < len(first.before) <= 80
    assert worst[1].before == tokenizer.decode(ids[0, :1])
