"""Figures from tokens, against numpy on the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qexport.artifact.figures import CATALOGUE, Figure, find_figure
from qexport.statistics.means import confidence_sequence
from qexport.statistics.quantiles import quantile_interval
from qexport.statistics.samples import SHARE, Range, Sample
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.estimates import divergence_figures, rival_figures
from qexport.verifying.rounds import Comparison, Measured
from qexport.verifying.units import Units

DOMAINS = ["code", "news", None] * 8
TOKENS = 50


def tokens(windows: int = len(DOMAINS), *, seed: int = 0) -> TokenFigures:
    random = torch.Generator().manual_seed(seed)

    def positive(scale: float) -> torch.Tensor:
        return torch.randn(windows, TOKENS, generator=random, dtype=torch.float64).exp() * scale

    tops = [torch.randint(4, (windows, TOKENS), generator=random, dtype=torch.int32) for _ in range(2)]
    return TokenFigures(positive(1), positive(1.1), positive(0.1), positive(0.5), *tops)


def units(windows: int = len(DOMAINS), planned: int = 12) -> Units:
    return Units(DOMAINS[:windows], "window", TOKENS, planned)


def oracle(found: TokenFigures, rows: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> dict[str, float]:
    nll, theirs, kl, margin, top, other = (
        getattr(found, name).numpy()[rows]
        for name in ("reference_nll", "artifact_nll", "kl", "margin", "reference_top", "artifact_top")
    )
    change = np.exp(-theirs) - np.exp(-nll)
    quantiles = {"median_kl": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p999": 0.999}
    changes = {"p01": 0.01, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "reference_perplexity": np.exp(nll.mean()),
        "artifact_perplexity": np.exp(theirs.mean()),
        "perplexity_ratio": np.exp(theirs.mean() - nll.mean()),
        "mean_kl": kl.mean(),
        "max_kl": kl.max(),
        "top1_agreement": (top == other).mean(),
        "decisive_flips": ((top != other) & (margin > 0.5)).mean(),
        "probability_change": change.mean(),
        "probability_change_rms": np.sqrt((change**2).mean()),
        **{name: np.quantile(kl, q, method="inverted_cdf") for name, q in quantiles.items()},
        **{f"probability_change_{name}": np.quantile(change, q, method="inverted_cdf") for name, q in changes.items()},
    }


@pytest.mark.parametrize("domain", [None, "code", "news"])
def test_every_figure_is_numpys_overall_and_in_each_domain(domain: str | None) -> None:
    found = tokens()
    rows = np.array([domain is None or name == domain for name in DOMAINS])
    figures = {figure.name: figure for figure in divergence_figures(found, units()) if figure.domain == domain}
    expected = oracle(found, rows)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, rel=1e-12)
    for figure in figures.values():
        assert (figure.n, figure.tokens, figure.unit) == (rows.sum(), rows.sum() * TOKENS, "window")


def test_windows_without_a_domain_count_overall_alone() -> None:
    assert {figure.domain for figure in divergence_figures(tokens(), units())} == {None, "code", "news"}


def test_every_figure_but_the_largest_has_both_intervals_around_its_value() -> None:
    for figure in divergence_figures(tokens(), units()):
        ends = (figure.sequence_low, figure.low, figure.high, figure.sequence_high)
        if not CATALOGUE[figure.name].gated:
            assert ends == (None, None, None, None)
            continue
        inner = [end for end in ends if end is not None]
        assert sorted([*inner, figure.value]) == [
            *(end for end in ends[:2] if end is not None), figure.value, *(end for end in ends[2:] if end is not None)
        ]  # fmt: skip
        if figure.domain is None and not figure.name.endswith(("999", "p99", "p01")):  # these reach too far out
            assert len(inner) == 4


def test_the_interval_of_a_logarithm_is_carried_through_its_exponential() -> None:
    found = tokens()
    ratio = find_figure(divergence_figures(found, units()), "perplexity_ratio")
    assert ratio is not None
    differences = (found.artifact_nll - found.reference_nll).numpy().mean(axis=1)
    expected = confidence_sequence(Sample(differences, units().strata), planned=12)
    assert expected.low is not None
    assert expected.high is not None
    assert (ratio.sequence_low, ratio.sequence_high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))


def test_sequences_of_quantiles_are_narrow_where_it_is_planned() -> None:
    found = tokens()
    for planned in (12, 200):
        figure = find_figure(divergence_figures(found, units(planned=planned)), "median_kl")
        assert figure is not None
        expected = quantile_interval(found.kl.numpy(), units().strata, 0.5, planned=planned).sequence
        assert (figure.sequence_low, figure.sequence_high) == (expected.low, expected.high)


def slope(artifact: TokenFigures, base: TokenFigures) -> float:
    """numpy's least squares through the origin."""
    wanted = (base.artifact_nll - base.reference_nll).numpy().flatten()
    found = (base.artifact_nll - artifact.artifact_nll[: len(base.kl)]).numpy().flatten()
    return float(np.linalg.lstsq(wanted[:, None], found, rcond=None)[0][0])


