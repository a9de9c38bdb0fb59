"""Answers of two models paired by item, without the harness."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import factories
from qexport.errors import QexportError, RecipeError
from qexport.verifying import TaskSettings
from qexport.verifying.tasks import measuring
from qexport.verifying.tasks.measuring import Item, Scores, measure_tasks, pair, require_harness

Answers = list[tuple[bool, bool]]


def scores(right: list[bool], *, task: str = "local", metric: str = "acc") -> Scores:
    items = tuple(Item(index, f"digest {index}", value) for index, value in enumerate(right))
    return Scores(task, metric, "none", 0, items)


def split_by_chance(one: int, other: int) -> float:
    """The probability that a fair coin's tosses split at least as unevenly."""
    tosses = one + other
    ways = sum(comb(tosses, heads) for heads in range(tosses + 1) if abs(2 * heads - tosses) >= abs(one - other))
    return float(ways / 2**tosses)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_items_are_counted_by_who_got_them_right(answers: Answers) -> None:
    reference, artifact = ([answer[side] for answer in answers] for side in (0, 1))
    paired = pair(scores(reference), scores(artifact))
    result = paired.record
    both = round(result.reference_accuracy * result.items) - result.only_reference
    neither = round((1 - result.artifact_accuracy) * result.items) - result.only_reference
    assert both == answers.count((True, True))
    assert result.only_reference == answers.count((True, False))
    assert result.only_artifact == answers.count((False, True))
    assert both + result.only_reference + result.only_artifact + neither == result.items == len(answers)
    assert result.reference_accuracy == reference.count(True) / len(answers)
    assert result.artifact_accuracy == artifact.count(True) / len(answers)
    change = result.artifact_accuracy - result.reference_accuracy
    assert paired.accuracy_change.value == pytest.approx(change, abs=1e-12)
    assert result.p_value == pytest.approx(split_by_chance(result.only_reference, result.only_artifact), rel=1e-9)


def test_a_loss_that_repeats_itself_is_told_from_chance() -> None:
    one_sided = pair(scores([True] * 100), scores([True] * 90 + [False] * 10))
    mixed = pair(scores([True] * 95 + [False] * 5), scores([True] * 90 + [False] * 5 + [True] * 5))
    assert one_sided.record.p_value == 2 / 2**10
    assert mixed.record.p_value == 1.0


@pytest.mark.parametrize("fault", ["task", "metric", "filter", "num_fewshot", "prompt", "order", "fewer", "more"])
def test_other_items_are_an_error(fault: str) -> None:
    reference = scores([True, False, True])
    items = reference.items
    other = {
        "task": replace(reference, task="another"),
        "metric": replace(reference, metric="acc_norm"),
        "filter": replace(reference, filter="strict"),
        "num_fewshot": replace(reference, num_fewshot=1),
        "prompt": replace(reference, items=(items[0], replace(items[1], digest="changed"), items[2])),
        "order": replace(reference, items=(items[1], items[0], items[2])),
        "fewer": replace(reference, items=items[:2]),
        "more": replace(reference, items=(*items, Item(3, "digest 3", True))),
    }[fault]
    with pytest.raises(QexportError, match="did not answer the same items") as caught:
        pair(reference, other)
    assert caught.value.where is not None
    assert caught.value.where.startswith("task local: ")


def test_equal_answers_to_a_few_items_leave_the_change_of_accuracy_open() -> None:
    answers = scores([True, False] * 5)
    figure = pair(answers, answers).accuracy_change
    assert (figure.domain, figure.value, figure.n, figure.unit) == ("local", 0, 10, "item")
    assert figure.low is not None
    assert figure.sequence_low is not None
    assert figure.sequence_low == figure.low < -0.1


def test_the_digest_is_that_of_what_was_asked_not_of_the_answers() -> None:
    first, second = pair(scores([True]), scores([False])), pair(scores([False]), scores([False]))
    assert first.record.sha256 == second.record.sha256
    assert pair(scores([True, True]), scores([True, True])).record.sha256 != first.record.sha256


def test_without_the_harness_tasks_are_refused_before_a_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    def never_opened() -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(measuring, "version", missing)
    settings = TaskSettings(tasks=["arc_easy"])
    with pytest.raises(RecipeError, match="lm_eval") as caught:
        measure_tasks(never_opened, never_opened, factories.tokenizer(), settings, lambda _: None)  # type: ignore[arg-type]
    assert caught.value.mend == "pip install qexport[tasks]"


@pytest.mark.parametrize(
    ("installed", "refused"),
    [
        ({"lm_eval": "0.4.13", "datasets": "4.0.0"}, None),
        ({"lm_eval": "0.4.14.dev1", "datasets": "5.2.0"}, None),
        ({"lm_eval": "0.4.9", "datasets": "5.2.0"}, "lm_eval 0.4.13; 0.4.9 is installed"),
        ({"lm_eval": "0.4.13", "datasets": "3.6.0"}, "datasets 4.0; 3.6.0 is installed"),
    ],
)
def test_releases_that_are_too_old_are_refused(
    installed: dict[str, str], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "version", installed.__getitem__)
    if refused is None:
        require_harness()
        return
    with pytest.raises(RecipeError, match=refused):
        require_harness()


@pytest.mark.parametrize(
    "values",
    [{}, {"tasks": []}, {"tasks": ["a"], "metric": "f1"}, {"tasks": ["a"], "limit": 0}, {"tasks": ["a"], "few": 1}],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TaskSettings.model_validate(values)
