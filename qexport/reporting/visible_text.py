"""Text of models and prompts, made harmless: shown as it is, it steers neither a terminal nor the order of a line."""

from __future__ import annotations

from typing import Final

_KEPT: Final = {0x09, 0x0A}
_DIRECTION: Final = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_NO_CHARACTERS: Final = {0xFFFE, 0xFFFF}


def _substitutes() -> dict[int, str]:
    pictures = {code: chr(0x2400 + code) for code in range(0x20) if code not in _KEPT}
    named = {code: f"⟨U+{code:04X}⟩" for code in [*range(0x80, 0xA0), *_DIRECTION, *_NO_CHARACTERS]}
    return {**pictures, 0x7F: "␡", **named}


_SUBSTITUTES: Final = _substitutes()
_BLANKS: Final = {0x20: "·", 0x09: "→", 0x0A: "⏎"}


def visible(text: str) -> str:
    """The text with control characters, direction overrides and non-characters replaced by signs for them.

    Tabs and line ends stay. What remains can stand in HTML, in XML and on a terminal once these have escaped it.
    """
    return text.translate(_SUBSTITUTES)


def visible_token(text: str) -> str:
    """A single token: blanks are shown too, since they are often all that it consists of."""
    return visible(text).translate(_BLANKS) or "∅"
