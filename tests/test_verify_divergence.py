"""Perplexity, KL divergence and top-1 agreement against other formulas for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import qexport.verifying.divergence as divergence
from qexport.verifying.divergence import TokenFigures, compare_logits


def figures_of(ours: torch.Tensor, theirs: torch.Tensor, wanted: torch.Tensor) -> TokenFigures:
    (figures,) = compare_logits([ours, theirs], [(0, 1)], wanted)
    return figures


def logits(tokens: int = 12, vocabulary: int = 50, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def targets(tokens: int = 12, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(9))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 30.0), st.integers(1, 9), st.integers(2, 70))
def test_figures_equal_torchs_own_losses(seed: int, distance: float, tokens: int, vocabulary: int) -> None:
    ours = logits(tokens, vocabulary, seed=seed)
    theirs = ours + logits(tokens, vocabulary, seed=seed + 1, spread=distance)
    wanted = targets(tokens, vocabulary)
    figures = figures_of(ours, theirs, wanted)
    p, q = functional.log_softmax(ours.double(), -1), functional.log_softmax(theirs.double(), -1)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(figures.kl, kl, rtol=1e-9, atol=1e-12)
    nll = [functional.cross_entropy(each.double(), wanted, reduction="none") for each in (ours, theirs)]
    torch.testing.assert_close(figures.reference_nll, nll[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(figures.artifact_nll, nll[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(figures.flipped, ours.argmax(-1) != theirs.argmax(-1))
    ranked = p.sort(descending=True).values
    torch.testing.assert_close(figures.margin, ranked[:, 0] - ranked[:, 1], rtol=1e-6, atol=1e-6)
    change = q.exp()[range(tokens), wanted] - p.exp()[range(tokens), wanted]
    torch.testing.assert_close(figures.probability_change, change, rtol=1e-9, atol=1e-12)
    assert figures.kl.min() >= -1e-12


def test_a_known_case() -> None:
    ours, theirs = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    figures = figures_of(ours, theirs, torch.tensor([0]))
    assert float(figures.kl) == pytest.approx(0.5 * math.log(3), rel=1e-6)
    assert float(figures.reference_nll) == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert float(figures.artifact_nll) == pytest.approx(math.log(4), rel=1e-6)
    assert float(figures.margin) == pytest.approx(math.log(3), rel=1e-6)
    assert float(figures.probability_change) == pytest.approx(-0.5, rel=1e-6)
    assert (int(figures.reference_top), int(figures.artifact_top)) == (0, 1)


def test_the_divergence_is_from_the_reference_and_not_the_other_way_round() -> None:
    ours, theirs = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.4, 0.3, 0.3]]).log()
    forward, backward = (
        float(figures.kl) for figures in compare_logits([ours, theirs], [(0, 1), (1, 0)], torch.tensor([0]))
    )
    assert forward == pytest.approx(0.98 * math.log(0.98 / 0.4) + 0.02 * math.log(0.01 / 0.3), rel=1e-5)
    assert abs(forward - backward) > 0.3


def test_equal_logits_give_exactly_no_divergence_and_full_agreement() -> None:
    same = logits(200, 1000)
    figures = figures_of(same, same.clone(), targets(200, 1000))
    assert not figures.kl.any()
    assert not figures.flipped.any()
    assert torch.equal(figures.reference_nll, figures.artifact_nll)


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    ours = logits().double()
    figures = figures_of(ours, ours + 100.0, targets())
    assert float(figures.kl.mean()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_bits_depend_neither_on_the_threads_nor_on_the_pieces(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = logits(tokens, 150_000), logits(tokens, 150_000, seed=1)
    wanted = targets(tokens, 150_000)
    threads = torch.get_num_threads()
    results = []
    for count, at_once in ((1, 1 << 30), (2, 1 << 30), (2, 1)):
        torch.set_num_threads(count)
        monkeypatch.setattr(divergence, "DOUBLES_AT_ONCE", at_once)
        results.append(figures_of(ours, theirs, wanted))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.kl, results[0].kl)
        assert torch.equal(result.artifact_nll, results[0].artifact_nll)


def test_several_pairs_are_compared_in_one_pass_each_as_by_itself() -> None:
    models = [logits(seed=seed) for seed in range(3)]
    pairs = [(0, 1), (0, 2), (2, 1)]
    for (first, second), found in zip(pairs, compare_logits(models, pairs, targets()), strict=True):
        alone = figures_of(models[first], models[second], targets())
        assert torch.equal(found.kl, alone.kl)
        assert torch.equal(found.artifact_nll, alone.artifact_nll)
        assert torch.equal(found.reference_top, models[first].argmax(-1))


def test_of_equally_likely_tokens_the_lowest_counts_as_the_likeliest() -> None:
    ours, theirs = torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    figures = figures_of(ours, theirs, torch.tensor([0]))
    assert not figures.flipped.any()
    assert float(figures.margin) == 0.0
