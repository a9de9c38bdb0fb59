"""Sums by document, and two artifacts compared on the tokens that both were measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reports
from qexport.artifact.baseline import DocumentSums, impossible_sums
from qexport.artifact.figures import Figure, find_figure
from qexport.text.windows import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.document_sums import Baseline, baseline_figures, document_sums, held_out_windows, windows_of
from qexport.verifying.estimates import divergence_figures
from qexport.verifying.reference import Reference
from qexport.verifying.rounds import Measured
from qexport.verifying.units import document_units
from qexport.verifying.verification import _needs_more

LENGTH = 9


def held_out(documents: Sequence[int], domains: Sequence[str | None] | None = None) -> HeldOut:
    """Windows of nine tokens, each from the document of this number, but for the last three tokens of the next one."""
    owners = torch.tensor(documents)[:, None].expand(-1, LENGTH).clone()
    owners[:, -3:] += 1
    ids = torch.randint(0, 50, owners.shape, generator=torch.Generator().manual_seed(1))
    return HeldOut(ids, tuple(domains or [None] * len(documents)), "", "held-out.jsonl", documents=owners)


TEXT = held_out(range(0, 40, 2))


def tokens(text: HeldOut = TEXT, *, seed: int = 0, scale: float = 0.1) -> TokenFigures:
    """What an artifact would be measured with; `scale` is its drift."""
    random = np.random.default_rng(seed)
    shape = (len(text.input_ids), LENGTH - 1)
    hard = np.random.default_rng(99).gamma(2.0, 0.5, shape)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)

    reference = hard + 1.0
    return TokenFigures(
        reference_nll=tensor(reference),
        artifact_nll=tensor(reference + random.normal(scale, math.sqrt(scale), shape)),
        kl=tensor(scale * hard * random.gamma(100.0, 0.01, shape)),
        margin=tensor(random.uniform(0, 2, shape)),
        reference_top=torch.zeros(shape, dtype=torch.int32),
        artifact_top=tensor((random.uniform(size=shape) < scale).astype(np.int32)),
    )


def release(sums: DocumentSums) -> Baseline:
    return Baseline(reports.baseline_record(), sums, reports.identity())


def compared(own: TokenFigures, other: TokenFigures, text: HeldOut = TEXT) -> list[Figure]:
    units = document_units(text, len(own.kl), 16)
    return baseline_figures(document_sums(own, text), release(document_sums(other, text)), units)


def overall(figures: list[Figure], name: str) -> Figure:
    found = find_figure(figures, f"baseline_{name}")
    assert found is not None
    return found


def first(figures: TokenFigures, windows: int) -> TokenFigures:
    return TokenFigures(**{name: getattr(figures, name)[:windows] for name in vars(figures)})


def test_each_part_has_the_sums_of_its_own_tokens() -> None:
    found = tokens()
    sums = document_sums(found, TEXT)
    assert sums.parts == [2] * 20
    assert sums.tokens == [5, 3] * 20
    assert sums.kl[1] == pytest.approx(float(found.kl[0, 5:].sum()), rel=1e-8)
    assert sums.nll[2] == pytest.approx(float((found.artifact_nll - found.reference_nll)[1, :5].sum()), rel=1e-8)
    assert sum(sums.changed) == int(found.flipped.sum())
    assert sum(sums.decisive_flips) == int((found.flipped & (found.margin > 0.5)).sum())
    assert [float(f"{value:.9g}") for value in sums.kl] == sums.kl
    assert len(set(sums.windows)) == 20
    assert list(impossible_sums(sums, [])) == []


def test_a_text_without_documents_has_a_part_for_each_window() -> None:
    text = replace(TEXT, documents=None)
    sums = document_sums(tokens(), text)
    assert (sums.parts, sums.tokens) == ([1] * 20, [8] * 20)
    assert windows_of(sums) == held_out_windows(text)
    assert [unit.n for unit in compared(tokens(seed=1), tokens(), text)] == [20] * 4


def test_the_windows_of_the_text_are_recognized_in_the_sums() -> None:
    assert windows_of(document_sums(first(tokens(), 7), TEXT)) == held_out_windows(TEXT)[:7]


def test_an_equal_artifact_has_no_difference_at_all() -> None:
    for figure in compared(tokens(), tokens()):
        ideal = 1.0 if figure.name == "baseline_perplexity_ratio" else 0.0
        assert (figure.value, figure.sequence_low, figure.sequence_high) == (ideal, ideal, ideal)
        assert not math.copysign(1, figure.value) < 0


def test_a_difference_is_that_of_the_figures_of_both() -> None:
    own, other = tokens(seed=1, scale=0.13), tokens(seed=2)
    found = compared(own, other)
    units = document_units(TEXT, 20, 16)
    ours, theirs = (divergence_figures(each, units) for each in (own, other))

    def both(name: str) -> tuple[float, float]:
        values = [find_figure(each, name) for each in (ours, theirs)]
        return tuple(each.value for each in values if each is not None)  # type: ignore[return-value]

    for name in ("mean_kl", "top1_agreement", "decisive_flips"):
        a, b = both(name)
        assert overall(found, name).value == pytest.approx(a - b, abs=1e-9)
    a, b = both("perplexity_ratio")
    assert overall(found, "perplexity_ratio").value == pytest.approx(a / b)
    assert overall(found, "mean_kl").tokens == 160


def test_what_makes_a_document_hard_for_both_cancels_out() -> None:
    own, other = tokens(seed=1), tokens(seed=2)
    paired = overall(compared(own, other), "mean_kl")
    alone = find_figure(divergence_figures(own, document_units(TEXT, 20, 16)), "mean_kl")
    assert alone is not None
    widths = [figure.sequence_high - figure.sequence_low for figure in (paired, alone)]  # type: ignore[operator]
    assert widths[0] < widths[1] / 2


def test_a_worse_artifact_is_shown_to_be_worse() -> None:
    found = compared(tokens(seed=1, scale=0.2), tokens(seed=2))
    kl = overall(found, "mean_kl")
    assert kl.sequence_low is not None
    assert kl.sequence_low > 0.05


def test_only_windows_that_both_have_are_paired_in_any_order() -> None:
    own, other = tokens(seed=1), tokens(seed=2)
    sums = document_sums(other, TEXT)
    order = [11, 3, 17, 5, 8, 2, 14, 0]
    parts = [2 * row + part for row in order for part in (0, 1)]
    names = ("tokens", "kl", "nll", "changed", "decisive_flips")
    lists = {name: [getattr(sums, name)[part] for part in parts] for name in names}
    some = DocumentSums(windows=[sums.windows[row] for row in order], parts=[2] * 8, **lists)
    rows = sorted(order)
    found = baseline_figures(document_sums(own, TEXT), release(some), document_units(TEXT, 20, 16))
    assert overall(found, "mean_kl").value == pytest.approx(float((own.kl - other.kl)[rows].mean()))
    assert overall(found, "mean_kl").tokens == 64


def test_windows_of_other_tokens_are_not_paired() -> None:
    other = replace(TEXT, input_ids=TEXT.input_ids + 1)
    sums = document_sums(tokens(), other)
    assert baseline_figures(document_sums(tokens(), TEXT), release(sums), document_units(TEXT, 20, 16)) == []
    cut = document_sums(tokens(), replace(TEXT, documents=None))
    assert release(cut).shared_rows(held_out_windows(TEXT)) == [], "the same tokens, cut into other documents"


def test_differences_are_told_by_domain_too() -> None:
    text = held_out(range(0, 40, 2), ["code", "law"] * 10)
    own, other = tokens(text, seed=1), tokens(text, seed=2)
    found = compared(own, other, text)
    law = find_figure(found, "baseline_mean_kl", "law")
    assert law is not None
    assert law.value == pytest.approx(float((own.kl - other.kl)[1::2].mean()))
    assert {figure.domain for figure in found} == {None, "code", "law"}


def test_rare_flips_that_happen_to_be_as_many_leave_a_difference_open() -> None:
    """Other predictions with the same number of changes are not the same artifact."""
    none = torch.zeros((20, LENGTH - 1), dtype=torch.int32)
    own, other = (replace(tokens(seed=seed), artifact_top=none) for seed in (1, 2))
    flips = overall(compared(own, other), "decisive_flips")
    assert flips.value == 0.0
    assert flips.sequence_high is not None
    assert flips.sequence_high > 0


@pytest.mark.parametrize(("windows", "more"), [(5, True), (7, False), (14, False)])
def test_more_windows_are_wanted_as_long_as_the_release_has_them(windows: int, more: bool) -> None:
    """Another undecided gate wants them all the same."""
    reference = SimpleNamespace(
        held_out=TEXT, baseline=release(document_sums(first(tokens(), 7), TEXT)), ends_early=False
    )
    open_gate = reports.gate_result("baseline_mean_kl", figure="baseline_mean_kl", verdict="undecided")
    other = reports.gate_result(verdict="undecided")
    found = Measured(looks=[windows])
    assert _needs_more(cast(Reference, reference), found, [open_gate]) == more
    assert _needs_more(cast(Reference, reference), found, [open_gate, other])


counts = st.lists(st.integers(-1, 6), max_size=6)
floats = st.lists(st.floats(-1, 1e3), max_size=6)


@given(st.lists(st.text(max_size=3), max_size=4), counts, counts, floats, floats, counts, counts)
def test_any_sums_are_refused_or_can_be_compared(
    windows: list[str],
    parts: list[int],
    sizes: list[int],
    kl: list[float],
    nll: list[float],
    changed: list[int],
    flips: list[int],
) -> None:
    sums = DocumentSums(
        windows=windows, parts=parts, tokens=sizes, kl=kl, nll=nll, changed=changed, decisive_flips=flips
    )
    if not list(impossible_sums(sums, [])):
        release(sums).shared_rows(held_out_windows(TEXT))
        assert compared_with(sums) == []


def compared_with(sums: DocumentSums) -> list[Figure]:
    return baseline_figures(document_sums(tokens(), TEXT), release(sums), document_units(TEXT, 20, 16))
