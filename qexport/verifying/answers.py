"""Both models' answers to prompts, each judged yes or no, and paired by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qexport.artifact.answers import Answer, Answers, Counts
from qexport.artifact.figures import Figure
from qexport.progress import Steps
from qexport.statistics.paired import change_of_accuracy, mcnemar
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.verifying.continuation import Continuation, greedy_settings
from qexport.verifying.continuing import Both, Task
from qexport.verifying.estimates import by_domain
from qexport.verifying.memory import Way
from qexport.verifying.units import Units
from qexport.verifying.whole_models import Pair, continue_prompts, padding_notes, pass_notes

_LONGEST_PROMPT: Final = 600
"""Characters of a prompt that the report quotes."""


@dataclass(frozen=True)
class Judgement:
    """What was found in an answer.

    Attributes:
        yes: whether the answer is what is counted.
        reason: why, in a few words; may be empty.
    """

    yes: bool
    reason: str = ""


Judge = Callable[[Prompt, str], Judgement]
"""Judges one model's answer to a prompt, decoded without special tokens."""


@dataclass(frozen=True)
class MeasuredAnswers:
    """Answers for the report, and what figures are made from.

    Attributes:
        record: for the report.
        both: the continuations.
        kinds: of the prompts that were continued, in their order.
        notes: on how they were made.
    """

    record: Answers
    both: Both
    kinds: Sequence[str]
    notes: Sequence[str]

    def change(self, name: str, *, overall: bool = True) -> list[Figure]:
        """The share of answers that were judged yes, the artifact's minus the reference's; over all prompts and over
        each kind. It is measured once, so gates are decided on the confidence interval.

        Args:
            name: of the figure.
            overall: False to leave out the figure over all prompts.
        """
        changes = np.array([each.artifact_yes - each.reference_yes for each in self.record.answers])
        units = Units(self.kinds, "prompt", None, len(changes))

        def estimate(chosen: Units, mask: NDArray[np.bool_]) -> list[Figure]:
            lost, gained = (int((changes[mask] == change).sum()) for change in (-1, 1))
            interval = change_of_accuracy(lost, gained, len(chosen.domains))
            return [chosen.figure(name, interval, interval)]

        figures = by_domain(units, estimate)
        return figures if overall else [figure for figure in figures if figure.domain is not None]


def measure_answers(
    pair: Pair,
    prompts: EncodedPrompts,
    judge: Judge,
    way: Way,
    steps: Steps,
    *,
    max_new_tokens: int,
    sha256: str,
    shown: Callable[[Prompt], str] = lambda prompt: prompt.shown,
) -> MeasuredAnswers:
    """Continues every prompt greedily with both models, and judges the texts.

    Args:
        pair: the models.
        prompts: their domains are the kinds that are counted.
        judge: of a text.
        way: what memory allows.
        steps: counts the continuations, or the blocks.
        max_new_tokens: tokens of an answer, at most.
        sha256: of the prompts and of how they are judged.
        shown: what the report quotes of a prompt; long texts are cut.
    """
    greedy = greedy_settings(pair.checkpoint, pair.tokenizer, max_new_tokens=max_new_tokens)
    both = continue_prompts(pair, Task(prompts, greedy, None, steps, pair.kept), way)
    texts = zip(prompts.prompts, both.reference.greedy, both.artifact.greedy, strict=True)
    answers = [_answer(prompt, shown(prompt), (own, other), pair.tokenizer, judge) for prompt, own, other in texts]
    kinds = [prompt.domain for prompt in prompts.prompts]
    record = Answers(
        sha256=sha256,
        max_new_tokens=max_new_tokens,
        counts=[_counts(kind, [each for each in answers if each.kind == kind]) for kind in dict.fromkeys(kinds)],
        answers=answers,
        skipped=dict(prompts.skipped),
    )
    return MeasuredAnswers(record, both, kinds, [*pass_notes(both.passes), *padding_notes(both.padding)])


def _answer(
    prompt: Prompt,
    shown: str,
    both: tuple[Continuation, Continuation],
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
) -> Answer:
    texts = [str(tokenizer.decode(list(each.tokens), skip_special_tokens=True)) for each in both]
    own, other = (judge(prompt, text) for text in texts)
    return Answer(
        id=prompt.id,
        kind=prompt.domain,
        prompt=shown if len(shown) <= _LONGEST_PROMPT else f"{shown[:_LONGEST_PROMPT]}…",
        reference=texts[0],
        artifact=texts[1],
        reference_yes=own.yes,
        artifact_yes=other.yes,
        reference_reason=own.reason,
        artifact_reason=other.reason,
    )


def _counts(kind: str, answers: Sequence[Answer]) -> Counts:
    pairs = Counter((each.reference_yes, each.artifact_yes) for each in answers)
    lost, gained = pairs[True, False], pairs[False, True]
    return Counts(
        kind=kind,
        prompts=len(answers),
        reference=pairs[True, True] + lost,
        artifact=pairs[True, True] + gained,
        only_reference=lost,
        only_artifact=gained,
        p_value=mcnemar(lost, gained),
    )
