"""Whether the records of a report agree with each other: a file that was edited, merged or cut may fit the schema and
mean nothing. Each function yields one sentence for each thing that cannot be true of any measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from qexport.artifact.figures import CATALOGUE, Figure, GateResult, Verdict, overall
from qexport.artifact.manifest import Sizes
from qexport.artifact.measurements import BlockDrift, Histogram, MarginBin
from qexport.records import LayerRecord

_BITS: Final = (2, 3, 4, 8)


def impossible_figures(figures: Sequence[Figure]) -> Iterator[str]:
    """Of the figures of the measurement and of the speed together."""
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


def impossible_drift(histogram: Histogram, flips: Sequence[MarginBin], blocks: Sequence[BlockDrift]) -> Iterator[str]:
    """Of where the drift sits."""
    edges, counts = histogram.edges, histogram.counts
    rising = all(low < high for low, high in pairwise(edges))
    if len(counts) < 1 or len(edges) != len(counts) + 1 or not rising or edges[0] < 0 or min(counts) < 0:
        yield "kl_histogram: edges and counts do not fit together"
    if any(each.flips < 0 or each.tokens < each.flips for each in flips):
        yield "flips_by_margin: more flips than tokens"
    if any(each.relative_error < 0 for each in blocks):
        yield "block_drift: an error below 0"


def impossible_layers(layers: Sequence[LayerRecord]) -> Iterator[str]:
    """Of what quantizing the layers did."""
    for layer in layers:
        if layer.bits not in _BITS:
            yield f"{layer.name}: {layer.bits} bits"
        if any(value is not None and value < 0 for value in (layer.loss, layer.rtn_loss, layer.damp_percent)):
            yield f"{layer.name}: a loss or damping below 0"


def impossible_sizes(sizes: Sizes, reference_bytes: int) -> Iterator[str]:
    """Of the artifact and the merged model."""
    if min(sizes.parameters, sizes.total_bytes, reference_bytes) < 1 or sizes.bits_per_weight <= 0:
        yield "subject: a size that is not over 0"


def impossible_verdict(verdict: Verdict, gates: Sequence[GateResult]) -> Iterator[str]:
    """Of the whole and of each gate."""
    if verdict != (found := overall(gate.verdict for gate in gates)):
        yield f"verdict: {verdict}, where that of its gates is {found}"
    for gate in gates:
        if gate.passed and gate.figure is not None and None in (gate.value, gate.low, gate.high, gate.limit):
            yield f"gate {gate.name}: passed on what was not measured"
