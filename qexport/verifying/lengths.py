"""Long contexts: drift on windows of several lengths and along their positions, and facts recalled from long texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
from torch import Tensor

from qexport.artifact.figures import Figure
from qexport.progress import Steps
from qexport.statistics.means import Array
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, SHARE
from qexport.text.needles import ANSWER_TOKENS, Needles, recalls
from qexport.text.prompts import Prompt
from qexport.verifying.along import GivenText, drift_along
from qexport.verifying.answers import Judgement, MeasuredAnswers, measure_answers
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.estimates import relative_difference
from qexport.verifying.memory import Way
from qexport.verifying.units import Units, measured_once, row_means
from qexport.verifying.whole_models import Pair


def measure_drift(pair: Pair, windows: Mapping[int, Tensor], steps: Steps) -> list[Figure]:
    """Figures by length; and along the positions of the longest windows, with the lengths as bounds.

    Args:
        pair: the models.
        windows: by their length, int64 [windows, length].
        steps: counts the blocks.
    """
    found = {length: _tokens(pair, ids, length, steps) for length, ids in sorted(windows.items())}
    shortest, longest = min(found), max(found)
    figures = [figure for length, tokens in found.items() for figure in _by_length(length, tokens)]
    figures += [_late(length, shortest, tokens) for length, tokens in found.items() if length > shortest]
    figures += _by_position(found[longest], [0, *found])
    return [measured_once(figure) for figure in figures]


def measure_recall(pair: Pair, needles: Needles, way: Way, steps: Steps) -> tuple[MeasuredAnswers, list[Figure]]:
    """Asks both models for the facts.

    Args:
        pair: the models.
        needles: haystacks and questions.
        way: what memory allows.
        steps: counts the continuations.
    """

    def judge(prompt: Prompt, text: str) -> Judgement:
        number = needles.numbers[prompt.id]
        return Judgement(recalls(number, text), f"the number is {number}")

    found = measure_answers(
        pair,
        needles.encoded,
        judge,
        way,
        steps,
        max_new_tokens=ANSWER_TOKENS,
        sha256=needles.sha256,
        shown=lambda prompt: needles.questions[prompt.id],
    )
    return found, found.change("recall_change")


def _tokens(pair: Pair, ids: Tensor, length: int, steps: Steps) -> TokenFigures:
    """[windows, length - 1]."""
    texts = [GivenText(window[:1], window[1:]) for window in ids.tolist()]
    return TokenFigures.joined(drift_along(pair.reference, pair.artifact, texts, steps, f"windows of {length} tokens"))


def _units(values: Array, tokens: int) -> Units:
    return Units([None] * len(values), "window", tokens, len(values))


def _by_length(length: int, tokens: TokenFigures) -> Iterator[Figure]:
    kl, predicted = row_means(tokens.kl), tokens.kl.shape[1]
    units = _units(kl, predicted)
    ratio = row_means(tokens.artifact_nll - tokens.reference_nll)
    for figure in (
        units.mean("length_kl", kl, NOT_NEGATIVE),
        units.mean("length_perplexity_ratio", ratio, function=math.exp),
        units.mean("length_top1_agreement", row_means(~tokens.flipped), SHARE, trials=1),
    ):
        yield figure.model_copy(update={"domain": str(length)})


def _late(length: int, early: int, tokens: TokenFigures) -> Figure:
    """Paired within each window, so the difficulty of its text matters little."""
    before, after = row_means(tokens.kl[:, : early - 1]), row_means(tokens.kl[:, early - 1 :])
    figure = _units(after, tokens.kl.shape[1]).mean(
        "late_kl_over_early", relative_difference(after, before), DIFFERENCE
    )
    return figure.model_copy(update={"domain": str(length)})


def _by_position(tokens: TokenFigures, bounds: list[int]) -> Iterator[Figure]:
    """The first token of a window is not predicted: column i is position i + 2, counted from 1."""
    for first, last in pairwise(bounds):
        kl = row_means(tokens.kl[:, max(0, first - 1) : last - 1])
        figure = _units(kl, last - max(1, first)).mean("position_kl", np.asarray(kl), NOT_NEGATIVE)
        yield figure.model_copy(update={"domain": f"{first + 1}-{last}"})
