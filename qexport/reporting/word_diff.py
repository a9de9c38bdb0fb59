"""Which words two texts share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True)
class Piece:
    """A run of words that both texts have (`shared`), or that only this one has."""

    text: str
    shared: bool


def word_diff(reference: str, artifact: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts as pieces, whose texts joined are the texts again.

    Words, runs of blanks and single signs are compared whole.
    """
    left, right = _words(reference), _words(artifact)
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    matcher = SequenceMatcher(a=left, b=right)  # its heuristic stays on: repetitions of a broken model cost cubic time
    for kind, left_start, left_end, right_start, right_end in matcher.get_opcodes():
        for side, words in zip(pieces, (left[left_start:left_end], right[right_start:right_end]), strict=True):
            if words:
                side.append(Piece("".join(words), shared=kind == "equal"))
    return pieces


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
