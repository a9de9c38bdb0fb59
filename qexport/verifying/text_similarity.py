"""How much two texts, or two sequences of tokens, differ.

sacrebleu and rouge-score are imported where they are used: together they take half a second, most of it for nltk.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, Final

import numpy as np

_GRAM: Final = 4

_UNSPACED: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, further extensions
)
"""Scripts that put no spaces between words."""


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first index at which two sequences differ, or one of them has ended; None if they are equal."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    shorter = None if len(ours) == len(theirs) else min(len(ours), len(theirs))
    return next((index for index, (own, other) in pairs if own != other), shorter)


def edit_distance(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Insertions, deletions and substitutions of tokens (Levenshtein), over the longer length: 0 to 1.

    0 if both are empty. Row by row as in Wagner and Fischer (1974); within a row, insertions are a running minimum.
    """
    longer = max(len(ours), len(theirs))
    if not longer:
        return 0.0
    columns, target = np.arange(len(theirs) + 1), np.asarray(theirs, dtype=np.int64)
    row = columns.copy()
    for count, token in enumerate(ours, start=1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (target != token))])
        row = np.minimum.accumulate(best - columns) + columns
    return float(row[-1]) / longer


def repetition_rate(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that occurred before, 0 to 1; 0 for fewer than five tokens."""
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def chrf(reference: str, text: str) -> float:
    """chrF2 in percent, 0 to 100: F-score (beta 2) of character n-grams up to 6, without white space (Popović 2015).

    As sacrebleu computes it for one sentence. If neither text has a character other than white space, 100; if only one
    has, 0.
    """
    if not reference.split() and not text.split():
        return 100.0
    return float(_chrf().sentence_score(text, [reference]).score)


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L, 0 to 1: F-score (beta 1) of the longest common subsequence of words (Lin 2004), without stemming.

    As rouge-score computes it, but with our own split into words: its tokenizer is made for English and drops every
    letter outside a to z. See `words`. If neither text has a word, 1 if they are equal and 0 if not.
    """
    if not words(reference) and not words(text):
        return float(reference == text)
    return float(_rouge().score(reference, text)["rougeL"].fmeasure)


def words(text: str) -> list[str]:
    """Runs of letters, digits and their marks in lower case; for scripts without spaces, every character.

    For English text the same as rouge-score's own tokenizer.
    """
    normal = unicodedata.normalize("NFC", text).lower()
    found: list[str] = []
    for kind, run in groupby(normal, key=_kind):
        if kind == "word":
            found.append("".join(run))
        elif kind == "character":
            found.extend(run)
    return found


def _kind(character: str) -> str:
    if unicodedata.category(character)[0] not in "LNM":
        return "between"
    return "character" if any(low <= ord(character) <= high for low, high in _UNSPACED) else "word"


class _Words:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
