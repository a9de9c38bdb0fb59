"""Task accuracy of two models, one after the other in memory, and its record, paired by item."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import Figure
from qexport.artifact.measurements import TaskRecord
from qexport.errors import QexportError, RecipeError
from qexport.hidden_packages import hidden
from qexport.statistics.paired import change_of_accuracy, mcnemar, smallest_drop
from qexport.verifying import TaskSettings


@dataclass(frozen=True)
class Item:
    """One model's answer to one item of a task.

    Attributes:
        index: of the item in the task's documents.
        digest: of its document, prompt and target, which identifies the item.
        right: whether the metric is 1.
    """

    index: int
    digest: str
    right: bool


@dataclass(frozen=True)
class Scores:
    """One model's answers to a task.

    Attributes:
        task: the task's name.
        metric: says whether an answer is correct.
        filter: the task's chain of filters that was applied to the answers.
        num_fewshot: solved examples before each item.
        items: in the order of the task's documents.
    """

    task: str
    metric: str
    filter: str
    num_fewshot: int
    items: tuple[Item, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """For each item, whether the model's answer is correct."""
        return tuple(item.right for item in self.items)

    @property
    def accuracy(self) -> float:
        """The share of correct answers."""
        return sum(self.right) / len(self.items)


@dataclass(frozen=True)
class PairedTask:
    """Both models' answers to the same items of one task.

    Attributes:
        reference: the merged model's.
        artifact: the artifact's; the task, its settings and its items are those of `reference`.
    """

    reference: Scores
    artifact: Scores

    @cached_property
    def record(self) -> TaskRecord:
        """For the report."""
        pairs = Counter(zip(self.reference.right, self.artifact.right, strict=True))
        return TaskRecord(
            task=self.reference.task,
            metric=self.reference.metric,
            num_fewshot=self.reference.num_fewshot,
            sha256=sha256_json([item.digest for item in self.reference.items]),
            items=len(self.reference.items),
            reference_accuracy=self.reference.accuracy,
            artifact_accuracy=self.artifact.accuracy,
            only_reference=pairs[True, False],
            only_artifact=pairs[False, True],
            p_value=mcnemar(pairs[True, False], pairs[False, True]),
            smallest_drop=smallest_drop(len(self.reference.items)),
        )

    @property
    def accuracy_change(self) -> Figure:
        """Tasks are measured once, so both intervals are the same."""
        record = self.record
        found = change_of_accuracy(record.only_reference, record.only_artifact, record.items)
        return Figure(
            name="accuracy_change",
            domain=record.task,
            value=found.value,
            low=found.low,
            high=found.high,
            sequence_low=found.low,
            sequence_high=found.high,
            n=record.items,
            unit="item",
        )


def pair(reference: Scores, artifact: Scores) -> PairedTask:
    """Pairs the answers to the same items.

    Raises:
        QexportError: the two do not have the same task, metric and items.
    """
    ours, theirs = _measured(reference), _measured(artifact)
    if ours != theirs:
        raise QexportError(
            "the two models did not answer the same items",
            where=f"task {reference.task}: {_first_difference(ours, theirs)}",
            mend="measure both again, with the same task files, data and versions",
        )
    return PairedTask(reference, artifact)


def _measured(scores: Scores) -> list[tuple[str, object]]:
    """The values that must be equal, each with its name."""
    named = ("task", "metric", "filter", "num_fewshot")
    items: list[tuple[str, object]] = [(f"item {item.index}", item.digest) for item in scores.items]
    return [*((name, getattr(scores, name)) for name in named), ("number of items", len(items)), *items]


def _first_difference(ours: Sequence[tuple[str, object]], theirs: Sequence[tuple[str, object]]) -> str:
    pairs = zip(ours, theirs, strict=False)
    own, other = next((own, other) for own, other in pairs if own != other)
    return f"{own[0]} is {own[1]} for the reference, {other[0]} is {other[1]} for the artifact"


OpenModel = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Opens the model for the time of the context, for example `BlockRunner.whole`."""

_NEEDED: Final = {"lm_eval": (0, 4, 13), "datasets": (4, 0)}
"""Before version 4, `datasets` runs scripts that are stored with the data."""


def require_harness() -> None:
    """Checks that lm-evaluation-harness is installed; imports nothing.

    Raises:
        RecipeError: the harness or `datasets` is missing or too old.
    """
    for package, oldest in _NEEDED.items():
        needed = f"{package} {'.'.join(map(str, oldest))}"
        try:
            installed = version(package)
        except PackageNotFoundError as error:
            raise _missing(f"task accuracy needs {needed}, which is not installed") from error
        if tuple(map(int, re.findall(r"\d+", installed)))[: len(oldest)] < oldest:
            raise _missing(f"task accuracy needs {needed}; {installed} is installed")


def measure_tasks(
    reference: OpenModel,
    artifact: OpenModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TaskSettings,
    finished: Callable[[str], None],
) -> list[PairedTask]:
    """Runs every task with each model, on the same items. Only one model is in memory at a time.

    Args:
        reference: opens the merged model.
        artifact: opens the artifact.
        tokenizer: the models'; it is not changed.
        settings: the recipe's `verify.tasks`, with local paths resolved.
        finished: is called with the name of each task that a model has answered: twice for each task.

    Raises:
        RecipeError: the harness is missing, a task is unknown or named twice, or does not have the metric.
        InputError: a task file, its data or a task of the harness cannot be used, or would run code.
        NumericalError: logits hold NaN or Inf.
    """
    require_harness()
    with hidden("bitsandbytes"):  # the harness imports PEFT
        from qexport.verifying.tasks.harness import HarnessModel, build_questions, contained

    def answers(open_model: OpenModel) -> list[Scores]:
        scores = []
        with open_model() as model:
            subject = HarnessModel(model, tokenizer, settings)
            for question in questions:
                scores.append(subject.answer(question))
                finished(question.name)
        return scores

    with contained():
        questions = build_questions(settings)
        return [pair(ours, theirs) for ours, theirs in zip(answers(reference), answers(artifact), strict=True)]


def _missing(what: str) -> RecipeError:
    return RecipeError(what, where="verify.tasks", mend="pip install qexport[tasks]")
