"""The comparison with an earlier release: what a report holds for a later one, and with which it was compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from qexport.artifact.figures import Figure, find_figure
from qexport.records import Record

COMPARED: Final[Mapping[str, str]] = {
    "baseline_mean_kl": "mean_kl",
    "baseline_perplexity_ratio": "perplexity_ratio",
    "baseline_top1_agreement": "top1_agreement",
    "baseline_decisive_flips": "decisive_flips",
}
"""The figures of differences from a release, and the figure that both have."""

_ROUNDING = 1e-6
"""Relative. Sums are rounded, figures are not."""


class DocumentSums(Record):
    """Sums over the tokens of each document in each window, which the same sums of another artifact are paired with.

    A part is what a window has of one document. The lists after `parts` have one value for each part, window after
    window, and inside a window in the order of the text. KL and NLL are rounded to nine digits.
    """

    windows: list[str]
    """Of each window, the first 16 hex digits of the SHA-256 of its tokens."""

    parts: list[int]
    """How many parts each window has."""

    tokens: list[int]
    """Predicted tokens."""

    kl: list[float]
    """Sum of the KL divergence, in nats."""

    nll: list[float]
    """Sum of the artifact's negative log-likelihood of the tokens minus the reference's, in nats."""

    changed: list[int]
    """Tokens for which the artifact's likeliest token is another one."""

    decisive_flips: list[int]
    """Those of them for which the reference was sure, see `qexport.artifact.figures.DECISIVE_MARGIN`."""


class BaselineRecord(Record):
    """The release that an artifact was compared with, from that release's own report."""

    name: str
    """For people, as in that report's `subject`; the method too."""

    method: str
    report_sha256: str
    """The digest of that report without its timings."""

    base_sha256: str
    """Of what it was compared with, as in that report's `identity`; the next two fields too."""

    adapter_sha256: str | None
    dtype: str
    """What its blocks computed in."""

    margin: float
    """How much more than this release the artifact may drift, as a share of this release's own drift."""

    mean_kl: float
    """Over all that was measured of it; the next three fields too."""

    perplexity_ratio: float
    top1_agreement: float
    decisive_flips: float


def impossible_sums(sums: DocumentSums, figures: Sequence[Figure]) -> Iterator[str]:
    """Contradictions in the sums, and between them and the figures over all text."""
    lists = (sums.tokens, sums.kl, sums.nll, sums.changed, sums.decisive_flips)
    if len(sums.windows) != len(sums.parts) or any(len(each) != sum(sums.parts) for each in lists):
        yield "document_sums: lists of different lengths"
        return
    if min(sums.parts, default=0) < 1 or min(sums.tokens, default=0) < 1 or min(sums.kl, default=0.0) < 0:
        yield "document_sums: a part without tokens, or a divergence below 0"
        return
    if any(not 0 <= f <= c <= t for f, c, t in zip(sums.decisive_flips, sums.changed, sums.tokens, strict=True)):
        yield "document_sums: more flips than changed tokens, or more of these than tokens"
    measured = find_figure(figures, "mean_kl")
    mean = math.fsum(sums.kl) / sum(sums.tokens)
    if measured is not None and not math.isclose(measured.value, mean, rel_tol=_ROUNDING, abs_tol=_ROUNDING**2):
        yield f"document_sums: a mean KL divergence of {mean:.6g}, but the figure is {measured.value:.6g}"


def impossible_baseline(baseline: BaselineRecord) -> Iterator[str]:
    """Contradictions in the record of the release."""
    if baseline.margin <= 0 or baseline.mean_kl < 0 or baseline.perplexity_ratio <= 0:
        yield "baseline: a margin or a ratio that is not above 0, or a divergence below 0"
    if not (0 <= baseline.top1_agreement <= 1 and 0 <= baseline.decisive_flips <= 1):
        yield "baseline: a share outside of 0 to 1"
