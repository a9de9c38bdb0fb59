"""What the tasks of a recipe can show, said before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.amounts import counted
from qexport.errors import RecipeError, listed
from qexport.statistics.paired import fewest_items, items_for, power_to_pass, smallest_drop
from qexport.verifying import TaskSettings, names_file
from qexport.verifying.tasks.local_files import LocalTask, read_local_tasks


@dataclass(frozen=True)
class PlannedTask:
    """A task and its power, for a share of changed answers that is typical (`qexport.statistics.paired`).

    Attributes:
        name: of the task; for tasks of the harness as the recipe has it, which may be a group.
        items: how many items will be answered, at most for tasks of the harness; None if the harness decides.
        margin: the recipe's.
    """

    name: str
    items: int | None
    margin: float | None

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        known = self.items is not None and self.items > 0
        return {
            "task": self.name,
            "items": self.items,
            "smallest_drop": round(smallest_drop(self.items), 4) if known and self.items else None,
            "margin": self.margin,
            "power": round(power_to_pass(self.items, self.margin), 3) if known and self.items and self.margin else None,
            "items_for_margin": None if self.margin is None else items_for(self.margin),
        }

    def line(self) -> str:
        """The same for people."""
        parts = ["the harness decides the number of items"]
        if self.items:
            parts = [f"{counted(self.items, 'item')} show a drop of {100 * smallest_drop(self.items):.1f} points"]
        if self.margin is not None:
            parts.append(f"the margin of {100 * self.margin:g} points needs {counted(items_for(self.margin), 'item')}")
        return f"{self.name}: {'; '.join(parts)} (with 80 % probability, if one answer in ten changes)"


def planned_tasks(settings: TaskSettings) -> list[PlannedTask]:
    """The tasks of a recipe. Task files are read, those of the harness are not.

    Raises:
        InputError: a task file cannot be used.
        RecipeError: a task has too few items for the margin, whatever is answered.
    """
    found = list[PlannedTask]()
    for name in settings.tasks:
        local = read_local_tasks(Path(name).expanduser()) if names_file(name) else []
        found += [PlannedTask(task.name, _items(task, settings.limit), settings.margin) for task in local]
        found += [] if local else [PlannedTask(name, settings.limit, settings.margin)]
    _refuse_too_few(found, settings)
    return found


def _items(task: LocalTask, limit: int | None) -> int | None:
    split = str(task.config.get("test_split") or task.config.get("validation_split"))
    if task.splits is None or split not in task.splits:
        return limit
    rows = len(task.splits[split])
    return rows if limit is None else min(rows, limit)


def _refuse_too_few(found: Sequence[PlannedTask], settings: TaskSettings) -> None:
    if settings.margin is None:
        return
    needed = fewest_items(settings.margin)
    few = [f"{task.name}: {counted(task.items, 'item')}" for task in found if task.items and task.items < needed]
    if few:
        raise RecipeError(
            f"too few items to show that an artifact loses at most {100 * settings.margin:g} points, even if no answer "
            "changes",
            where=f"verify.tasks.margin: {listed(few)}",
            mend=f"take at least {needed} items ({items_for(settings.margin)} for a power of 80 %), or a larger margin",
        )
