"""Answers that must have a form: how many of each model's have it, and how far the models drift along them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.artifact.figures import Figure
from qexport.progress import Steps
from qexport.statistics.samples import NOT_NEGATIVE, SHARE
from qexport.text.formats import FormatPrompts
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.verifying.along import GivenText, drift_along
from qexport.verifying.answers import Judgement, MeasuredAnswers, measure_answers
from qexport.verifying.estimates import by_domain
from qexport.verifying.memory import Way
from qexport.verifying.units import Units, measured_once, row_means
from qexport.verifying.whole_models import Pair


def measure_formats(
    pair: Pair, prompts: FormatPrompts, encoded: EncodedPrompts, way: Way, steps: Steps, *, max_new_tokens: int
) -> tuple[MeasuredAnswers, list[Figure]]:
    """Continues the prompts with both models, checks both texts, and measures drift along the reference's tokens.

    Args:
        pair: the models.
        prompts: with their formats.
        encoded: those that the model can continue.
        way: what memory allows.
        steps: counts the continuations and the blocks.
        max_new_tokens: tokens of an answer, at most.
    """

    def judge(prompt: Prompt, text: str) -> Judgement:
        problem = prompts.formats[prompt.id].problem(text)
        return Judgement(problem is None, problem or "")

    found = measure_answers(pair, encoded, judge, way, steps, max_new_tokens=max_new_tokens, sha256=prompts.sha256)
    return found, [*found.change("format_validity_change"), *_drift(pair, encoded, found, steps)]


def _drift(pair: Pair, encoded: EncodedPrompts, found: MeasuredAnswers, steps: Steps) -> list[Figure]:
    own = zip(encoded.input_ids, found.both.reference.greedy, strict=True)
    texts = [GivenText(ids, continuation.tokens) for ids, continuation in own]
    tokens = drift_along(pair.reference, pair.artifact, texts, steps, "formatted answers")
    kl = np.concatenate([row_means(each.kl) for each in tokens])
    agreement = np.concatenate([row_means(~each.flipped) for each in tokens])
    trials = min(each.kl.shape[1] for each in tokens)
    units = Units(found.kinds, "prompt", None, len(kl))

    def estimate(chosen: Units, mask: NDArray[np.bool_]) -> list[Figure]:
        return [
            measured_once(chosen.mean("format_kl", kl[mask], NOT_NEGATIVE)),
            measured_once(chosen.mean("format_top1_agreement", agreement[mask], SHARE, trials=trials)),
        ]

    return by_domain(units, estimate)
