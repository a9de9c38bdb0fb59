"""The charts of a report, as inline SVG. Colours come from the page's style sheet, by class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Final

from markupsafe import Markup

from qexport.amounts import counted
from qexport.artifact.figures import DECISIVE_MARGIN, QUANTILES, Figure, GateResult, find_figure
from qexport.artifact.measurements import BlockDrift, Histogram, MarginBin
from qexport.reporting.svg import WIDTH, Axis, chart, line, linear_axis, tag, text, tick_text
from qexport.reporting.values import cut, figure_interval, figure_value, label_of

_LEFT: Final = 52.0
_RIGHT: Final = WIDTH - 14.0
_NAME_WIDTH: Final = 118.0
_VALUE_WIDTH: Final = 84.0
_COUNT_WIDTH: Final = 34.0
_ROW_HEIGHT: Final = 30.0
_FOREST_TOP: Final = 20.0
_LONGEST_NAME: Final = 15
_LABEL_WIDTH: Final = 46.0


def kl_histogram(histogram: Histogram, figures: Sequence[Figure]) -> Markup:
    """The distribution of the tokens' KL divergence on a logarithmic axis. Below it, also logarithmic, the share of
    tokens beyond each value, which shows the tail. The quantiles are marked in both.
    """
    edges = _positive(histogram.edges)
    across = Axis(edges[0], edges[-1], _LEFT, _RIGHT, logarithmic=True)
    marks = [(tick_text(100 * share), find_figure(figures, name)) for name, share in QUANTILES.items()]
    quantiles = [(f"{label}%", figure) for label, figure in marks if figure is not None]
    largest = find_figure(figures, "max_kl")
    marked = [*quantiles, *([("max", largest)] if largest else [])]
    described = ", ".join(f"{label}: {figure_value(figure)}" for label, figure in marked)
    return chart(
        "kl-histogram",
        "KL divergence of each token",
        f"Histogram of {sum(histogram.counts):,} tokens on a logarithmic axis, with quantiles. {described}.",
        372,
        *_bars(histogram.counts, edges, across),
        *_survival(histogram.counts, edges, across),
        *_quantile_lines(marked, across),
        *(text(across.place(tick), 344, tick_text(tick), anchor="middle") for tick in across.ticks(8)),
        text((_LEFT + _RIGHT) / 2, 366, "KL divergence of a token, nats", anchor="middle", class_="axis-label"),
    )


def _positive(edges: Sequence[float]) -> list[float]:
    """The edges. A first edge of zero, which has no logarithm, is replaced by a positive one."""
    if edges[0] > 0:
        return list(edges)
    step = edges[2] / edges[1] if len(edges) > 2 else 10.0
    return [edges[1] / step, *edges[1:]]


def _bars(counts: Sequence[int], edges: Sequence[float], across: Axis) -> list[Markup]:
    total = sum(counts) or 1
    up = Axis(0, max(*counts, 1) / total, 188, 56)
    drawn = [text(_LEFT - 8, up.place(tick) + 4, f"{100 * tick:g}%", anchor="end") for tick in up.ticks(3)]
    drawn += [line(_LEFT, up.place(tick), _RIGHT, up.place(tick), "grid") for tick in up.ticks(3)]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        left, right, top = across.place(low), across.place(high), up.place(count / total)
        tooltip = tag("title", f"{tick_text(low)} to {tick_text(high)} nats: {count:,} tokens, {count / total:.2%}")
        width = max(right - left - 0.8, 0.5)
        drawn.append(tag("rect", tooltip, x=left, y=top, width=width, height=188 - top, class_="bar"))
    return [*drawn, line(_LEFT, 188, _RIGHT, 188, "axis")]


def _survival(counts: Sequence[int], edges: Sequence[float], across: Axis) -> list[Markup]:
    total = sum(counts) or 1
    beyond = [1 - before / total for before in accumulate(counts, initial=0)]
    up = Axis(min(0.5 / total, 0.1), 1.0, 324, 216, logarithmic=True)
    points = [(across.place(edge), up.place(share)) for edge, share in zip(edges, beyond, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    closing = f"L{points[-1][0]:.1f} 324L{points[0][0]:.1f} 324Z"
    grid = [line(_LEFT, up.place(tick), _RIGHT, up.place(tick), "grid") for tick in up.ticks(4)]
    labels = [text(_LEFT - 8, up.place(tick) + 4, f"{100 * tick:g}%", anchor="end") for tick in up.ticks(4)]
    return [
        *grid,
        *labels,
        tag("path", d=path + closing, class_="area"),
        tag("path", d=path, class_="curve"),
        line(_LEFT, 324, _RIGHT, 324, "axis"),
        text(_RIGHT, 210, "share of tokens beyond", anchor="end", class_="axis-label"),
    ]


def _quantile_lines(marked: Sequence[tuple[str, Figure]], across: Axis) -> list[Markup]:
    """High quantiles are close together, so each label goes to the first row where it has room."""
    drawn = []
    last_x = [-_LABEL_WIDTH] * 3
    for label, figure in marked:
        x = across.place(figure.value)
        row = next((index for index, last in enumerate(last_x) if x - last >= _LABEL_WIDTH), len(last_x) - 1)
        last_x[row] = x
        y = 10 + 16 * row
        drawn.append(line(x, y + 4, x, 324, "quantile"))
        tooltip = tag("title", f"{label_of(figure.name)}: {figure_value(figure)}")
        drawn.append(tag("text", tooltip, label, x=x, y=y, text_anchor="middle", class_="mark"))
    return drawn


def forest(figures: Sequence[Figure], gates: Sequence[GateResult], ideal: float | None) -> Markup:
    """A forest plot: a figure over all text and over each domain, with 95 % intervals and the number of units.

    Args:
        figures: figures of one name, the one over all text first.
        gates: their limits are drawn as ticks in the rows that they apply to.
        ideal: the figure's ideal value, drawn as a dotted line; None for no line.
    """
    name = figures[0].name
    limits: dict[str | None, list[float]] = {}
    for gate in gates:
        if gate.figure == name and gate.limit is not None:
            limits.setdefault(gate.domain, []).append(gate.limit)
    ends = [end for figure in figures for end in (figure.value, *figure.interval) if end is not None]
    right = WIDTH - _VALUE_WIDTH - _COUNT_WIDTH
    across = linear_axis([*ends, *chain(*limits.values()), *([] if ideal is None else [ideal])], _NAME_WIDTH, right)
    bottom = _FOREST_TOP + _ROW_HEIGHT * len(figures)
    rows = [
        _forest_row(figure, _FOREST_TOP + _ROW_HEIGHT * (index + 0.5), across, limits.get(figure.domain, []))
        for index, figure in enumerate(figures)
    ]
    described = "; ".join(f"{figure.domain or 'all text'} {figure_value(figure)}" for figure in figures)
    ideal_line = [] if ideal is None else [line(across.place(ideal), 6, across.place(ideal), bottom, "ideal")]
    return chart(
        f"forest-{name}",
        f"{label_of(name)}, by domain",
        f"With 95 % intervals: {described}.",
        bottom + 28,
        *(line(across.place(tick), 6, across.place(tick), bottom, "grid") for tick in across.ticks(4)),
        *ideal_line,
        text(WIDTH - 4, 12, f"{figures[0].unit}s", anchor="end", class_="axis-label"),
        *rows,
        line(_NAME_WIDTH, bottom, right, bottom, "axis"),
        *(text(across.place(tick), bottom + 20, tick_text(tick), anchor="middle") for tick in across.ticks(4)),
    )


def _forest_row(figure: Figure, y: float, across: Axis, limits: Sequence[float]) -> Markup:
    whole = figure.domain is None
    name = figure.domain or "all text"
    tooltip = f"{name}: {figure_value(figure)}, 95 % interval {figure_interval(figure)}"
    parts = [tag("title", f"{tooltip}, {counted(figure.n, figure.unit)}")]
    low, high = figure.interval
    if low is not None and high is not None:
        parts.append(line(across.place(low), y, across.place(high), y, "whisker"))
    x, half = across.place(figure.value), 6.0 if whole else 4.5
    shape = f"M{x - half:.1f} {y:.1f}L{x:.1f} {y - half:.1f}L{x + half:.1f} {y:.1f}L{x:.1f} {y + half:.1f}Z"
    parts.append(tag("path", d=shape, class_="point") if whole else tag("circle", cx=x, cy=y, r=half, class_="point"))
    parts += [line(across.place(limit), y - 11, across.place(limit), y + 11, "limit") for limit in limits]
    class_ = "row-name whole" if whole else "row-name"
    parts.append(text(_NAME_WIDTH - 10, y + 4, cut(name, _LONGEST_NAME), anchor="end", class_=class_))
    value = figure_value(figure).removesuffix(" nats")
    parts.append(text(WIDTH - _COUNT_WIDTH - 4, y + 4, value, anchor="end", class_=class_))
    parts.append(text(WIDTH - 4, y + 4, f"{figure.n:,}", anchor="end", class_="axis-label"))
    return tag("g", *parts)


def flips_by_margin(bins: Sequence[MarginBin]) -> Markup:
    """The share of tokens whose likeliest token changed, by the reference's margin."""
    shares = [each.flips / each.tokens if each.tokens else 0.0 for each in bins]
    up = Axis(0, max(*shares, 0.01) * 1.12, 210, 26)
    step = (_RIGHT - _LEFT) / len(bins)
    drawn: list[Markup] = []
    for index, (each, share) in enumerate(zip(bins, shares, strict=True)):
        x = _LEFT + step * index
        tooltip = f"margin {_margin(each)} nats: {each.flips:,} of {each.tokens:,} tokens"
        class_ = "bar decisive" if each.low >= DECISIVE_MARGIN else "bar"
        top = up.place(share)
        bar = tag("rect", x=x + step * 0.12, y=top, width=step * 0.76, height=210 - top, class_=class_)
        value = text(x + step / 2, top - 6, _percent(share), anchor="middle", class_="mark")
        drawn.append(tag("g", tag("title", tooltip), bar, value))
        drawn.append(text(x, 228, f"{each.low:g}", anchor="middle"))
    described = "; ".join(f"{_margin(each)} nats {_percent(share)}" for each, share in zip(bins, shares, strict=True))
    return chart(
        "flips-by-margin",
        "Flips by the reference's margin",
        f"Share of tokens that changed, by the margin of the reference's likeliest token: {described}.",
        254,
        *(line(_LEFT, up.place(tick), _RIGHT, up.place(tick), "grid") for tick in up.ticks(4)),
        *(text(_LEFT - 8, up.place(tick) + 4, f"{100 * tick:g}%", anchor="end") for tick in up.ticks(4)),
        *drawn,
        line(_LEFT, 210, _RIGHT, 210, "axis"),
        text(_RIGHT, 228, "∞" if bins[-1].high is None else f"{bins[-1].high:g}", anchor="middle"),
        text((_LEFT + _RIGHT) / 2, 250, "margin of the reference, nats", anchor="middle", class_="axis-label"),
    )


