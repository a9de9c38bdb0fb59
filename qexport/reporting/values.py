"""Figures and texts as reports show them: as many digits as the interval supports, and text made safe to display."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final

from qexport.amounts import counted
from qexport.artifact.figures import CATALOGUE, Figure, FigureKind, Form, GateResult

_KEPT: Final = {0x09, 0x0A}
_DIRECTION: Final = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_NONCHARACTERS: Final = {0xFFFE, 0xFFFF}


def _substitutes() -> dict[int, str]:
    pictures = {code: chr(0x2400 + code) for code in range(0x20) if code not in _KEPT}
    named = {code: f"⟨U+{code:04X}⟩" for code in [*range(0x80, 0xA0), *_DIRECTION, *_NONCHARACTERS]}
    return {**pictures, 0x7F: "␡", **named}


_SUBSTITUTES: Final = _substitutes()
_BLANKS: Final = {0x20: "·", 0x09: "→", 0x0A: "⏎"}


def visible(text: str) -> str:
    """The text with control characters, direction overrides and non-characters replaced by visible symbols.

    Tabs and line ends stay. Once escaped for its format, the result is safe in HTML, in XML and on a terminal.
    """
    return text.translate(_SUBSTITUTES)


def visible_token(text: str) -> str:
    """A single token. Blanks are shown as symbols too, since a token often consists of nothing else."""
    return visible(text).translate(_BLANKS) or "∅"


@dataclass(frozen=True)
class Piece:
    """A run of words that both texts have (`shared`), or that only this one has."""

    text: str
    shared: bool


def word_diff(reference: str, artifact: str) -> tuple[list[Piece], list[Piece]]:
    """Splits both texts into pieces, which joined give the texts again.

    Words, runs of blanks and single punctuation marks are compared whole.
    """
    left, right = _words(reference), _words(artifact)
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    matcher = SequenceMatcher(a=left, b=right)  # keeps autojunk: without it, repetitive text takes cubic time
    for kind, left_start, left_end, right_start, right_end in matcher.get_opcodes():
        for side, words in zip(pieces, (left[left_start:left_end], right[right_start:right_end]), strict=True):
            if words:
                side.append(Piece("".join(words), shared=kind == "equal"))
    return pieces


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def cut(text: str, length: int) -> str:
    """The text, or its first characters and an ellipsis: at most `length` characters together."""
    return text if len(text) <= length else text[: length - 1] + "…"


UNMEASURED: Final = "–"
_UNITS: Final[dict[Form, str]] = {"nats": " nats", "share": "%", "points": " pp", "number": "", "ratio": ""}
_UNKNOWN: Final = FigureKind("", "number")
_MOST_DECIMALS: Final = 6
_SMALLEST_PLAIN: Final = 1e-4
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def kind_of(name: str | None) -> FigureKind:
    """A figure's entry in the catalogue; a plain number if it has none."""
    return CATALOGUE.get(name, _UNKNOWN) if name else _UNKNOWN


def label_of(name: str) -> str:
    """The label of a figure, or its name if the catalogue has none."""
    return kind_of(name).label or name


def figure_value(figure: Figure) -> str:
    """The value with its unit: `0.0712 nats`, `87.6%`, `+1.20 pp`."""
    return format_value(figure.name, figure.value, *figure.interval)


def figure_interval(figure: Figure) -> str:
    """The 95 % interval without a unit, or a dash."""
    return interval(figure.name, figure.value, *figure.interval)


def gate_value(gate: GateResult) -> str:
    """The measured value, or a dash if nothing was measured."""
    return UNMEASURED if gate.value is None else format_value(gate.figure, gate.value, gate.low, gate.high)


def gate_interval(gate: GateResult) -> str:
    """The interval that decided."""
    return UNMEASURED if gate.value is None else interval(gate.figure, gate.value, gate.low, gate.high)


def gate_limit(gate: GateResult, *, unit: bool = True) -> str:
    """The tolerance, for example `≤ 0.3 nats`; without the unit, `≤ 0.3`, for use beside a value that has it."""
    if gate.limit is None or gate.bound is None:
        return UNMEASURED
    form = kind_of(gate.figure).form
    shown = _UNITS[form] if unit or form == "share" else ""
    return f"{'≤' if gate.bound == 'at_most' else '≥'} {_shortest(gate.limit * _scale(form))}{shown}"


def gate_units(gate: GateResult) -> str:
    """How much was measured for the decision: `38 windows`."""
    if gate.unit is None:
        return UNMEASURED
    return counted(gate.n, gate.unit)


def format_value(name: str | None, value: float, low: float | None = None, high: float | None = None) -> str:
    """A figure's value with its unit.

    Args:
        name: the figure's, which determines the format.
        value: as the report has it; shares are between 0 and 1.
        low: lower end of its interval; the digits shown are those that the interval supports.
        high: upper end of it.
    """
    kind = kind_of(name)
    return _digits(kind, value, _decimals(kind, value, low, high)) + _UNITS[kind.form]


def interval(name: str | None, value: float, low: float | None, high: float | None) -> str:
    """An interval without its unit: `[0.0652, 0.0779]`."""
    if low is None and high is None:
        return UNMEASURED
    kind = kind_of(name)
    decimals = _decimals(kind, value, low, high)
    ends = [_digits(kind, end, decimals) if end is not None else None for end in (low, high)]
    return f"[{ends[0] or '−∞'}, {ends[1] or '∞'}]"


def _scale(form: Form) -> float:
    return 100.0 if form in ("share", "points") else 1.0


def _decimals(kind: FigureKind, value: float, low: float | None, high: float | None) -> int:
    """One or two significant digits of half the interval; without an interval, what is usual for the form."""
    scale = _scale(kind.form)
    if kind.form == "number":  # perplexities differ by less than their own intervals, since they are paired
        return max(2, _clamped(2 - _exponent(value)))
    if low is not None and high is not None and high > low:
        return _clamped(_interval_decimals((high - low) / 2 * scale))
    if value == kind.ideal:
        return 0
    match kind.form:
        case "share":
            return max(1, _clamped(1 - _exponent(min(abs(value), abs(1 - value)) * scale)))
        case "points":
            return max(2, _clamped(1 - _exponent(value * scale)))
        case "ratio":
            return max(3, _clamped(1 - _exponent(value - 1)))
        case "nats":
            return _clamped(2 - _exponent(value))
        case _:
            return _clamped(3 - _exponent(value))


def _interval_decimals(half: float) -> int:
    """Two digits where the first is 1 or 2, else one: the rule of the Particle Data Group, its bounds simplified."""
    digits, _, exponent = f"{half:.1e}".partition("e")
    return (1 if digits[0] in "12" else 0) - int(exponent)


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _clamped(decimals: int) -> int:
    return min(max(decimals, 0), _MOST_DECIMALS)


def _digits(kind: FigureKind, value: float, decimals: int) -> str:
    value *= _scale(kind.form)
    if kind.form == "nats" and 0 < abs(value) < _SMALLEST_PLAIN:
        return _scientific(value)
    signed = kind.form == "points" and kind.better != "lower"
    text = f"{value:+,.{decimals}f}" if signed and value else f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def _scientific(value: float) -> str:
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.replace('-', '−')} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _shortest(value: float) -> str:
    """A limit with at most four significant digits: computed limits have more than are useful."""
    if 0 < abs(value) < _SMALLEST_PLAIN:
        return _scientific(value)
    return f"{float(f'{value:.4g}'):,.10g}".replace("-", "−")
