"""Charts draw what the report says: places and lengths against the numbers."""

from __future__ import annotations

import math
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

import reports
import rich_report
from qexport.artifact.measurements import BlockDrift, Histogram, MarginBin
from qexport.reporting.charts import block_drift, flips_by_margin, forest, kl_histogram
from qexport.reporting.layer_chart import layer_chart
from qexport.reporting.svg import Axis, linear_axis, tag, tick_text

FLOATS = st.floats(-1e6, 1e6).map(lambda value: float(f"{value:.6g}"))


def drawn(chart: Markup, element: str, class_: str) -> list[Element]:
    root = ElementTree.fromstring(str(chart))
    return [each for each in root.iter(element) if each.get("class") == class_]


def number(element: Element, name: str) -> float:
    return float(element.get(name) or "nan")


def labels(chart: Markup) -> list[str]:
    texts = ElementTree.fromstring(str(chart)).iter("text")
    return [(each.text or "") + "".join(child.tail or "" for child in each) for each in texts]


def test_bars_are_as_high_as_their_counts() -> None:
    histogram = Histogram(edges=[0.001, 0.01, 0.1, 1.0], counts=[10, 40, 20])
    bars = drawn(kl_histogram(histogram, []), "rect", "bar")
    heights = [number(bar, "height") for bar in bars]
    assert heights == pytest.approx([heights[1] / 4, heights[1], heights[1] / 2], abs=0.02)
    widths = {round(number(bar, "width"), 1) for bar in bars}
    assert len(widths) == 1  # a decade each


def test_quantiles_lie_where_the_logarithmic_axis_has_them() -> None:
    histogram = Histogram(edges=[0.001, 0.01, 0.1, 1.0], counts=[10, 40, 20])
    figures = [reports.figure("median_kl", 0.01), reports.figure("max_kl", 1.0), reports.figure("kl_p99", 0.1)]
    chart = kl_histogram(histogram, figures)
    bars = drawn(chart, "rect", "bar")
    places = [number(line, "x1") for line in drawn(chart, "line", "quantile")]
    assert places == pytest.approx([number(bars[1], "x"), number(bars[2], "x"), 466.0], abs=0.1)
    assert [label for label in labels(chart) if label in ("50%", "99%", "max")] == ["50%", "99%", "max"]


def test_the_tail_is_the_share_beyond_each_edge() -> None:
    histogram = Histogram(edges=[0.001, 0.01, 0.1, 1.0], counts=[900, 99, 1])
    (curve,) = drawn(kl_histogram(histogram, []), "path", "curve")
    heights = [float(point.split()[1]) for point in (curve.get("d") or "")[1:].split("L")]
    assert heights[0] == 216.0  # all tokens
    assert heights[1] - heights[0] == pytest.approx((heights[2] - heights[0]) / 3, abs=0.2)  # a tenth, a thousandth
    assert heights[3] == 324.0  # none


def test_a_histogram_that_begins_at_zero_can_be_drawn() -> None:
    histogram = Histogram(edges=[0.0, 0.01, 0.1], counts=[0, 0])
    assert len(drawn(kl_histogram(histogram, []), "rect", "bar")) == 2


def test_a_forest_shows_both_limits_of_a_figure() -> None:
    figures = [reports.figure("perplexity_ratio", 1.0, half=0.01)]
    gates = [reports.gate_result("both", figure="perplexity_ratio", limit=limit) for limit in (1.1, 0.9)]
    assert len(drawn(forest(figures, gates, 1.0), "line", "limit")) == 2


def test_a_forest_has_the_ends_of_each_interval_and_the_limits() -> None:
    figures = [reports.figure("mean_kl", 0.2, half=0.05), reports.figure("mean_kl", 0.4, half=0.025, domain="code")]
    gates = [reports.gate_result(limit=0.3), reports.gate_result(domain="code", limit=0.5)]
    chart = forest(figures, gates, 0.0)
    whiskers = [(number(line, "x1"), number(line, "x2")) for line in drawn(chart, "line", "whisker")]
    limits = [number(line, "x1") for line in drawn(chart, "line", "limit")]
    (ideal,) = (number(line, "x1") for line in drawn(chart, "line", "ideal"))
    scale = (limits[1] - limits[0]) / 0.2
    ends = [(place - ideal) / scale for pair in whiskers for place in pair]
    assert ends == pytest.approx([0.1, 0.3, 0.35, 0.45], abs=0.002)
    (whole,) = drawn(chart, "path", "point")
    (code,) = drawn(chart, "circle", "point")
    assert (number(code, "cx") - ideal) / scale == pytest.approx(0.4, abs=0.002)
    assert (whole.get("d") or "").startswith("M")


