"""Whether a report agrees with itself: a file that was edited, merged or cut may fit the schema and mean nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from qexport.artifact.figures import CATALOGUE, Figure, overall

if TYPE_CHECKING:
    from qexport.artifact.manifest import LayerRecord
    from qexport.artifact.report import Report

_BITS: Final = (2, 3, 4, 8)


def contradictions(report: Report) -> list[str]:
    """What cannot be true of any measurement, one sentence each; none in a report that qexport has written."""
    return [
        *_of_figures(report.all_figures),
        *_of_charts(report),
        *(problem for layer in report.layers for problem in _of_layer(layer)),
        *_of_sizes(report),
        *_of_verdict(report),
    ]


def _of_figures(figures: list[Figure]) -> Iterator[str]:
    counted = Counter((figure.name, figure.domain) for figure in figures)
    for figure in figures:
        place = figure.name if figure.domain is None else f"{figure.name}[{figure.domain}]"
        if figure.name not in CATALOGUE:
            yield f"{place}: there is no such figure"
        if counted.pop((figure.name, figure.domain), 0) > 1:
            yield f"{place}: stands there more than once"
        if figure.n < 1 or (figure.tokens is not None and figure.tokens < 0):
            yield f"{place}: measured on {figure.n} units and {figure.tokens} tokens"
        for low, high in ((figure.low, figure.high), (figure.sequence_low, figure.sequence_high)):
            if low is not None and high is not None and low > high:
                yield f"{place}: an interval from {low:g} to {high:g}"


def _of_charts(report: Report) -> Iterator[str]:
    edges, counts = report.kl_histogram.edges, report.kl_histogram.counts
    rising = all(low < high for low, high in pairwise(edges))
    if len(counts) < 1 or len(edges) != len(counts) + 1 or not rising or edges[0] < 0 or min(counts) < 0:
        yield "kl_histogram: edges and counts do not fit together"
    if any(each.flips < 0 or each.tokens < each.flips for each in report.flips_by_margin):
        yield "flips_by_margin: more flips than tokens"
    if any(each.relative_error < 0 for each in report.block_drift):
        yield "block_drift: an error below 0"


def _of_layer(layer: LayerRecord) -> Iterator[str]:
    if layer.bits not in _BITS:
        yield f"{layer.name}: {layer.bits} bits"
    if any(value is not None and value < 0 for value in (layer.loss, layer.rtn_loss, layer.damp_percent)):
        yield f"{layer.name}: a loss or damping below 0"


def _of_sizes(report: Report) -> Iterator[str]:
    sizes = report.subject.sizes
    if min(sizes.parameters, sizes.total_bytes, report.subject.reference_bytes) < 1 or sizes.bits_per_weight <= 0:
        yield "subject: a size that is not over 0"


def _of_verdict(report: Report) -> Iterator[str]:
    if report.verdict != (found := overall(gate.verdict for gate in report.gates)):
        yield f"verdict: {report.verdict}, where that of its gates is {found}"
    for gate in report.gates:
        if gate.passed and gate.figure is not None and None in (gate.value, gate.low, gate.high, gate.limit):
            yield f"gate {gate.name}: passed on what was not measured"