def _margin(each: MarginBin) -> str:
    return f"≥ {each.low:g}" if each.high is None else f"{each.low:g}–{each.high:g}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.3%}"


def block_drift(drift: Sequence[BlockDrift]) -> Markup:
    """The relative error of the hidden states after each block, in the model's order; the block that adds most to it
    is marked.
    """
    up = Axis(0, max(each.relative_error for each in drift) * 1.1 or 1.0, 286, 14)
    across = Axis(0, max(len(drift) - 1, 1), _LEFT + 8, _RIGHT - 8)
    places = [(across.place(index), up.place(each.relative_error)) for index, each in enumerate(drift)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    points = [
        tag("circle", tag("title", f"{each.name}: {each.relative_error:.3g}"), cx=x, cy=y, r=3.2, class_="point")
        for (x, y), each in zip(places, drift, strict=True)
    ]
    last, steepest = drift[-1], _steepest(drift)
    return chart(
        "block-drift",
        "Drift after each block",
        f"Relative error of the hidden states after {counted(len(drift), 'block')}; {last.relative_error:.3g} after "
        f"the last. {drift[steepest].name} adds most.",
        340,
        *(line(_LEFT, up.place(tick), _RIGHT, up.place(tick), "grid") for tick in up.ticks(4)),
        *(text(_LEFT - 8, up.place(tick) + 4, tick_text(tick), anchor="end") for tick in up.ticks(4)),
        tag("path", d=path, class_="curve"),
        *points,
        *_steepest_mark(drift, steepest, places[steepest]),
        line(_LEFT, 286, _RIGHT, 286, "axis"),
        *(
            text(across.place(tick), 306, f"{tick:g}", anchor="middle")
            for tick in across.ticks(6)
            if tick.is_integer() and tick < len(drift)
        ),
        text((_LEFT + _RIGHT) / 2, 330, "block", anchor="middle", class_="axis-label"),
    )


def _steepest(drift: Sequence[BlockDrift]) -> int:
    """The index of the block that adds most to the error."""
    errors = [0.0, *(each.relative_error for each in drift)]
    return max(range(len(drift)), key=lambda index: errors[index + 1] - errors[index])


def _steepest_mark(drift: Sequence[BlockDrift], index: int, place: tuple[float, float]) -> list[Markup]:
    added = drift[index].relative_error - (drift[index - 1].relative_error if index else 0.0)
    x, y = place
    left = x > (_LEFT + _RIGHT) / 2
    label = f"block {index} adds {added:.2g}"
    return [
        tag("circle", cx=x, cy=y, r=5.5, class_="ring"),
        text(x - 10 if left else x + 10, y + 16, label, anchor="end" if left else "start", class_="mark"),
    ]
