"""Text of models and prompts: made safe to display, and compared word by word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final

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