def test_half_of_a_change_has_half_of_its_strength_with_an_interval() -> None:
    base, noise = tokens(24), tokens(24, seed=5).reference_nll * 0.1
    half = (base.artifact_nll + base.reference_nll) / 2 + noise - noise.mean()
    artifact = replace(base, artifact_nll=half)
    looks: dict[Comparison, list[int]] = {name: list(range(24)) for name in ("artifact", "base", "artifact_from_base")}
    parts: dict[Comparison, list[TokenFigures]] = {"artifact": [artifact], "base": [base], "artifact_from_base": [base]}
    figures = rival_figures(Measured(parts, looks, looks=[24]), units())
    figure = find_figure(figures, "adapter_strength_predictions")
    assert figure is not None
    assert figure.low is not None
    assert figure.high is not None
    assert figure.value == pytest.approx(slope(artifact, base))
    assert figure.low < 0.5 < figure.high < 0.7


def test_rivals_are_paired_with_the_artifact_on_their_own_windows() -> None:
    looks: dict[Comparison, list[int]] = {
        "artifact": list(range(24)),
        "nearest": [*range(8), *range(13, 21)],  # other domains than those of the first sixteen
        "base": list(range(8)),
        "artifact_from_base": list(range(8)),
    }
    parts = {name: [tokens(len(rows), seed=len(name))] for name, rows in looks.items()}
    figures = rival_figures(Measured(parts=parts, indices=looks, looks=[12, 24]), units())
    means = {name: part[0].kl.numpy().mean(axis=1) for name, part in parts.items()}
    own, from_base = means["artifact"][looks["nearest"]], means["artifact_from_base"]
    relative = (own - means["nearest"]) / (own + means["nearest"])
    expected = {
        "rtn_mean_kl": means["nearest"].mean(),
        "kl_over_rtn": relative.mean(),
        "adapter_effect": means["base"].mean(),
        "kl_over_base": ((means["artifact"][:8] - from_base) / (means["artifact"][:8] + from_base)).mean(),
        "adapter_strength_predictions": slope(parts["artifact"][0], parts["base"][0]),
    }
    assert {figure.name: figure.value for figure in figures} == pytest.approx(expected)
    assert {figure.name: figure.n for figure in figures} == dict(
        rtn_mean_kl=16, kl_over_rtn=16, adapter_effect=8, kl_over_base=8, adapter_strength_predictions=8
    )
    strata = [DOMAINS[window] or "" for window in looks["nearest"]]
    paired = confidence_sequence(Sample(relative, strata), Range(-1.0, 1.0), planned=12)
    assert (figures[1].sequence_low, figures[1].sequence_high) == pytest.approx((paired.low, paired.high))


def test_intervals_end_where_the_figures_do() -> None:
    """One window of eight scatters so far that plain intervals would reach below 0, or below -1."""
    rows = [0.0] * 7 + [5.0]
    kl = torch.tensor(rows, dtype=torch.float64)[:, None].expand(8, TOKENS).contiguous()
    own = replace(tokens(8), kl=kl, reference_nll=kl, artifact_nll=kl)
    alone = Units([None] * 8, "window", TOKENS, planned=12)
    figures = divergence_figures(own, alone)
    for name, lowest in (("mean_kl", 0.0), ("reference_perplexity", 1.0), ("artifact_perplexity", 1.0)):
        figure = find_figure(figures, name)
        assert figure is not None
        assert (figure.low, figure.sequence_low) == (lowest, lowest)
    looks: dict[Comparison, list[int]] = {name: list(range(8)) for name in ("artifact", "nearest", "base")}
    looks["artifact_from_base"] = list(range(8))
    worse = [replace(own, kl=kl + 1e-9 + (kl == 0) * 3)]
    parts: dict[Comparison, list[TokenFigures]] = {"artifact": [own], "nearest": worse, "base": [own]}
    parts["artifact_from_base"] = worse
    rivals = {figure.name: figure for figure in rival_figures(Measured(parts, looks, looks=[8]), alone)}
    for name in ("kl_over_rtn", "kl_over_base"):
        assert (rivals[name].low, rivals[name].sequence_low) == (-1.0, -1.0)
    assert rivals["adapter_effect"].sequence_low == 0.0


def test_without_rivals_there_are_no_figures_of_them() -> None:
    alone = Measured(parts={"artifact": [tokens()]}, indices={"artifact": list(range(24))}, looks=[24])
    assert rival_figures(alone, units()) == []


def test_shares_that_no_window_showed_are_not_certain() -> None:
    """Twelve windows of 50 tokens without a flip: by the rule of three up to 3 in 600 may flip elsewhere."""
    found = tokens(12)
    figures = divergence_figures(replace(found, artifact_top=found.reference_top), units(12))
    flips, agreement = (find_figure(figures, name) for name in ("decisive_flips", "top1_agreement"))
    assert flips is not None
    assert agreement is not None
    assert (flips.value, flips.low, agreement.value, agreement.high) == (0.0, 0.0, 1.0, 1.0)
    for end, wider in (
        (flips.high, flips.sequence_high),
        (1 - (agreement.low or 0), 1 - (agreement.sequence_low or 0)),
    ):
        assert end is not None
        assert wider is not None
        assert 3 / 600 < end < wider < 20 / 600


def figure_of_share(values: list[float], trials: int | None) -> Figure:
    return units(len(values)).mean("top1_agreement", np.array(values), SHARE, trials=trials)


def test_windows_that_all_agree_are_not_certain_of_it() -> None:
    certain, honest = figure_of_share([1.0] * 12, None), figure_of_share([1.0] * 12, 1)
    assert (certain.low, certain.high) == (1.0, 1.0)
    assert honest.value == 1.0
    assert honest.low is not None
    assert honest.low < 1.0
