"""SVG: escaped elements, axes, the frame that charts share, and a gate's gauge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

from qexport.artifact.figures import GateResult
from qexport.reporting.values import kind_of

WIDTH: Final = 480.0

LARGEST: Final = 1e300
"""No axis goes beyond it, so that its length is finite: a broken model's perplexity may be larger."""


def tag(name: str, *children: str | Markup, **attributes: str | float) -> Markup:
    """An SVG element. Text and attribute values are escaped; underscores in attribute names become hyphens."""
    written = "".join(
        f' {escape(key.strip("_").replace("_", "-"))}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
    )
    inner = "".join(escape(child) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")  # `Markup.format` takes ten times as long


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def chart(identity: str, title: str, description: str, height: float, *children: Markup) -> Markup:
    """A chart of `WIDTH` by `height` units that scales with the page, with a title and a description in words.

    Args:
        identity: its id in the page.
        title: what is shown.
        description: its content, for people who cannot see it.
        height: in units of `WIDTH`.
        children: what is drawn.
    """
    names = f"{identity}-title {identity}-desc"
    return tag(
        "svg",
        tag("title", title, id=f"{identity}-title"),
        tag("desc", description, id=f"{identity}-desc"),
        *children,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_labelledby=names,
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str = "tick") -> Markup:
    """A line of text whose baseline is at `y`."""
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


@dataclass(frozen=True)
class Axis:
    """Maps values to coordinates.

    Attributes:
        low: the value at `start`.
        high: the value at `end`; larger than `low`.
        start: in units of the chart.
        end: in units of the chart; smaller than `start` for values that rise upward.
        logarithmic: equal distances are equal ratios; requires a positive `low`.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The coordinate of a value, or of the nearer end if it is outside."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, max(value, self._smallest)))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def _smallest(self) -> float:
        return self.low if self.logarithmic else -math.inf

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self, most: int = 5) -> list[float]:
        """Round values in the range, at most `most` of them."""
        return _decades(self.low, self.high, most) if self.logarithmic else _steps(self.low, self.high, most)


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis for all values, with a margin at both ends."""
    bounded = [min(max(value, -LARGEST), LARGEST) for value in values]
    low, high = min(bounded), max(bounded)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, start, end)


def tick_text(value: float) -> str:
    """A tick's label: short, with a typographic minus, and powers of ten for very large or small values."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, _, exponent = f"{value:.0e}".partition("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{power}" if digits == "1" else f"{digits}·10{power}"
    return f"{value:,.6g}".replace("-", "−")


def _steps(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    return [10.0**exponent for exponent in range(last, first - 1, -stride)][::-1]


_WIDTH: Final = 120.0
_HEIGHT: Final = 18.0
_LIMIT: Final = 82.0


def gauge(gate: GateResult) -> Markup:
    """Draws value, interval and limit, the allowed side always on the left. Empty for gates without a limit.

    It is hidden from screen readers, since its row has the same in numbers.
    """
    if gate.value is None or gate.limit is None:
        return Markup("")
    middle = _HEIGHT / 2
    low, high = (gate.value if end is None else end for end in (gate.low, gate.high))
    ends = sorted(_place(gate, end, gate.limit) for end in (low, high))
    return tag(
        "svg",
        tag("rect", x=0.0, y=middle - 3, width=_LIMIT, height=6.0, rx=3.0, class_="allowed"),
        line(_LIMIT, 1, _LIMIT, _HEIGHT - 1, "limit"),
        line(ends[0], middle, ends[1], middle, "whisker"),
        tag("circle", cx=_place(gate, gate.value, gate.limit), cy=middle, r=4.0, class_="point"),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        width=_WIDTH,
        height=_HEIGHT,
        class_=f"gauge {gate.verdict}",
        aria_hidden="true",
    )


def _place(gate: GateResult, value: float, limit: float) -> float:
    """The ideal value is at the left end; if none is on the allowed side, the scale is the distance from the limit."""
    sign = 1.0 if gate.bound == "at_most" else -1.0
    ideal = kind_of(gate.figure).ideal
    room = sign * (limit - ideal) if ideal is not None else 0.0
    if room <= 0:
        room = 1.2 * max(abs(end - limit) for end in (gate.value, gate.low, gate.high) if end is not None) or 1.0
    x = _LIMIT + sign * (value - limit) / room * _LIMIT
    return min(max(x, 4.0), _WIDTH - 4.0)
