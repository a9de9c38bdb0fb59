"""The margin of tasks: its gate, and what is said and refused before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import reports
import task_files
from qexport.artifact.figures import Figure, GateResult
from qexport.errors import RecipeError
from qexport.gates import Bounds, DomainBounds, GatesFile
from qexport.gates.deciding_again import decide_again
from qexport.gates.limits import Limit, margin_limits
from qexport.gates.profiles import profile_record
from qexport.pipeline.reference import Gates
from qexport.quantizing import profile_of_layer
from qexport.verifying import TaskSettings, VerifySettings
from qexport.verifying.tasks.measuring import Item, Scores, pair
from qexport.verifying.tasks.planned import planned_tasks


def change(task: str, items: int, lost: int, gained: int = 0) -> Figure:
    def scores(right: list[bool]) -> Scores:
        return Scores(task, "acc", "none", 0, tuple(Item(i, f"item {i}", each) for i, each in enumerate(right)))

    reference = [True] * lost + [False] * (items - lost)
    artifact = [False] * lost + [True] * gained + [False] * (items - lost - gained)
    return pair(scores(reference), scores(artifact)).accuracy_change


def decided(figures: list[Figure], limits: list[Limit] | None = None, margin: float = 0.02) -> dict[str, GateResult]:
    settings = VerifySettings(text="t.jsonl", profile="off")
    gates = Gates(profile_record(settings, "off"), limits or [], [], [], margin)
    return {result.name: result for result in gates(figures, [])}


def test_a_task_passes_where_the_whole_interval_lies_within_the_margin() -> None:
    found = decided([change("sound", 2000, 30, 30), change("worse", 2000, 120), change("small", 100, 0)])
    assert {name: result.verdict for name, result in found.items()} == {
        "accuracy_change[sound]": "pass",
        "accuracy_change[worse]": "fail",
        "accuracy_change[small]": "undecided",
    }
    sound = found["accuracy_change[sound]"]
    assert (sound.limit, sound.bound, sound.source) == (-0.02, "at_least", "verify.tasks.margin")
    assert sound.room is not None
    assert 0 < sound.room < 1


def test_tasks_that_were_not_measured_do_not_pass() -> None:
    (result,) = decided([]).values()
    assert (result.name, result.verdict, result.reason) == ("accuracy_change", "undecided", "not measured")


def test_a_limit_of_the_users_own_takes_the_margins_place() -> None:
    own = Limit("accuracy_change", "sound", "at_least", -0.2, by_user=True)
    above = Limit("accuracy_change", "worse", "at_most", 0.1, by_user=True)
    figures = [change("sound", 2000, 30, 30), change("worse", 2000, 120)]
    assert [limit.name for limit in margin_limits(0.02, figures, [own, above])] == ["accuracy_change[worse] at_least"]
    found = decided(figures, [own, above])
    assert found["accuracy_change[sound]"].limit == -0.2
    assert found["accuracy_change[worse] at_least"].verdict == "fail"


def test_the_margins_gates_are_decided_again_from_a_report() -> None:
    measured_tasks = [change("sound", 2000, 30, 30), change("worse", 2000, 120)]
    gates = list(decided(measured_tasks).values())
    found = reports.report(gates, figures=[*reports.figures(), *measured_tasks])
    again, _ = decide_again(found, GatesFile(profile="off"), profile_of_layer)
    assert [gate for gate in again if gate.figure == "accuracy_change"] == gates
    own = Bounds(domains={"worse": DomainBounds(at_least=-0.2)})
    again, _ = decide_again(found, GatesFile(profile="off", gates={"accuracy_change": own}), profile_of_layer)
    verdicts = {gate.name: gate.verdict for gate in again if gate.figure == "accuracy_change"}
    assert verdicts == {"accuracy_change[sound]": "pass", "accuracy_change[worse]": "pass"}


def test_without_a_margin_there_is_no_gate() -> None:
    settings = VerifySettings(text="t.jsonl", profile="off")
    assert Gates(profile_record(settings, "off"), [], [], [])([change("worse", 2000, 120)], []) == []


@pytest.fixture(scope="module")
def harbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": index % 2} for index in range(400)]
    return task_files.write_task(folder, rows, task_files.CHOICE, name="harbour")


def test_what_a_task_can_show_is_said_as_on_the_page(harbour: Path) -> None:
    (task,) = planned_tasks(TaskSettings(tasks=[str(harbour)], margin=0.02))
    assert f"task      {task.line()}" in task_files.PAGE.read_text(encoding="utf-8")
    assert task.as_dict() == {
        "task": "harbour", "items": 400, "smallest_drop": pytest.approx(0.044, abs=0.001), "margin": 0.02,
        "power": pytest.approx(0.23, abs=0.02), "items_for_margin": 2005,
    }  # fmt: skip


def test_the_items_are_those_of_the_split_up_to_the_limit(harbour: Path) -> None:
    (few,) = planned_tasks(TaskSettings(tasks=[str(harbour)], limit=30))
    assert (few.name, few.items) == ("harbour", 30)
    (many,) = planned_tasks(TaskSettings(tasks=[str(harbour)], limit=3000))
    assert many.items == 400
    limited, unknown = (
        planned_tasks(TaskSettings(tasks=["arc_easy"], limit=limit, margin=0.1))[0] for limit in (90, None)
    )
    assert limited.line().startswith("arc_easy: 90 items show a drop of ")
    assert unknown.line().startswith("arc_easy: the harness decides the number of items; the margin of 10 points needs")
    assert unknown.as_dict()["smallest_drop"] is None


def test_a_margin_that_no_answers_could_show_is_refused_with_the_number_that_would_do(harbour: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned_tasks(TaskSettings(tasks=[str(harbour)], limit=188, margin=0.02))
    assert "harbour: 188 items" in str(caught.value)
    assert "take at least 189 items (2005 for a power of 80 %)" in str(caught.value)
    assert planned_tasks(TaskSettings(tasks=[str(harbour)], limit=189, margin=0.02))
    assert planned_tasks(TaskSettings(tasks=[str(harbour)], limit=20))
