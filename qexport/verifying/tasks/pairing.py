"""Which items of a task each model got right, and McNemar's test on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.artifact.digests import sha256_json
from qexport.errors import QexportError
from qexport.statistics.paired import mcnemar


@dataclass(frozen=True)
class Item:
    """One model's answer to one item of a task.

    Attributes:
        index: the item's place in the task's documents.
        digest: of its document, prompt and target, by which the same item is known.
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
        metric: what makes an item right.
        filter: the task's chain of filters that the answers went through.
        num_fewshot: solved examples before each item.
        items: in the order of the task's documents.
    """

    task: str
    metric: str
    filter: str
    num_fewshot: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class TaskResult:
    """Both models' answers to one task.

    Attributes:
        task: the task's name.
        metric: what makes an item right.
        filter: the task's chain of filters that the answers went through.
        num_fewshot: solved examples before each item.
        sha256: of the items' documents, prompts and targets; results are comparable only where it is equal.
        reference: for each item, whether the reference got it right.
        artifact: for each item, whether the artifact got it right.
    """

    task: str
    metric: str
    filter: str
    num_fewshot: int
    sha256: str
    reference: tuple[bool, ...]
    artifact: tuple[bool, ...]

    @property
    def items(self) -> int:
        """How many items were measured."""
        return len(self.reference)

    @property
    def reference_accuracy(self) -> float:
        """The share of items that the reference got right."""
        return sum(self.reference) / self.items

    @property
    def artifact_accuracy(self) -> float:
        """The share of items that the artifact got right."""
        return sum(self.artifact) / self.items

    @property
    def differences(self) -> tuple[int, ...]:
        """For each item +1 where only the artifact got it right, -1 where only the reference did, else 0."""
        return tuple(int(own) - int(other) for other, own in zip(self.reference, self.artifact, strict=True))

    @property
    def both(self) -> int:
        """Items that both got right."""
        return self._count(reference=True, artifact=True)

    @property
    def only_reference(self) -> int:
        """Items that only the reference got right."""
        return self._count(reference=True, artifact=False)

    @property
    def only_artifact(self) -> int:
        """Items that only the artifact got right."""
        return self._count(reference=False, artifact=True)

    @property
    def neither(self) -> int:
        """Items that neither got right."""
        return self._count(reference=False, artifact=False)

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided test: how likely so uneven a split of the changed items is by chance alone."""
        return mcnemar(self.only_reference, self.only_artifact)

    def _count(self, *, reference: bool, artifact: bool) -> int:
        return list(zip(self.reference, self.artifact, strict=True)).count((reference, artifact))


def pair(reference: Scores, artifact: Scores) -> TaskResult:
    """Lays the answers to the same items side by side.

    Raises:
        QexportError: the two do not hold the same task, metric and items.
    """
    ours, theirs = _measured(reference), _measured(artifact)
    if ours != theirs:
        raise QexportError(
            "the two models were not asked the same items",
            where=f"task {reference.task}: {_first_difference(ours, theirs)}",
            mend="measure both again, with the same task files, data and versions",
        )
    return TaskResult(
        task=reference.task,
        metric=reference.metric,
        filter=reference.filter,
        num_fewshot=reference.num_fewshot,
        sha256=sha256_json([item.digest for item in reference.items]),
        reference=tuple(item.right for item in reference.items),
        artifact=tuple(item.right for item in artifact.items),
    )


def _measured(scores: Scores) -> list[tuple[str, object]]:
    """What must be equal, each with its name."""
    named = ("task", "metric", "filter", "num_fewshot")
    items: list[tuple[str, object]] = [(f"item {item.index}", item.digest) for item in scores.items]
    return [*((name, getattr(scores, name)) for name in named), ("number of items", len(items)), *items]


def _first_difference(ours: Sequence[tuple[str, object]], theirs: Sequence[tuple[str, object]]) -> str:
    pairs = zip(ours, theirs, strict=False)
    own, other = next((own, other) for own, other in pairs if own != other)
    return f"{own[0]} is {own[1]} for the reference, {other[0]} is {other[1]} for the artifact"
