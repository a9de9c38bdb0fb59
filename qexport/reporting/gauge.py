"""Where a gate's interval lies against its tolerance, small enough for a table's row."""

from __future__ import annotations

from typing import Final

from markupsafe import Markup

from qexport.artifact.figures import GateResult
from qexport.reporting.svg import line, tag
from qexport.reporting.values import kind_of

_WIDTH: Final = 120.0
_HEIGHT: Final = 18.0
_LIMIT: Final = 82.0


def gauge(gate: GateResult) -> Markup:
    """The allowed side is always left of the limit, so every row reads alike. Empty for gates without a limit.

    Hidden from screen readers: the row says the same in numbers.
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
    """The ideal value is at the left end; where there is none before the limit, distances from the limit are shown."""
    sign = 1.0 if gate.bound == "at_most" else -1.0
    ideal = kind_of(gate.figure).ideal
    room = sign * (limit - ideal) if ideal is not None else 0.0
    if room <= 0:
        room = 1.2 * max(abs(end - limit) for end in (gate.value, gate.low, gate.high) if end is not None) or 1.0
    x = _LIMIT + sign * (value - limit) / room * _LIMIT
    return min(max(x, 4.0), _WIDTH - 4.0)
