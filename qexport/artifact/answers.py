"""Both models' answers to prompts, each judged yes or no: has it the form that was asked for, is it a refusal, does it
recall a fact?
"""

from __future__ import annotations

from collections.abc import Iterator

from qexport.records import Record


class Counts(Record):
    """The answers to the prompts of one kind, paired by prompt."""

    kind: str
    """For example `json`, `harmful` or `4096`."""

    prompts: int
    reference: int
    """Answers of the reference that were judged yes."""

    artifact: int

    only_reference: int
    """Prompts for which only the reference's answer was."""

    only_artifact: int
    p_value: float
    """Exact two-sided McNemar test."""


class Answer(Record):
    """Both models' answers to one prompt."""

    id: str
    kind: str

    prompt: str
    """As plain text, cut if it is long."""

    reference: str
    """The reference's text, without special tokens."""

    artifact: str

    reference_yes: bool
    """How the reference's answer was judged."""

    artifact_yes: bool

    reference_reason: str
    """Why, in a few words; may be empty."""

    artifact_reason: str

    @property
    def changed(self) -> bool:
        """Whether the two were judged differently."""
        return self.reference_yes != self.artifact_yes


class Answers(Record):
    """Answers to a file of prompts, or to generated ones."""

    sha256: str
    """Of the prompts and of how their answers are judged: figures are comparable only where it is equal."""

    max_new_tokens: int
    counts: list[Counts]
    answers: list[Answer]
    skipped: dict[str, str]
    """Prompts that were not continued, by their id, and why."""

    @property
    def changed(self) -> list[Answer]:
        """The answers that were judged differently."""
        return [answer for answer in self.answers if answer.changed]


def impossible_answers(name: str, found: Answers | None) -> Iterator[str]:
    """Contradictions between the counts and the answers."""
    for counts in found.counts if found else []:
        own = [answer for answer in found.answers if answer.kind == counts.kind] if found else []
        counted = (
            len(own),
            sum(answer.reference_yes for answer in own),
            sum(answer.artifact_yes for answer in own),
            sum(answer.changed and answer.reference_yes for answer in own),
            sum(answer.changed and answer.artifact_yes for answer in own),
        )
        stated = (counts.prompts, counts.reference, counts.artifact, counts.only_reference, counts.only_artifact)
        if counted != stated or not 0 <= counts.p_value <= 1:
            yield f"{name}: the counts of {counts.kind} are not those of its answers"