def test_a_forest_shows_how_many_units_each_row_has() -> None:
    chart = forest(
        [reports.figure("mean_kl", 0.2, n=1234), reports.figure("mean_kl", 0.4, n=5, domain="code")], [], 0.0
    )
    assert [each.text for each in drawn(chart, "text", "axis-label")] == ["windows", "1,234", "5"]


@pytest.mark.parametrize(
    ("errors", "marked"), [((0.1, 0.11, 0.3), "block 2 adds 0.19"), ((0.2, 0.3), "block 0 adds 0.2")]
)
def test_the_block_that_adds_most_drift_is_marked(errors: tuple[float, ...], marked: str) -> None:
    chart = block_drift([BlockDrift(name=str(i), relative_error=error) for i, error in enumerate(errors)])
    assert [each.text for each in drawn(chart, "text", "mark")] == [marked]


def test_flips_are_shares_of_their_bin_and_sure_ones_stand_out() -> None:
    bins = [MarginBin(low=0.0, high=0.5, tokens=100, flips=50), MarginBin(low=0.5, high=None, tokens=1000, flips=100)]
    chart = flips_by_margin(bins)
    (unsure,), (sure,) = drawn(chart, "rect", "bar"), drawn(chart, "rect", "bar decisive")
    assert number(unsure, "height") == pytest.approx(5 * number(sure, "height"), abs=0.05)
    assert {"50.0%", "10.0%", "∞"} <= set(labels(chart))


def test_an_empty_bin_of_margins_is_no_division_by_zero() -> None:
    assert "0.0%" in labels(flips_by_margin([MarginBin(low=0.0, high=None, tokens=0, flips=0)]))


def test_drift_rises_with_the_error() -> None:
    chart = block_drift([BlockDrift(name=str(i), relative_error=error) for i, error in enumerate((0.0, 0.1, 0.2))])
    heights = [number(point, "cy") for point in drawn(chart, "circle", "point")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)
    assert heights[0] > heights[2]
    assert drawn(block_drift([BlockDrift(name="0", relative_error=0.0)]), "circle", "point")


def test_layers_that_fell_back_are_crosses_and_damped_ones_stand_out() -> None:
    layers = rich_report.rich_report().layers
    chart = layer_chart(layers)
    assert len(drawn(chart, "path", "cross")) == 2
    titles = [each.findtext("title") or "" for each in drawn(chart, "circle", "point worse")]
    damped = [layer.name for layer in layers if layer.damp_percent == 0.1]
    assert [title.split(":")[0] for title in titles if "damping" in title] == damped
    worse = [layer.name for layer in layers if layer.loss and layer.rtn_loss and layer.loss >= layer.rtn_loss]
    assert [title.split(":")[0] for title in titles if "loss" in title] == worse


def test_a_model_rounded_as_a_whole_has_no_layers_that_fell_back() -> None:
    rounded = [reports.layer(method="round_to_nearest", loss=None, rtn_loss=None)]
    assert drawn(layer_chart(rounded), "path", "cross") == []


@given(FLOATS, FLOATS, st.integers(2, 8))
def test_ticks_are_round_and_inside(first: float, second: float, most: int) -> None:
    axis = linear_axis([first, second], 0, 100)
    ticks = axis.ticks(most)
    assert len(ticks) <= most + 1
    assert ticks == sorted(ticks)
    slack = (axis.high - axis.low) * 1e-6
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)


@given(st.floats(-9, 3), st.floats(0.5, 9))
def test_ticks_of_logarithms_are_powers_of_ten(low: float, decades: float) -> None:
    ticks = Axis(10**low, 10 ** (low + decades), 0, 100, logarithmic=True).ticks()
    assert all(math.log10(tick) == pytest.approx(round(math.log10(tick))) for tick in ticks)
    assert len(ticks) <= 6


def test_places_outside_of_an_axis_are_its_ends() -> None:
    axis = Axis(0.01, 1.0, 10, 110, logarithmic=True)
    assert [axis.place(value) for value in (0.0, -1.0, 0.01, 0.1, 1.0, 5.0)] == [10, 10, 10, 60, 110, 110]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.25, "0.25"), (-0.5, "−0.5"), (1e-5, "10⁻⁵"), (2e-4, "2·10⁻⁴"), (1500.0, "1,500"), (1e6, "10⁶")],
)
def test_ticks_are_labelled_shortly(value: float, expected: str) -> None:
    assert tick_text(value) == expected


def test_attributes_and_text_are_escaped() -> None:
    written = str(tag("text", '<b>"&', class_='x" onload="y', x=1.50))
    assert written == '<text class="x&#34; onload=&#34;y" x="1.5">&lt;b&gt;&#34;&amp;</text>'
