"""Reading a file of gates."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from qexport.gates.settings import GatesFile
from qexport.yaml.document import plain
from qexport.yaml.problems import problems_of
from qexport.yaml.reading import FileKind

_GATES: Final = FileKind(
    "file of gates", needs="give profile, gates or both", reference="docs/gates.md describes every field"
)


def read_gates(path: Path) -> GatesFile:
    """Reads a YAML file with `profile` and `gates`.

    Raises:
        RecipeError: with every problem that was found, each as `file:line: field: message`.
    """
    root, problems = _GATES.read(path)
    try:
        settings = GatesFile.model_validate(plain(root))
    except ValidationError as error:
        problems += problems_of(error, root, GatesFile)
    if problems:
        raise _GATES.error(path, problems)
    return settings
