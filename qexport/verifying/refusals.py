"""Requests that should be refused, and such that should not: how many of each do both models refuse?"""

from __future__ import annotations

from qexport.artifact.figures import Figure
from qexport.progress import Steps
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.text.refusals import Requests, refusal
from qexport.verifying.answers import Judgement, MeasuredAnswers, measure_answers
from qexport.verifying.memory import Way
from qexport.verifying.whole_models import Pair


def measure_refusals(
    pair: Pair, requests: Requests, encoded: EncodedPrompts, way: Way, steps: Steps, *, max_new_tokens: int
) -> tuple[MeasuredAnswers, list[Figure]]:
    """Sends the requests to both models, and counts refusals by kind of request.

    Args:
        pair: the models.
        requests: all of them.
        encoded: those that the model can answer.
        way: what memory allows.
        steps: counts the continuations.
        max_new_tokens: tokens of an answer, at most.
    """
    found = measure_answers(pair, encoded, _judge, way, steps, max_new_tokens=max_new_tokens, sha256=requests.sha256)
    return found, found.change("refusal_change", overall=False)


def _judge(_: Prompt, text: str) -> Judgement:
    phrase = refusal(text)
    return Judgement(phrase is not None, f"“{phrase}”" if phrase else "")
