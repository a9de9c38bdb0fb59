"""Perplexity, KL divergence and top-1 agreement against other formulas for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import qexport.verifying.divergence as divergence
from qexport.errors import NumericalError
from qexport.verifying.divergence import TokenFigures, compare_logits


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
    figures = compare_logits(ours, theirs, wanted)
    p, q = functional.log_softmax(ours.double(), -1), functional.log_softmax(theirs.double(), -1)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(figures.kl, kl, rtol=1e-9, atol=1e-12)
    nll = [functional.cross_entropy(each.double(), wanted, reduction="none") for each in (ours, theirs)]
    torch.testing.assert_close(figures.reference_nll, nll[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(figures.artifact_nll, nll[1], rtol=1e-9, atol=1e-12)
    assert figures.artifact_perplexity == pytest.approx(math.exp(float(nll[1].mean())), rel=1e-9)
    assert figures.top1_agreement == float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    assert figures.mean_kl >= -1e-12


def test_a_known_case() -> None:
    ours, theirs = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    figures = compare_logits(ours, theirs, torch.tensor([0]))
    assert figures.mean_kl == pytest.approx(0.5 * math.log(3), rel=1e-6)
    assert figures.reference_perplexity == pytest.approx(4 / 3, rel=1e-6)
    assert figures.artifact_perplexity == pytest.approx(4, rel=1e-6)
    assert figures.top1_agreement == 0.0


def test_the_divergence_is_from_the_reference_and_not_the_other_way_round() -> None:
    ours, theirs = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.4, 0.3, 0.3]]).log()
    forward, backward = (compare_logits(*pair, torch.tensor([0])).mean_kl for pair in ((ours, theirs), (theirs, ours)))
    assert forward == pytest.approx(0.98 * math.log(0.98 / 0.4) + 0.02 * math.log(0.01 / 0.3), rel=1e-5)
    assert abs(forward - backward) > 0.3


def test_equal_logits_give_exactly_no_divergence_and_full_agreement() -> None:
    same = logits(200, 1000)
    figures = compare_logits(same, same.clone(), targets(200, 1000))
    assert figures.mean_kl == 0.0
    assert figures.top1_agreement == 1.0
    assert figures.reference_perplexity == figures.artifact_perplexity


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    ours = logits().double()
    figures = compare_logits(ours, ours + 100.0, targets())
    assert figures.mean_kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_bits_depend_neither_on_the_threads_nor_on_the_pieces(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = logits(tokens, 150_000), logits(tokens, 150_000, seed=1)
    wanted = targets(tokens, 150_000)
    threads = torch.get_num_threads()
    results = []
    for count, at_once in ((1, 1 << 30), (2, 1 << 30), (2, 1)):
        torch.set_num_threads(count)
        monkeypatch.setattr(divergence, "_DOUBLES_AT_ONCE", at_once)
        results.append(compare_logits(ours, theirs, wanted))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.kl, results[0].kl)
        assert torch.equal(result.artifact_nll, results[0].artifact_nll)


def test_a_perplexity_beyond_all_numbers_is_an_error_and_not_infinity() -> None:
    nll = torch.full((1, 2), 800.0, dtype=torch.float64)
    figures = TokenFigures(nll, nll, nll, nll > 0)
    with pytest.raises(NumericalError):
        _ = figures.artifact_perplexity
