"""What a recipe's text names: a task of the harness, or files of one's own."""

from __future__ import annotations

from typing import Final

ENDINGS: Final = (".yaml", ".yml")
"""Of task files."""

_EXPLICIT: Final = ("./", "../", "/", "~")


def names_file(task: str) -> bool:
    """Whether a recipe's text names a task file or a folder of them, not a task of the harness."""
    return task.startswith(_EXPLICIT) or task in {".", ".."} or task.endswith(ENDINGS)
